"""A real model: measured perplexity, and agreement with the method's released code."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cfsp
from cfsp.calibration.statistics import Statistics
from cfsp.cli.demo import print_demo, run_demo
from cfsp.evaluation.quality import Perplexity, evaluation_windows, perplexity
from cfsp.models.opening import OpenModel, open_model
from cfsp.pruning.allocation import cfsp_keep_fractions
from cfsp.pruning.planning import select_channels

from ..conftest import shared
from ..models.test_streaming import assert_same_files

pytestmark = pytest.mark.smollm2
WINDOWS, SEQLEN, CHANNELS = 32, 1024, 1536


@pytest.fixture(scope="module")
def released() -> dict[str, object]:
    return json.loads(shared("parity/released-cfsp-0.30.json").read_text())


def measure(opened: OpenModel, count: int = WINDOWS) -> Perplexity:
    dataset = str(shared("data/wikitext2-test.parquet"))
    windows = evaluation_windows(opened.tokenizer, dataset, SEQLEN, count, "auto")
    return perplexity(opened.model, windows, progress=False)


def test_perplexity_of_the_dense_model(smollm2: Path) -> None:
    """The first 8 windows, or with CFSP_LONG_TESTS=1 the 32 of the independent measurement."""
    count, expected = (WINDOWS, 24.19) if os.environ.get("CFSP_LONG_TESTS") else (8, 29.20)
    measured = measure(open_model(smollm2), count)
    assert measured.perplexity == pytest.approx(expected, abs=0.05)


def test_perplexity_of_the_pruned_model(
    smollm2: Path, wikitext_recipe: cfsp.Recipe, wikitext_statistics: Statistics
) -> None:
    """WikiText-2 test, first 32 windows of 1024 tokens; an independently measured figure."""
    opened = open_model(smollm2)
    cfsp.prune(
        opened.model,
        opened.tokenizer,
        wikitext_recipe,
        statistics=wikitext_statistics,
        progress=False,
    )
    assert measure(opened).perplexity == pytest.approx(39.06, abs=0.3)


def test_from_disk_to_disk_gives_the_bytes_of_the_model_in_memory(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = cfsp.Calibration(dataset="builtin", samples=2, seqlen=128)
    recipe = cfsp.Recipe(calibration=calibration)

    def prune(name: str) -> cfsp.PruneResult:
        return cfsp.prune(
            smollm2, recipe=recipe, out=tmp_path / name, eval_windows=0, progress=False
        )

    assert prune("streamed").live is None
    monkeypatch.setattr("cfsp.models.opening.open_streamed", lambda *_, **__: None)
    assert prune("whole").live is not None
    assert_same_files(tmp_path / "streamed", tmp_path / "whole")


def test_block_importance_is_that_of_the_released_code(
    wikitext_statistics: Statistics, released: dict[str, object]
) -> None:
    theirs = torch.tensor(released["importance_sum"], dtype=torch.float64) / released["tokens"]
    ours = wikitext_statistics.importance("angular")
    assert (ours - theirs).abs().max() < 1e-4


def test_widths_follow_the_released_formula(released: dict[str, object]) -> None:
    importance = torch.tensor(released["importance_sum"], dtype=torch.float64)
    keep = cfsp_keep_fractions(importance, released["sparsity"]) * CHANNELS
    assert [int(width) + 1 for width in keep.tolist()] == released["kept"]


def test_kept_channels_are_those_of_the_released_code(
    wikitext_statistics: Statistics, released: dict[str, object]
) -> None:
    same = total = 0
    for block, width, mask in zip(
        wikitext_statistics.blocks, released["kept"], released["kept_mask_hex"], strict=True
    ):
        bits = bin(int(mask, 16))[2:].zfill(CHANNELS)
        theirs = {channel for channel, bit in enumerate(bits) if bit == "1"}
        ours = set(select_channels(block.norm, width).tolist())
        assert len(theirs) == width
        same, total = same + len(ours & theirs), total + width
    assert same / total >= 0.998


def test_a_second_budget_from_saved_statistics_takes_seconds(
    smollm2: Path, wikitext_recipe: cfsp.Recipe, wikitext_statistics: Statistics, tmp_path: Path
) -> None:
    cfsp.save_statistics(wikitext_statistics, tmp_path / "s.safetensors")
    started = time.perf_counter()
    result = cfsp.prune(
        smollm2,
        recipe=replace(wikitext_recipe, sparsity=0.5),
        out=tmp_path / "half",
        statistics=tmp_path / "s.safetensors",
        eval_windows=0,
        progress=False,
    )
    assert time.perf_counter() - started < 30
    assert result.plan.sparsity == pytest.approx(0.5, abs=1e-4)


def test_the_demo_does_the_whole_job(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``cfsp demo``, on less text."""
    calibration = cfsp.Calibration(dataset="builtin", samples=2, seqlen=256)
    monkeypatch.setattr("cfsp.cli.demo.RECIPE", cfsp.Recipe(sparsity=0.3, calibration=calibration))
    monkeypatch.setattr("cfsp.cli.demo.EVALUATION_WINDOWS", 2)
    monkeypatch.setattr("cfsp.cli.demo.dense_folder", lambda folder: smollm2)
    demo = run_demo(tmp_path, overwrite=False, device="cpu", progress=False)
    assert demo.picture.read_bytes().startswith(b"\x89PNG")
    assert demo.before.text != demo.after.text
    from rich.console import Console

    console = Console(record=True, width=100)
    print_demo(demo, console)
    printed = console.export_text()
    assert "134,515,008" in printed
    assert "perplexity (held out)" in printed
    assert "tokens/s, writing" in printed
