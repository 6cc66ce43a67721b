"""Safetensors files: what is read, what is refused, and what the writer promises."""

import errno
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cfsp.errors import CfspError
from cfsp.io import shard_writer
from cfsp.io.safetensors import TensorInfo, first_values, read_header, read_index, read_tensors
from cfsp.io.shard_writer import Shard, ShardWriter, pack_shards, write_index

TENSORS = {
    "odd": torch.arange(7, dtype=torch.float32).to(torch.bfloat16),
    "wide": torch.arange(12, dtype=torch.float64).view(3, 4),
    "matrix": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
}


def infos(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def write_all(
    folder: Path, planned: tuple[Shard, ...], tensors: dict[str, torch.Tensor], names: list[str]
) -> None:
    with ShardWriter(folder, planned) as writer:
        for name in names:
            writer.write(name, tensors[name])


def write(folder: Path, tensors: dict[str, torch.Tensor], max_bytes: int = 10**9) -> list[str]:
    """Write in reverse order; returns the file names."""
    folder.mkdir(exist_ok=True)
    planned = pack_shards(infos(tensors), max_bytes)
    write_all(folder, planned, tensors, list(reversed(tensors)))
    write_index(folder, planned)
    return sorted(path.name for path in folder.iterdir())


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        value.dtype == expected[name].dtype and torch.equal(value, expected[name])
        for name, value in found.items()
    )


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    assert write(tmp_path / "one", TENSORS) == ["model.safetensors"]
    assert equal(load_file(tmp_path / "one" / "model.safetensors"), TENSORS)
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert equal(read_tensors(read_index(tmp_path)), TENSORS)


@pytest.mark.parametrize("max_bytes", [1, 60, 100, 10**9])
def test_shards_are_filled_in_order_and_read_through_the_index(
    max_bytes: int, tmp_path: Path
) -> None:
    write(tmp_path / "m", TENSORS, max_bytes)
    planned = pack_shards(infos(TENSORS), max_bytes)
    order = list(TENSORS)
    where = [number for name in order for number, s in enumerate(planned) if name in s.tensors]
    assert where == sorted(where)
    assert all(shard.nbytes <= max_bytes or len(shard.tensors) == 1 for shard in planned)
    assert equal(read_tensors(read_index(tmp_path / "m")), TENSORS)
    for shard in planned:
        assert equal(load_file(tmp_path / "m" / shard.name), {n: TENSORS[n] for n in shard.tensors})
    if len(planned) > 1:
        index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())


def test_large_tensors_take_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "MAX_CALL_BYTES", 5)
    write(tmp_path / "m", TENSORS)
    assert equal(read_tensors(read_index(tmp_path / "m")), TENSORS)


def test_first_values_are_those_of_the_first_row(tmp_path: Path) -> None:
    write(tmp_path / "m", TENSORS)
    stored = read_index(tmp_path / "m")["matrix"]
    assert torch.equal(first_values(stored, 2), TENSORS["matrix"][0, :2])
    assert torch.equal(first_values(stored, 100), TENSORS["matrix"][0])


def bad_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its header of 0 bytes is not there"),
        (b"\xff" * 64, "its header of 18446744073709551615 bytes is not there"),
        (struct.pack("<Q", 100) + b"{}", "its header of 100 bytes is not there"),
        (bad_header(b"{x"), "bad header"),
        (bad_header(b"\xff\xfe"), "bad header"),
        (bad_header([1]), "bad header"),
        (bad_header({"a": 1}), "bad header"),
        (bad_header({"a": {"dtype": "F32"}}), "bad header"),
        (bad_header({"a": {**ENTRY, "shape": [3]}}, b"x" * 8), "offsets 0 to 8 for shape"),
        (bad_header({"a": ENTRY}, b"x" * 7), "bytes, its header speaks of"),
        (bad_header({"a": ENTRY}, b"x" * 9), "bytes, its header speaks of"),
    ],
)
def test_a_corrupt_shard_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CfspError, match=r"model\.safetensors is corrupt: ") as refused:
        read_header(tmp_path / "model.safetensors")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path: Path) -> None:
    names = write(tmp_path, TENSORS, 60)
    index = tmp_path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["more"] = names[0]
    index.write_text(json.dumps(document))
    with pytest.raises(CfspError, match=f"{names[0]} lacks more"):
        read_index(tmp_path)
    (tmp_path / names[0]).unlink()
    with pytest.raises(CfspError, match=f"cannot read .*{names[0]}"):
        read_index(tmp_path)
    index.write_text("{")
    with pytest.raises(CfspError, match=r"cannot read .*index\.json: Expecting property name"):
        read_index(tmp_path)


def test_a_shard_cut_short_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    index = read_index(tmp_path)
    os.truncate(tmp_path / "model.safetensors", index["flags"].start)
    with pytest.raises(CfspError, match=r"model\.safetensors is corrupt: it ends at byte"):
        read_tensors(index)


def test_a_full_disk_is_found_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def full(descriptor: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(os, "pwrite", lambda *args: written.append(1))
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "m", TENSORS)
    assert not written
    assert not list((tmp_path / "m").iterdir())


def test_an_error_leaves_finished_shards_only(tmp_path: Path) -> None:
    planned = pack_shards(infos(TENSORS), 100)
    first, second, *_ = planned[2].tensors
    wrong = {**TENSORS, second: torch.zeros(99)}
    with pytest.raises(RuntimeError, match="planned was"):
        write_all(tmp_path, planned, wrong, [*planned[0].tensors, first, second])
    assert [path.name for path in tmp_path.iterdir()] == [planned[0].name]


def test_a_forgotten_tensor_is_a_defect(tmp_path: Path) -> None:
    planned = pack_shards(infos(TENSORS), 10**9)
    with pytest.raises(RuntimeError, match="never written: wide"):
        write_all(tmp_path, planned, TENSORS, [name for name in TENSORS if name != "wide"])
    assert not list(tmp_path.iterdir())


def test_the_file_mode_is_what_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "m", TENSORS)
    finally:
        os.umask(before)
    assert (tmp_path / "m" / "model.safetensors").stat().st_mode & 0o777 == 0o640
