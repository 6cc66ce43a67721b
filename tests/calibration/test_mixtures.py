"""Calibration on several datasets: how they are named, shared out, drawn, mixed and measured."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import cfsp
from cfsp.calibration import text
from cfsp.calibration import tokens as windowing
from cfsp.calibration.mixtures import interleaved, parse_mixture, share_out
from cfsp.calibration.windows import Calibration, calibration_tokens
from cfsp.errors import CfspError

from ..cli.test_cli import run
from ..conftest import make_tokenizer

MIXED = {"letters": "abcdefgh" * 40, "digits": "0123456789" * 50, "marks": ".,;:!?" * 60}
"""Texts without a character in common."""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the texts."""
    for name, content in MIXED.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def domain_of(window: torch.Tensor) -> str:
    """The dataset that all characters of a window are of; the tokenizer's tokens are bytes."""
    said = set(make_tokenizer().decode(window))
    (name,) = (name for name, content in MIXED.items() if said <= set(content))
    return name


@pytest.mark.parametrize(
    ("named", "meant"),
    [
        ("wikitext2", {"wikitext2": 1}),
        ("wikitext2:3", {"wikitext2": 3}),
        ("wikitext2:3,builtin:1", {"wikitext2": 3, "builtin": 1}),
        ("ptb,letters:0.5,c4", {"ptb": 1, "letters": 0.5, "c4": 1}),
        ("a,b", {"a,b": 1}),
        ("a,b:2,letters", {"a,b": 2, "letters": 1}),
        ("letters,x:7:2", {"letters": 1, "x:7": 2}),
        ("x:7", {"x:7": 1}),
        ("gone,with,c4,the:2", {"gone,with": 1, "c4": 1, "the:2": 1}),
    ],
)
def test_what_exists_is_never_split(named: str, meant: dict[str, float], files: Path) -> None:
    (files / "a,b").touch()
    (files / "x:7").touch()
    assert list(parse_mixture(named).items()) == list(meant.items())


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("", "dataset '' has an empty name"),
        ("c4,,ptb", "has an empty name"),
        ("c4,", "has an empty name"),
        ("c4,ptb,c4:2", "dataset 'c4' is named twice in 'c4,ptb,c4:2'"),
        ("c4:0,ptb", "dataset 'c4': the weight must be above 0 and finite, got 0.0"),
        ("c4,ptb:-1", "dataset 'ptb': the weight must be above 0 and finite, got -1.0"),
        ("c4:nan", "got nan"),
        ("c4:inf,ptb", "got inf"),
        (["c4", "ptb"], r"dataset must be text, got \['c4', 'ptb'\]"),
        ("c4,ptb,builtin", "samples must be 3 or more, one for each dataset of 'c4,ptb,builtin'"),
    ],
)
def test_bad_mixtures_are_refused_with_the_recipe(named: str, message: str) -> None:
    with pytest.raises(CfspError, match=message):
        cfsp.pruning.recipe.recipe_from_dict({"calibration": {"dataset": named, "samples": 2}})


def test_recovery_refuses_them_too() -> None:
    with pytest.raises(CfspError, match="'ptb': the weight must be above 0"):
        cfsp.Recovery(dataset="c4,ptb:0")


def test_windows_are_shared_out_by_weight() -> None:
    assert share_out({"a": 3, "b": 1}, 128) == {"a": 96, "b": 32}
    assert share_out({"a": 0.7, "b": 0.2, "c": 0.1}, 10) == {"a": 7, "b": 2, "c": 1}
    assert share_out({"a": 1, "b": 1, "c": 1}, 8) == {"a": 3, "b": 3, "c": 2}
    assert share_out({"a": 5, "b": 3, "c": 1}, 10) == {"a": 6, "b": 3, "c": 1}
    assert share_out({"a": 1000, "b": 1, "c": 1}, 5) == {"a": 3, "b": 1, "c": 1}
    assert share_out({"a": 1e308, "b": 1e308}, 4) == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("mixture", "windows", "counts"),
    [
        ({"a": 1e300, "b": 1e-300}, 8, [7, 1]),
        ({"a": 1e-300, "b": 1e-300, "c": 2e-300}, 8, [2, 2, 4]),
        ({"a": 5e-324, "b": 1.7e308}, 10**9, [1, 10**9 - 1]),
        ({"a": 1, "b": 2}, 10**9, [333333333, 666666667]),
    ],
)
def test_weights_and_windows_of_any_size_are_shared_out_at_once(
    mixture: dict[str, float], windows: int, counts: list[int]
) -> None:
    assert list(share_out(mixture, windows).values()) == counts


@pytest.mark.parametrize("samples", [10**6 + 1, 10**30, 10**400])
@pytest.mark.parametrize("dataset", ["builtin", "builtin:3,c4"])
def test_more_windows_than_any_text_has_are_refused(samples: int, dataset: str) -> None:
    with pytest.raises(CfspError, match=r"samples must be (at most 1000000|a whole number), got"):
        Calibration(dataset, samples)


@pytest.mark.parametrize("dataset", ["letters", "letters,digits", "letters:1e300,digits:1e-300"])
def test_samples_are_bounded_by_the_text(dataset: str, files: Path) -> None:
    """At once: a loop over so many takes minutes."""
    with pytest.raises(CfspError, match=r"samples \d+ is more than the 304 places where a window"):
        calibration_tokens(make_tokenizer(), Calibration(dataset, 10**6, 16))


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6),
    st.integers(6, 200),
)
def test_shares_add_up_and_miss_their_quota_by_less_than_a_window(
    weights: list[float], windows: int
) -> None:
    mixture = {str(number): weight for number, weight in enumerate(weights)}
    counts = share_out(mixture, windows)
    quotas = [windows * weight / sum(weights) for weight in weights]
    assert sum(counts.values()) == windows
    assert min(counts.values()) >= 1
    if min(quotas) >= 1:
        for count, quota in zip(counts.values(), quotas, strict=True):
            assert abs(count - quota) < 1 + 1e-5


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 100))
def test_the_last_windows_have_the_proportions_of_all(counts: list[int], last: int) -> None:
    order = interleaved(counts)
    assert sorted(order) == list(range(sum(counts)))
    of = [number for number, count in enumerate(counts) for _ in range(count)]
    last = min(last, len(order))
    tail = Counter(of[index] for index in order[-last:])
    for number, count in enumerate(counts):
        own = [index for index in order if of[index] == number]
        assert own == sorted(own)
        assert abs(tail[number] - last * count / len(order)) <= len(counts) / 2


def test_each_dataset_gives_what_it_gives_alone_in_even_turns(files: Path) -> None:
    tokenizer = make_tokenizer()
    settings = Calibration("letters:6,digits:3,marks:1", 100, 16, 5)
    found = calibration_tokens(tokenizer, settings)
    assert found.shape == (100, 16)
    names = [domain_of(window) for window in found]
    assert Counter(names) == {"letters": 60, "digits": 30, "marks": 10}
    assert Counter(names[-10:]) == {"letters": 6, "digits": 3, "marks": 1}
    for name, content in MIXED.items():
        own = found[[index for index, of in enumerate(names) if of == name]]
        tokens = windowing.tokenize(tokenizer, content)
        assert torch.equal(own, windowing.random_windows(tokens, len(own), 16, 5))
    again = calibration_tokens(tokenizer, settings)
    assert torch.equal(found, again)


def test_one_dataset_is_as_it_ever_was(files: Path) -> None:
    tokenizer = make_tokenizer(puts_bos=True)
    tokens = windowing.tokenize(tokenizer, text.load_text("digits", text.CALIBRATE))
    for named in ("digits", "digits:3"):
        found = calibration_tokens(tokenizer, Calibration(named, 9, 16, 3))
        assert torch.equal(found, windowing.random_windows(tokens, 9, 16, 3, bos=256))


def test_unknown_and_short_datasets_are_named(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "short").write_text("abc")
    with pytest.raises(CfspError, match="dataset 'short': the calibration text has 3 tokens"):
        calibration_tokens(make_tokenizer(), Calibration("letters,short", 4, 16))
    monkeypatch.setitem(text.DATASETS, "c4", lambda purpose: pytest.fail("read before the check"))
    with pytest.raises(CfspError, match="unknown dataset 'gone'"):
        calibration_tokens(make_tokenizer(), Calibration("c4,gone", 4, 16))


@pytest.fixture
def domains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two datasets with held-out parts, under names of the hub's."""
    for name, content in (("c4", MIXED["letters"]), ("ptb", MIXED["digits"])):
        monkeypatch.setitem(text.DATASETS, name, lambda purpose, content=content: [content])


@pytest.mark.usefixtures("domains")
def test_prune_states_the_mix_and_measures_each_dataset(
    tiny_folder: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed, error = run(
        capsys, "prune", tiny_folder, "--out", "out", "--dataset", "c4:2,ptb,marks", "--samples",
        12, "--seqlen", 16, "--width-multiple", 1, "--eval-windows", 6, "--quiet",
    )  # fmt: skip
    assert code == 0, error
    assert "(c4:2,ptb, 6 windows of 16)" in printed
    document = yaml.safe_load((files / "out" / "recipe.yaml").read_text())
    assert document["recipe"]["calibration"]["dataset"] == "c4:2,ptb,marks"
    card = (files / "out" / "README.md").read_text()
    assert "12 windows of 16 tokens of `c4` (6), `ptb` (3), `marks` (3), seed 0" in card
    after = document["result"]["perplexity_after"]
    pruned = cfsp.load(files / "out")
    for name, count in (("c4", 4), ("ptb", 2)):
        windows = cfsp.evaluation.quality.evaluation_windows(
            make_tokenizer(), name, 16, count, "auto"
        )
        alone = cfsp.perplexity(pruned, windows, progress=False)
        assert after["by_dataset"][name] == pytest.approx(alone.perplexity, rel=1e-6)
        assert "by_dataset" not in alone.to_dict()
        before = document["result"]["perplexity_before"]["by_dataset"][name]
        assert f"perplexity of {name}: {before:.2f} -> {alone.perplexity:.2f}" in printed
        assert f"| of these, `{name}` | {before:.2f} | {alone.perplexity:.2f} |" in card


@pytest.mark.usefixtures("domains")
def test_calibrate_then_prune_then_recover(
    tiny_folder: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed, _ = run(
        capsys, "calibrate", tiny_folder, "--out", "s.safetensors", "--dataset", "letters:3,digits",
        "--samples", 8, "--seqlen", 16, "--quiet", "--json",
    )  # fmt: skip
    assert (code, json.loads(printed)["tokens"]) == (0, 128)
    code, _, error = run(
        capsys, "prune", tiny_folder, "--out", "out", "--statistics", "s.safetensors",
        "--width-multiple", 1, "--eval-windows", 0, "--quiet",
    )  # fmt: skip
    assert code == 0, error
    assert "of `letters` (6), `digits` (2), seed 0" in (files / "out" / "README.md").read_text()
    code, printed, error = run(
        capsys, "recover", "out", "--out", "back", "--dataset", "c4,ptb:3", "--steps", 2,
        "--batch-size", 4, "--eval-windows", 4, "--quiet",
    )  # fmt: skip
    assert code == 0, error
    assert "(c4,ptb:3, 4 windows of 16)" in printed
    assert "perplexity of ptb: " in printed
    assert "| of these, `ptb` | " in (files / "back" / "README.md").read_text()


def test_files_alone_are_measured_on_the_text_of_python(
    tiny_folder: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["prune", tiny_folder, "--out", "out", "--samples", 4, "--seqlen", 16, "--quiet"]
    options += ["--width-multiple", 1, "--dataset", "letters,digits"]
    code, _, error = run(capsys, *options, "--eval-windows", 1, "--eval-dataset", "letters,marks")
    assert code == 2
    assert "eval_windows must be 2 or more, one for each dataset of 'letters,marks'" in error
    code, printed, error = run(capsys, *options, "--eval-windows", 1)
    assert code == 0, error
    assert "(builtin, 1 windows of 16)" in printed
    assert "perplexity of" not in printed


def test_a_dry_run_reads_no_text(
    tiny_folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(text.DATASETS, "c4", lambda purpose: pytest.fail("read"))
    code, printed, error = run(
        capsys, "prune", tiny_folder, "--dry-run", "--dataset", "c4:3,/elsewhere.txt", "--samples",
        8, "--seqlen", 16, "--width-multiple", 1, "--tflops", 1, "--json",
    )  # fmt: skip
    assert code == 0, error
    assert json.loads(printed.splitlines()[-1])["windows"] == 8
