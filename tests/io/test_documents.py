"""JSON and YAML of others: what is refused before and after it is opened, and by which words."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

from cfsp.calibration.statistics import load_statistics
from cfsp.checkpoints.documents import read_evaluation
from cfsp.costs.latency import load_table
from cfsp.errors import CfspError, shown
from cfsp.io import documents
from cfsp.io.documents import parse_json, parse_yaml, read_json, read_text, read_yaml, to_json
from cfsp.io.hashes import known_hashes, sha256_of
from cfsp.io.safetensors import read_header
from cfsp.pruning.plan_file import load_plan
from cfsp.pruning.recipe import load_recipe
from cfsp.typed import Bound, Count, between, check_whole, decode

READERS = [
    *(read_text, read_json, read_yaml, load_plan, load_recipe, load_table, load_statistics),
    *(read_evaluation, read_header, lambda path: sha256_of([path])),
]


@pytest.mark.parametrize("read", READERS)
def test_only_regular_files_are_opened(read: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # whoever opens it waits for ever
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    for name in ("fifo", "link", "/dev/zero", "/dev/null"):
        with pytest.raises(CfspError, match="it is a FIFO, socket or device, not a file"):
            read(tmp_path / name)
    with pytest.raises(CfspError, match="it is a folder, not a file"):
        read(tmp_path)
    with pytest.raises(CfspError, match="No such file"):
        read(tmp_path / "absent")


def test_a_list_of_hashes_is_a_file_too(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "SHA256SUMS")
    with pytest.raises(CfspError, match="SHA256SUMS: it is a FIFO"):
        known_hashes([tmp_path / "model.safetensors"])


def test_a_document_is_bounded_and_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x"
    file.write_text("é" * 10)
    assert read_text(file, most=20) == "é" * 10
    with pytest.raises(CfspError, match="more than the 19 bytes of a document"):
        read_text(file, most=19)
    for data, at in ((b"ab\xff", 2), (b"\xff\xfe{\0", 0), ("é".encode("latin1") + b"a", 0)):
        file.write_bytes(data)
        with pytest.raises(CfspError, match=f"it is not UTF-8, at byte {at}"):
            read_json(file)
    file.write_text(json.dumps([[]] * 20))
    monkeypatch.setattr(documents, "MAX_CONTAINERS", 20)
    with pytest.raises(CfspError, match="more than 20 lists and mappings"):
        read_json(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "nested too deep"),
        ('{"a": 1, "b": {"c": 2, "c": 3}}', "key 'c' is there twice"),
        ('{"a": 1, "a": 1}', "key 'a' is there twice"),
        ("[NaN]", "not a finite number"),
        ("[-Infinity]", "not a finite number"),
        ("[1e400]", "1e400 is not a finite number"),
        ("[-0]", "-0 is not a whole number"),
        ("[" + "9" * 5000 + "]", "Exceeds the limit"),
        ('["\\ud800"]', "surrogates not allowed"),
        ('{"\\uDFFF": 1}', "surrogates not allowed"),
        ("\ufeff{}", "BOM"),
        ("{} {}", "Extra data"),
        ("", "Expecting value"),
    ],
)
def test_json_that_other_parsers_read_otherwise_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_of_transformers_may_have_infinity(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    found = read_json(tmp_path / "config.json", finite=False)
    assert found == {"time_step_limit": [0.0, math.inf]}
    with pytest.raises(CfspError, match="Infinity is not a finite number"):
        read_json(tmp_path / "config.json")


def test_json_of_every_kind_is_read() -> None:
    text = '{"a": [1, -2, 0.5, 1e3, true, null, "\\u00e9\\ud83d\\ude00"], "": {}}'
    assert parse_json(text) == {"a": [1, -2, 0.5, 1000.0, True, None, "é😀"], "": {}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000, "nested too deep"),
        ("a: {b: 1, b: 2}", "a key is there twice"),
        ("a: 1\na: 2", "a key is there twice"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: &x {b: *x}", "aliases"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: [1", "expected"),
        ("a: 1:99999999999999999999e", ""),
        ("? [a]\n: 1", "unhashable"),
        ("!!int x", "invalid literal"),
    ],
)
def test_yaml_is_plain(text: str, message: str) -> None:
    if not message:  # a text, since it is no number
        assert isinstance(parse_yaml(text)["a"], str)
        return
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)


def test_what_is_there_twice_is_written_twice() -> None:
    part = {"b": [1, 2]}
    assert parse_yaml(documents.to_yaml({"x": part, "y": part})) == {"x": part, "y": part}


def test_json_that_is_written_has_no_nan() -> None:
    values = {"a": math.nan, "b": [math.inf, (1.5, -math.inf)], "c": {"d": 1}, "e": None}
    known = {"a": None, "b": [None, [1.5, None]], "c": {"d": 1}, "e": None}
    assert parse_json(to_json(values)) == known
    assert parse_json(to_json(values, 1)) == known


@dataclass(frozen=True)
class Part:
    size: Annotated[int, between(1, 96)]
    share: float = 0.0


@dataclass(frozen=True)
class Whole:
    name: str
    parts: Annotated[tuple[Part, ...], Bound("of 1 or more parts", len)]
    pair: tuple[int, str] = (0, "")
    on: bool = False
    known: dict[str, Count] | None = None


def test_a_document_is_taken_apart_by_annotations() -> None:
    part = {"size": 96, "share": 1}
    values = {"name": "x", "parts": [part], "pair": [2, "b"], "known": {"n": 3}}
    assert decode(Whole, values) == Whole("x", (Part(96, 1.0),), (2, "b"), known={"n": 3})
    assert type(decode(Whole, values).parts[0].share) is float
    assert decode(Whole, {**values, "known": None}).known is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 5}, "doc: name must be text, got 5"),
        ({"name": "a\0"}, "doc: name must be text in UTF-8"),
        ({"name": "\ud800"}, "doc: name must be text in UTF-8"),
        ({"parts": []}, r"doc: parts must be of 1 or more parts, got \[\]"),
        ({"parts": {}}, r"doc: parts must be a list, got {}"),
        ({"parts": "ab"}, r"doc: parts must be a list, got 'ab'"),
        ({"parts": [{"size": 1}, {"size": 97}]}, r"doc: parts\[1\].size must be in \[1, 96\], g"),
        ({"parts": [{"size": 1.0}]}, r"doc: parts\[0\].size must be a whole number, got 1.0"),
        ({"parts": [{"size": True}]}, r"doc: parts\[0\].size must be a whole number, got True"),
        ({"parts": [{"size": 2**64}]}, r"doc: parts\[0\].size must be a whole number, got 1844"),
        ({"parts": [{"size": 1, "share": math.inf}]}, r"share must be a finite number, got inf"),
        ({"parts": [{"size": 1, "share": 10**400}]}, r"share must be a finite number, got a num"),
        ({"parts": [{"size": 1, "share": "1"}]}, r"share must be a number, got '1'"),
        ({"parts": [{}]}, r"doc: parts\[0\].size is missing"),
        ({"parts": [{"size": 1, "x": 1}]}, r"doc: parts\[0\] has the unknown key 'x'; valid: s"),
        ({"pair": [1]}, r"doc: pair must be a list of 2, got \[1\]"),
        ({"pair": [1, 2]}, r"doc: pair\[1\] must be text, got 2"),
        ({"on": "false"}, "doc: on must be true or false, got 'false'"),
        ({"on": 1}, "doc: on must be true or false, got 1"),
        ({"known": {"a": 0}}, r"doc: known.a must be in \[1, 2147483647\], got 0"),
        ({"known": {1: 1}}, "doc: known must be a mapping of texts"),
        ({"other": 1}, "doc: it has the unknown key 'other'"),
    ],
)
def test_the_place_of_a_wrong_value_is_told(changes: dict[str, Any], message: str) -> None:
    values = {"name": "x", "parts": [{"size": 1}], **changes}
    with pytest.raises(CfspError, match=message):
        decode(Whole, values, "doc")


def test_values_in_errors_are_short() -> None:
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    for value in ("x" * 10**6, deep, list(range(10**5)), 10**5000, {"a" * 5000: "b" * 5000}):
        assert len(shown(value)) < 300


def test_a_count_of_a_call_is_checked() -> None:
    check_whole("windows", 0)
    check_whole("windows", 2**31 - 1)
    for value, message in (
        (-1, "windows must be 0 or more, got -1"),
        (1e30, "windows must be a whole number, got 1e"),
        (10**30, "windows must be a whole number, got 1000"),
        (2**31, "windows must be at most 2147483647, got 2147483648"),
        (True, "windows must be a whole number, got True"),
        ("5", "windows must be a whole number, got '5'"),
        (math.nan, "windows must be a whole number, got nan"),
    ):
        with pytest.raises(CfspError, match=message):
            check_whole("windows", value)
