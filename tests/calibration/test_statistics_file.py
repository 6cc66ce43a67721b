"""A statistics file: its checksum, and what is refused of its header and its values."""

import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cfsp
from cfsp.calibration import statistics as module
from cfsp.calibration.statistics import (
    Statistics,
    load_statistics,
    save_statistics,
    statistics_fingerprint,
)
from cfsp.errors import CfspError

from ..conftest import TEXT, make_tiny, make_tokenizer

RECIPE = cfsp.Recipe(
    scorer="obs",
    width_multiple=1,
    calibration=cfsp.Calibration(dataset=TEXT, samples=4, seqlen=32),
)


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    """With scores and error curves."""
    return cfsp.calibrate(make_tiny(), make_tokenizer(), RECIPE, progress=False)


@pytest.fixture
def file(statistics: Statistics, tmp_path: Path) -> Path:
    save_statistics(statistics, tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def header_of(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["cfsp"])


def rewrite(
    file: Path,
    header: dict[str, Any] | str | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> None:
    text = header if isinstance(header, str) else json.dumps(header or header_of(file))
    save_file(tensors or load_file(file), file, metadata={"cfsp": text})


@pytest.fixture
def unsigned(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Have the checksum of a file be right, whatever the file holds."""

    def sign(file: Path) -> None:
        told = header_of(file)["sha256"]
        monkeypatch.setattr(module, "statistics_fingerprint", lambda _: told)

    return sign


def test_everything_comes_back(statistics: Statistics, file: Path) -> None:
    back = load_statistics(file)
    assert statistics_fingerprint(back) == statistics_fingerprint(statistics)
    assert back.provenance == json.loads(json.dumps(statistics.provenance))
    assert [b.units for b in back.blocks] == [b.units for b in statistics.blocks]
    assert [b.expert_tokens for b in back.blocks] == [b.expert_tokens for b in statistics.blocks]
    (ranking,) = back.rankings
    assert ranking.made_by == statistics.rankings[0].made_by
    assert len(ranking.scores) == len(ranking.curves) == 4


@pytest.mark.parametrize("name", ["sum", "sum_of_squares", "influence", "scores", "errors"])
def test_one_value_changed_is_found(name: str, file: Path) -> None:
    tensors = load_file(file)
    key = next(key for key in sorted(tensors) if key.endswith(f".{name}"))
    tensors[key][1] *= 1 + 2**-50
    rewrite(file, tensors=tensors)
    with pytest.raises(CfspError, match="its checksum does not match: damaged"):
        load_statistics(file)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["tokens"].__setitem__(0, 127),
        lambda header: header["windows"].__setitem__(3, 5),
        lambda header: header["expert_tokens"].__setitem__(0, []),
        lambda header: header["provenance"].update(model="other"),
        lambda header: header["provenance"]["calibration"].update(seed=1),
        lambda header: header["rankings"][0].__setitem__(2, 0.5),
        lambda header: header.update(model_fingerprint="0" * 64),
        lambda header: header.update(sha256="0" * 64),
    ],
)
def test_one_word_of_the_header_changed_is_found(
    change: Callable[[dict[str, Any]], Any], file: Path
) -> None:
    header = header_of(file)
    change(header)
    rewrite(file, header)
    with pytest.raises(CfspError, match="its checksum does not match: damaged"):
        load_statistics(file)


HEADERS: list[tuple[str, Any, str]] = [
    ("tokens", [0, 128, 128, 128], r"tokens\[0\] must be 1 or more, got 0"),
    ("tokens", [-128] * 4, r"tokens\[0\] must be 1 or more, got -128"),
    ("tokens", [128.0] * 4, r"tokens\[0\] must be a whole number, got 128.0"),
    ("tokens", [True] * 4, r"tokens\[0\] must be a whole number, got True"),
    ("tokens", [], "tokens must be of 1 or more blocks"),
    ("tokens", [128] * 3, "windows are not of 3 blocks"),
    ("windows", [0] * 4, r"windows\[0\] must be in \[1, 2147483647\], got 0"),
    ("windows", "4444", "windows must be a list, got '4444'"),
    ("windows", None, "windows must be a list, got None"),
    ("units", [[[47, 1, 1]]] * 4, r"tensor block.0000.sum must be torch.float64 \[47\]"),
    ("units", [[[48, 10**6, 1]]] * 4, r"expert_tokens\[0\] are not of|of 134217728 channels"),
    ("units", [[[48, 1]]] * 4, r"units\[0\]\[0\] must be a list of 3"),
    ("units", [[]] * 4, "units must be of 1 or more FFNs"),
    ("units", [[], *[[[48, 1, 1]]] * 3], r"expert_tokens\[0\] are not of \(\)"),
    ("expert_tokens", [[-1]] * 4, r"expert_tokens\[0\]\[0\] must be 0 or more"),
    ("expert_tokens", [[1, 2]] * 4, r"expert_tokens\[0\] are not of"),
    ("rankings", [["obs", "none"]], r"rankings\[0\] must be a list of 3"),
    ("rankings", [["obs", "none", "x"]], r"rankings\[0\]\[2\] must be a number"),
    ("rankings", [], "tensor 'ranking.0000.00000.errors' is of no block"),
    ("rankings", [["obs", "none", 0.1]] * 2, "tensor ranking.0001.00000.scores must be"),
    ("influence_metrics", ["mse"], "influence_metrics must be angular, cosine"),
    ("model_fingerprint", 5, "model_fingerprint must be text, got 5"),
    ("provenance", None, "provenance must be a mapping of texts, got None"),
    ("provenance", [], "provenance must be a mapping of texts"),
    ("provenance", {"calibration": {"seed": None}, "windows": 4}, "seed must be a whole number"),
    ("provenance", {"calibration": {"sead": 1}, "windows": 4}, "unknown key 'sead'"),
    ("provenance", {"calibration": {"samples": 0}, "windows": 4}, "samples must be 1 or more"),
    ("provenance", {"calibration": 5, "windows": 4}, "calibration must be a mapping"),
    ("provenance", {"calibration": {}}, "provenance.windows is missing"),
    ("provenance", {"tokens_sha256": "0"}, "provenance.windows is missing"),
    ("provenance", {"windows": "4"}, "provenance.windows must be a whole number"),
    ("sha256", 5, "sha256 must be text, got 5"),
    ("more", 5, "it has the unknown key 'more'"),
    ("format", "cfsp-statistics-4", r"got 'cfsp-statistics-4'\); calibrate again"),
    ("format", "cfsp-statistics-3", r"got 'cfsp-statistics-3'\); calibrate again"),
    ("format", "cfsp-statistics-2", r"got 'cfsp-statistics-2'\); calibrate again"),
    ("format", 4, r"not a statistics file of this version \(cfsp-statistics-5, got 4\)"),
]


@pytest.mark.parametrize(("key", "value", "message"), HEADERS)
def test_a_header_of_other_values_is_refused(
    key: str, value: Any, message: str, file: Path, unsigned: Callable[[Path], None]
) -> None:
    unsigned(file)
    rewrite(file, {**header_of(file), key: value})
    with pytest.raises(CfspError, match=message) as caught:
        load_statistics(file)
    assert str(caught.value).startswith(f"cannot read statistics {file}: ")


@pytest.mark.parametrize("key", ["tokens", "units", "provenance", "model_fingerprint", "sha256"])
def test_a_header_without_a_key_is_refused(key: str, file: Path) -> None:
    header = header_of(file)
    del header[key]
    rewrite(file, header)
    with pytest.raises(CfspError, match=f"{key} is missing"):
        load_statistics(file)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "5", "[" * 100_000, '{"format": "x", "format": 1}']
)
def test_a_header_that_is_no_mapping_is_refused(text: str, file: Path) -> None:
    rewrite(file, text)
    with pytest.raises(CfspError, match=r"not a statistics file of this version|bad header"):
        load_statistics(file)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("block.0001.sum", math.nan, "block.0001.sum must be finite"),
        ("block.0001.sum", -math.inf, "block.0001.sum must be finite"),
        ("block.0002.sum_of_squares", -1.0, "sum_of_squares must be finite and 0 or more"),
        ("block.0002.sum_of_squares", math.inf, "sum_of_squares must be finite and 0 or more"),
        ("block.0003.influence", math.nan, "influence must be finite"),
        ("ranking.0000.00000.scores", math.nan, "scores must be without NaN"),
        ("ranking.0000.00003.errors", math.inf, "errors must be finite"),
        ("ranking.0000.00003.widths", 48, "widths must be ascending from 0 to 48"),
        ("ranking.0000.00003.widths", -1, "widths must be ascending from 0 to 48"),
    ],
)
def test_values_that_no_calibration_makes_are_refused(
    name: str, value: float, message: str, file: Path, unsigned: Callable[[Path], None]
) -> None:
    unsigned(file)
    tensors = load_file(file)
    tensors[name][1] = value
    rewrite(file, tensors=tensors)
    with pytest.raises(CfspError, match=message):
        load_statistics(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("block.0001.sum"), "block.0001.sum must be .* got none"),
        (lambda t: t.update(more=torch.zeros(2)), "tensor 'more' is of no block or ranking"),
        (lambda t: t.update({"block.0001.sum": torch.zeros(48)}), "got torch.float32"),
        (
            lambda t: t.update({"block.0001.sum": torch.zeros(6, 8).double()}),
            r"got torch.float64 \[6, 8\]",
        ),
        (
            lambda t: t.update({"ranking.0000.00001.errors": torch.zeros(3).double()}),
            "ranking.0000.00001.errors must be",
        ),
        (lambda t: t.pop("ranking.0000.00002.widths"), "00002.widths must be .* got none"),
    ],
)
def test_tensors_are_those_of_the_header(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, file: Path
) -> None:
    tensors = load_file(file)
    change(tensors)
    rewrite(file, tensors=tensors)
    with pytest.raises(CfspError, match=message):
        load_statistics(file)


def test_what_could_not_be_read_again_is_not_written(
    statistics: Statistics, tmp_path: Path
) -> None:
    block = replace(statistics.blocks[0], sum=torch.full((48,), math.nan, dtype=torch.float64))
    broken = replace(statistics, blocks=(block, *statistics.blocks[1:]))
    with pytest.raises(CfspError, match=r"block\.0000\.sum must be finite"):
        save_statistics(broken, tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_a_byte_of_the_file_changed_is_found(file: Path) -> None:
    """Wherever it is: in the format's header, in ours, or in the values."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    inner = re.search(rb"provenance", data)
    assert inner is not None
    places = [0, 7, 9, inner.end() + 30, 8 + length, 8 + length + 7, len(data) - 1]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1
        file.write_bytes(changed)
        with pytest.raises(CfspError, match="cannot read statistics"):
            load_statistics(file)
