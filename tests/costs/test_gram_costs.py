"""Estimates of Gram matrices and least squares against what they take."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import cfsp
from cfsp.calibration.collect import collect_statistics
from cfsp.calibration.gram_sums import GramSums, Split, products_held
from cfsp.calibration.grams import temporary_folder
from cfsp.costs import fit_costs as gram_costs
from cfsp.costs.fit_costs import GramCosts
from cfsp.costs.hardware import parse_memory
from cfsp.errors import CfspError
from cfsp.models.channels import ChannelGroup
from cfsp.models.layouts import LAYOUTS
from cfsp.pruning import least_squares
from cfsp.pruning.least_squares import fit_down, output_errors
from cfsp.pruning.obs import removal_order, residual_norms

from ..conftest import make_tokenizer
from ..models.test_families import make
from ..models.test_streaming import RECIPE
from ..pruning.test_least_squares import gram_of, problem
from .test_estimate import Live, reference

LEAST_SQUARES = cfsp.Recipe(scorer="cfsp", compensation="least-squares")


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_disk_and_memory_of_a_calibration(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(name)
    layout = LAYOUTS[name]
    groups = [layout.groups(block) for block in layout.find_blocks(model)]
    costs = GramCosts(groups, 32, 2, 0.3, False)
    held: list[int] = []

    def counted(sums: GramSums, *arguments: object) -> object:
        for own in (own for parts in sums.found for own in parts.values()):
            own.end_chunk()
        of = [own.products for parts in sums.found for own in parts.values()]
        held.append(sum(x.nbytes for products in of for x in products))
        return write(sums, *arguments)

    write = GramSums.write
    monkeypatch.setattr(GramSums, "write", counted)
    windows = torch.randint(0, 256, (21, 8), generator=torch.Generator().manual_seed(0))
    folder = temporary_folder(tmp_path / "g")
    collect_statistics(model, layout, windows, micro_batch=2, progress=False, grams=folder)
    written = sum(file.stat().st_size for file in folder.path.iterdir())
    assert written == costs.disk_bytes(len(windows))
    split = Split(*windows.shape, 2)
    assert max(held) == costs.sum_bytes(split, 1, 0)
    widest = 2 * 48 if name == "llama" else 3 * 2 * 24  # kept, whole; and sorted, of two experts
    assert split.chunk_tokens == 2 * 2 * 8
    assert costs.sum_bytes(split, 1, 4) - max(held) == split.chunk_tokens * widest * 4


def test_products_held_by_ranks() -> None:
    split = Split(160, 1024, 8)
    assert [products_held(split, ranks) for ranks in (1, 2, 4, 8)] == [2, 4, 2, 1]
    assert products_held(Split(1, 1024, 8), 1) == 1


def test_flops_and_memory_of_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, channels, width = 100, 300, 210
    for module in (least_squares, gram_costs):
        monkeypatch.setattr(module, "ROWS", 50)
    monkeypatch.setattr(least_squares, "COLUMNS", 128)
    x, down, kept = problem(700, channels, hidden, width)
    gram = gram_of(x)
    costs = GramCosts([[ChannelGroup(channels)]], hidden, 1, 0.3, True)
    with FlopCounterMode(display=False) as counted, Live([down, kept]) as live:
        live.sizes[-1] = gram.product.nbytes
        fit = fit_down(down, kept, gram)
        assert fit is not None
        output_errors(down, kept, [(down[:, kept], None), (fit.weight, None)], gram)
    solved = width**3 / 3 + 2 * hidden * width**2  # which the counter does not know
    assert counted.get_total_flops() + solved == costs.fit_flops()
    assert costs.fit_bytes() == pytest.approx(live.peak, rel=0.1)


def test_memory_of_a_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, channels = 100, 600
    x, down, _ = problem(700, channels, hidden, channels)
    gram = gram_of(x)
    costs = GramCosts([[ChannelGroup(channels)]], hidden, 1, 0.3, True, True)
    with Live([down]) as live:
        live.sizes[-1] = gram.product.nbytes
        removal_order(down, gram.product / gram.tokens)
    assert live.peak <= costs.rank_bytes() * 1.1
    assert live.peak >= costs.rank_bytes() * 0.6
    assert replace(costs, scores=False).rank_flops() == 0 < costs.rank_flops()
    alone = replace(costs, residuals=True)
    moments = gram.product / gram.tokens
    with Live([moments]) as live:
        live.sizes[-1] = moments.nbytes
        residual_norms(moments, 2.0)
    assert alone.rank_bytes() * 0.8 <= live.peak <= alone.rank_bytes() * 1.1
    assert alone.rank_flops() == channels**3 < costs.rank_flops()


def test_a_70b_model_says_what_they_take() -> None:
    plain, fitted = reference("Llama-3-70B"), reference("Llama-3-70B", recipe=LEAST_SQUARES)
    triangle = 28672**2 / 2 * 4
    assert fitted.gram_bytes == pytest.approx(80 * 2 * triangle, rel=0.04)
    a, b = ({stage.name: stage for stage in x.stages} for x in (plain, fitted))
    more = b["calibrate"].flops - a["calibrate"].flops
    assert more == pytest.approx(128 * 1024 * 80 * 28672**2)
    assert b["calibrate"].bytes_written == fitted.gram_bytes
    assert b["prune"].bytes_read - a["prune"].bytes_read == fitted.gram_bytes
    assert b["calibrate"].bound == "write"
    assert fitted.device_bytes > plain.device_bytes
    with pytest.raises(CfspError, match=r"device memory: .* 15\.0 GiB to be had"):
        fitted.check(parse_memory("15GiB"))
    fitted.check(parse_memory("24GB"))
    with pytest.raises(CfspError, match="take 1, 2, 4 or 8 ranks, not 6"):
        reference("Llama-3-70B", recipe=LEAST_SQUARES, ranks=6)
    experts = reference("Qwen3-235B-A22B", recipe=LEAST_SQUARES)
    chunk = 128 * 1024 // 8 * 8 * 1536 * 2  # tokens, experts of each, bf16
    assert experts.device_parts["Gram matrices"] == 2 * 128 * 1536**2 * 4 + 3 * chunk


def test_no_room_on_the_disk_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(CfspError, match=r"take .* KiB of disk, .* has 1000 B free") as told:
        cfsp.calibrate(make("llama"), make_tokenizer(), RECIPE, gram=True, progress=False)
    assert "\n" not in str(told.value)
