"""Numbers and sizes of the command line and of calls: bounded, whole, finite; else one line."""

import contextlib
import json
import math
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cfsp
from cfsp.calibration.mixtures import parse_mixture
from cfsp.costs.hardware import parse_memory
from cfsp.errors import CfspError
from cfsp.evaluation.side_by_side import evaluate
from cfsp.pruning.budget import parse_model_budget
from cfsp.pruning.recipe import load_recipe, recipe_from_dict
from cfsp.settings import setting_of

from .test_cli import EXACT, SMALL, run

TEXTS = st.text(st.sampled_from("0123456789.=,@x:KMBTGi params flops device host٣½\0\ud800"))


@settings(max_examples=300, deadline=None)
@given(TEXTS | st.text())
@pytest.mark.parametrize("parse", [parse_memory, parse_model_budget, parse_mixture])
def test_any_text_is_read_or_refused_in_one_line(parse: Any, text: str) -> None:
    told = ""
    with contextlib.suppress(CfspError):
        try:
            parse(text)
        except CfspError as error:
            told = str(error)
            raise
    assert "\n" not in told


@pytest.mark.parametrize(
    "text",
    [
        "9" * 400 + "GiB",
        "9" * 5000 + "B",
        "9" * 20 + "TiB",
        "٣GiB",
        "1e30GiB",
        "-1GiB",
        "0B",
        "nanGiB",
        "1GiB\0",
    ],
)
def test_memory_is_of_a_size_that_exists(text: str) -> None:
    for whole in (text, f"device={text}", f"device=1GiB,host={text}"):
        with pytest.raises(CfspError, match=r"not a size: .{1,130}|max_memory must be text"):
            parse_memory(whole)
    with pytest.raises(CfspError, match="max_memory must be text, got 5"):
        parse_memory(5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        *("params=" + "9" * 400, "params=" + "9" * 20 + "T", "flops=0.25@" + "9" * 30 + "x8"),
        *("params=٣", "params=2\u212a", "flops=1e-3", "latency=nan", "flops=0.1@0x1", "params="),
    ],
)
def test_a_budget_is_of_a_size_that_exists(text: str) -> None:
    with pytest.raises(CfspError, match=r"budget '.{1,130}: "):
        cfsp.Recipe(budget=text)


def test_a_mixture_of_thousands_is_refused_at_once() -> None:
    assert len(parse_mixture(",".join(f"x{n}" for n in range(200)))) == 1
    with pytest.raises(CfspError, match="has more than 200 parts"):
        parse_mixture("," * 100_000)


@pytest.mark.parametrize("shape", ["1x", "x1", "9" * 400 + "x1", "1x" + "9" * 5000, "٣x1", "0x5"])
def test_a_shape_is_of_a_size_that_exists(
    shape: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(capsys, "latency", tiny_folder, "--shape", shape)
    assert code == 2
    assert error.count("\n") == 1
    assert len(error) < 300


COUNTS = [1e30, 10**30, 2**31, 1.5, -1, True, "5", None, math.nan, math.inf]


@pytest.mark.parametrize("value", COUNTS)
@pytest.mark.parametrize("kind", [cfsp.Recipe, cfsp.Calibration, cfsp.Recovery])
def test_every_count_of_settings_is_whole_and_bounded(kind: type, value: Any) -> None:
    counts = [field for field in fields(kind) if field.type in (int, int | None)]
    assert counts
    for field in counts:
        about = setting_of(field)
        bound = about.must_be if about is not None else None
        free = value == -1 and (bound is None or field.name == "blocks")  # a seed; one block less
        if free or (value is None and field.default is None):
            kind(**{field.name: value})
            continue
        with pytest.raises(CfspError, match=f"^{field.name} must be "):
            kind(**{field.name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, "0.5", True, [1]])
@pytest.mark.parametrize("kind", [cfsp.Recipe, cfsp.Recovery])
def test_every_number_of_settings_is_finite(kind: type, value: Any) -> None:
    numbers = [field for field in fields(kind) if field.type in (float, float | None)]
    assert numbers
    for field in numbers:
        with pytest.raises(CfspError, match=f"^{field.name} must be "):
            kind(**{field.name: value})


@pytest.mark.parametrize("value", [5, ["c4"], b"c4", "a\0", "\udcff", {"a": 1}, True])
@pytest.mark.parametrize("kind", [cfsp.Recipe, cfsp.Calibration, cfsp.Recovery])
def test_every_text_of_settings_is_text(kind: type, value: Any) -> None:
    texts = [field for field in fields(kind) if field.type in (str, str | None)]
    assert texts
    for field in texts:
        with pytest.raises(CfspError, match=f"^{field.name} must be text"):
            kind(**{field.name: value})


def test_a_part_of_settings_is_of_its_class() -> None:
    for value in ({}, {"samples": 4}, None, 5):
        with pytest.raises(CfspError, match="calibration must be a Calibration"):
            cfsp.Recipe(calibration=value)  # type: ignore[arg-type]
    with pytest.raises(CfspError, match="distillation must be a Distillation"):
        cfsp.Recovery(distillation={"teacher": "t"})  # type: ignore[arg-type]


def test_samples_are_as_many_as_memory_may_hold() -> None:
    assert cfsp.Calibration(samples=10**6).windows_by_dataset == {"wikitext2": 10**6}
    with pytest.raises(CfspError, match="samples must be at most 1000000, got 1000000000"):
        cfsp.Calibration(samples=10**9)


@pytest.mark.parametrize("value", [1e30, 10**30, 2**31, -1, "5", True])
def test_counts_of_calls_are_whole_and_bounded(value: Any, tiny_folder: Path) -> None:
    out = tiny_folder.parent / "out"
    calls = {
        "eval_windows": [
            lambda: cfsp.prune(tiny_folder, out=out, eval_windows=value),
            lambda: cfsp.estimate(tiny_folder, eval_windows=value),
        ],
        "batch": [lambda: cfsp.latency_table(tiny_folder, batch=value)],
        "length": [lambda: cfsp.latency_table(tiny_folder, length=value)],
        "windows": [lambda: evaluate([tiny_folder], windows=value)],
        "limit": [lambda: evaluate([tiny_folder], limit=value)],
        "rounds": [lambda: evaluate([tiny_folder], speed=True, rounds=value)],
    }
    for name, made in calls.items():
        for call in made:
            with pytest.raises(CfspError, match=f"^{name} must be "):
                call()
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [1]", "unknown recipe key 'seed'"),
        ("calibration: {seed: [1]}", r"seed must be a whole number, got \[1\]"),
        ("calibration: {seqlen: 32.0}", "seqlen must be a whole number, got 32.0"),
        ("calibration: {dataset: 5}", "dataset must be text, got 5"),
        ("calibration: {dataset: }", "dataset must be text, got None"),
        ("calibration: []", "calibration must be a mapping"),
        ("width_multiple: 8.0", "width_multiple must be a whole number, got 8.0"),
        ("uniform: 'false'", "uniform must be true or false, got 'false'"),
        ("sequential: 'false'", "sequential must be true or false, got 'false'"),
        ("sequential: no it is not", "sequential must be true or false"),
        ("scorer: []", r"scorer must be text, got \[\]"),
        ("scorer: {}", r"scorer must be text, got {}"),
        ("allocator: 5", "allocator must be text, got 5"),
        ("budget: 0.5", "budget must be text, got 0.5"),
        ("sparsity: .nan", r"sparsity must be in \[0, 1\), got nan"),
        ("damping: .inf", "damping must be 0 or more, got inf"),
        ("5: 5", "unknown recipe key '5'"),
        ("- 5", "must be a mapping"),
        ("recipe: 5", "recipe must be a mapping"),
        ("sparsity: 0.3\nsparsity: 0.4", "a key is there twice"),
        ("sparsity: &a 0.3\ndamping: *a", "aliases"),
        ("[" * 3000, "nested too deep"),
    ],
)
def test_a_recipe_of_other_values_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(CfspError, match=message) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert "r.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_of_its_own_values_is_the_same() -> None:
    recipe = cfsp.Recipe(budget="params=0.25", scorer="obs", micro_batch=3)
    assert recipe_from_dict(recipe.to_dict()) == recipe
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe_from_dict({"calibration": None}) == cfsp.Recipe()


@pytest.mark.parametrize("option", ["--plan", "--recipe", "--statistics", "--latency-table"])
def test_a_fifo_or_device_is_no_document(
    option: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    prune = ("prune", tiny_folder, "--out", tmp_path / "out")
    small = () if option == "--statistics" else SMALL
    for file in (tmp_path / "fifo", Path("/dev/zero"), tmp_path / "folder"):
        code, _, error = run(capsys, *prune, *small, option, file)
        assert code == 2
        assert "not a file" in error
        assert error.count("\n") == 1


def test_a_fifo_among_the_weights_is_refused(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tiny_folder / "x.safetensors")
    code, _, error = run(capsys, "prune", tiny_folder, "--out", tmp_path / "out", *EXACT, *SMALL)
    assert code == 2
    assert "x.safetensors: it is a FIFO" in error
