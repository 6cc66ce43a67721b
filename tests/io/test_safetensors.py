"""Headers and indexes by the rules of the format; values that are not finite."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cfsp.errors import CfspError
from cfsp.io.safetensors import (
    DTYPES,
    check_finite,
    open_header,
    read_header,
    read_index,
    read_tensors,
)

HEADER: dict[str, Any] = {
    "gate": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "up": {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 48]},
    "__metadata__": {"format": "pt"},
}


def write(file: Path, header: dict[str, Any] | str, nbytes: int = 48) -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    data = text.encode(errors="surrogateescape")
    file.write_bytes(struct.pack("<Q", len(data)) + data + bytes(range(nbytes)))
    return file


def gate(**changes: Any) -> dict[str, Any]:
    return {**HEADER, "gate": {**HEADER["gate"], **changes}}


def test_a_good_header_is_read(tmp_path: Path) -> None:
    found = open_header(write(tmp_path / "x", HEADER))
    assert found.metadata == {"format": "pt"}
    assert {name: info.shape for name, info in found.tensors.items()} == {
        "gate": (2, 3),
        "up": (2, 3),
    }
    empty = {"e": {"dtype": "I8", "shape": [0, 5], "data_offsets": [24, 24]}, **HEADER}
    assert read_header(write(tmp_path / "x", empty))["e"].numel == 0
    assert read_header(write(tmp_path / "x", {}, 0)) == {}


SAFETENSORS_REFUSES = {
    "overlap": gate(data_offsets=[24, 48]),
    "gap": {**HEADER, "up": {**HEADER["up"], "data_offsets": [28, 52]}},
    "not from 0": gate(data_offsets=[4, 28]),
    "end beyond": {**HEADER, "more": {"dtype": "F32", "shape": [2], "data_offsets": [48, 56]}},
    "end before": {key: value for key, value in HEADER.items() if key != "up"},
    "negative offsets": gate(data_offsets=[-24, 0]),
    "turned offsets": gate(data_offsets=[24, 0]),
    "offsets as text": gate(data_offsets=["0", "24"]),
    "offsets as floats": gate(data_offsets=[0.0, 24.0]),
    "three offsets": gate(data_offsets=[0, 24, 48]),
    "negative sizes": gate(shape=[-2, -3]),
    "sizes as floats": gate(shape=[2.0, 3.0]),
    "sizes as text": gate(shape=["2", "3"]),
    "sizes as booleans": gate(shape=[True, 6]),
    "size of another number": gate(shape=[2, 4]),
    "no list of sizes": gate(shape=6),
    "sizes that overflow": gate(shape=[2**62, 4, 0], data_offsets=[0, 0]),
    "minus zero": json.dumps(HEADER).replace("[0, 24]", "[-0, 24]"),
    "unknown dtype": gate(dtype="F33"),
    "dtype as a number": gate(dtype=32),
    "no dtype": {**HEADER, "gate": {"shape": [2, 3], "data_offsets": [0, 24]}},
    "metadata of numbers": {**HEADER, "__metadata__": {"format": 1}},
    "metadata as text": {**HEADER, "__metadata__": "pt"},
    "a list": json.dumps([HEADER]),
    "a name that is half a pair": json.dumps(HEADER).replace("gate", "\\ud800"),
    "not UTF-8": json.dumps(HEADER).replace("gate", "\udcff"),
    "deep": "[" * 100_000,
    "NaN": json.dumps(HEADER).replace("24]", "NaN]"),
    "no JSON": json.dumps(HEADER)[:-1],
    "UTF-16": "\ufeff" + json.dumps(HEADER),
}


@pytest.mark.parametrize("kind", SAFETENSORS_REFUSES)
def test_what_safetensors_refuses_is_refused(kind: str, tmp_path: Path) -> None:
    file = write(tmp_path / "x", SAFETENSORS_REFUSES[kind])
    with pytest.raises(SafetensorError), safe_open(file, "pt") as opened:
        opened.keys()
    with pytest.raises(CfspError, match=r"x is corrupt|x holds tensors of type") as caught:
        read_header(file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "header",
    [
        json.dumps(HEADER)[:-1] + ', "gate": ' + json.dumps(HEADER["up"]) + "}",
        json.dumps(HEADER).replace('"dtype"', '"dtype": "F32", "dtype"'),
        json.dumps(HEADER).replace('"format"', '"format": "pt", "format"'),
        json.dumps(gate(more=1)),
        " " + json.dumps(HEADER),
        json.dumps({**HEADER, "gate": ["F32", [2, 3], [0, 24]]}),
    ],
)
def test_what_safetensors_lets_pass_without_a_word_is_refused_too(
    header: str, tmp_path: Path
) -> None:
    with pytest.raises(CfspError, match="is corrupt: bad header"):
        read_header(write(tmp_path / "x", header))


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_readable(name: str, tmp_path: Path) -> None:
    tensor = torch.arange(16, dtype=torch.uint8).view(
        DTYPES[name] if name != "BOOL" else torch.int8
    )
    tensor = tensor.to(torch.bool) if name == "BOOL" else tensor
    save_file({"x": tensor}, tmp_path / "x")
    found = read_tensors(read_header(tmp_path / "x"))["x"]
    assert found.dtype == tensor.dtype
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of two shards, beside a file that no index should reach."""
    folder = tmp_path / "m"
    folder.mkdir()
    for number in (1, 2):
        save_file({f"t{number}": torch.ones(number)}, folder / f"model-{number}.safetensors")
    save_file({"t2": torch.zeros(2)}, tmp_path / "x.safetensors")
    index = {f"t{number}": f"model-{number}.safetensors" for number in (1, 2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "model.safetensors.index.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "{parent}/x.safetensors", "..", "", ".", "a/../b", "a\nb", "a\0", 5, None],
)
def test_an_index_names_files_of_its_folder_alone(name: Any, sharded: Path) -> None:
    if isinstance(name, str):
        name = name.format(parent=sharded.parent)
    edit(sharded, lambda document: document["weight_map"].update(t2=name))
    with pytest.raises(CfspError, match=r"weight_map.t2 must be (the name of a file|text)"):
        read_index(sharded)


def test_shards_may_be_links_as_in_the_cache_of_the_hub(sharded: Path) -> None:
    os.replace(sharded / "model-2.safetensors", sharded.parent / "blob")
    (sharded / "model-2.safetensors").symlink_to(sharded.parent / "blob")
    assert read_index(sharded)["t2"].shape == (2,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["weight_map"].pop("t1"), None),
        (lambda d: d["weight_map"].update(t3="model-2.safetensors"), "lacks t3, which .* says"),
        (lambda d: d["weight_map"].update(t1="model-2.safetensors"), "lacks t1, which .* says"),
        (lambda d: d.update(weight_map=[]), "weight_map must be a mapping"),
        (lambda d: d.pop("weight_map"), "weight_map is missing"),
        (lambda d: d["weight_map"].update(t1="absent.safetensors"), "cannot read .*absent"),
    ],
)
def test_index_and_shards_hold_the_same(
    change: Callable[[dict[str, Any]], Any], message: str | None, sharded: Path
) -> None:
    edit(sharded, change)
    if message is None:  # no tensor of that shard is named, so that it is not read
        assert read_index(sharded).keys() == {"t2"}
        return
    with pytest.raises(CfspError, match=message):
        read_index(sharded)


def test_a_tensor_that_the_index_does_not_name_is_refused(sharded: Path) -> None:
    for more in ("t3", "t1"):  # t1 is in the other shard too
        save_file({"t2": torch.ones(2), more: torch.ones(1)}, sharded / "model-2.safetensors")
        with pytest.raises(CfspError, match=f"model-2.safetensors holds {more}, which .* does not"):
            read_index(sharded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(dtype: torch.dtype, value: float) -> None:
    good = torch.full((300, 300), 60000.0).to(dtype)  # whose sum half precision cannot hold
    check_finite("block 0", {"good": good, "ids": torch.ones(3, dtype=torch.int64)})
    check_finite("block 0", {})
    bad = good.clone()
    bad[299, 7] = value
    with pytest.raises(CfspError, match="block 0: bad holds NaN or infinite values"):
        check_finite("block 0", {"good": good, "bad": bad})


def test_a_sum_that_is_too_large_is_no_fault() -> None:
    check_finite("block 0", {"large": torch.full((10,), 3e38)})
    with pytest.raises(CfspError, match="large holds NaN"):
        check_finite("block 0", {"large": torch.tensor([3e38, 3e38, float("inf")])})
