"""Safetensors files, written whole.

Their layout follows from names, shapes and dtypes alone, so that equal tensors give equal bytes
wherever they come from, and is known before the first tensor is.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .files import sync
from .memory import memory_of
from .safetensors import DTYPES, INDEX_FILE, WEIGHTS_FILE, TensorInfo

MAX_SHARD_BYTES = 5_000_000_000
MAX_CALL_BYTES = 1 << 30  # Linux moves at most 2 GiB per call
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """One file to write: its tensors in the order in which they lie in it."""

    name: str
    tensors: dict[str, TensorInfo]

    def header(self) -> bytes:
        """Length, JSON and padding: everything before the first value."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, info in self.tensors.items():
            entries[name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.nbytes],
            }
            offset += info.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the file."""
        return len(self.header()) + self.nbytes


def pack_shards(tensors: Mapping[str, TensorInfo], max_bytes: int) -> tuple[Shard, ...]:
    """Fill shards of at most ``max_bytes`` of values in the order given; a larger tensor has one
    of its own. Within a shard wider dtypes come first, so that every tensor is aligned."""
    groups: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in tensors.items():
        if groups[-1] and filled + info.nbytes > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = info
        filled += info.nbytes
    names = [WEIGHTS_FILE]
    if len(groups) > 1:
        numbers = range(1, len(groups) + 1)
        names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in numbers]
    return tuple(
        Shard(name, dict(sorted(group.items(), key=lambda item: -item[1].dtype.itemsize)))
        for name, group in zip(names, groups, strict=True)
    )


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write the index of several shards; one file has none."""
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
            "weight_map": {name: shard.name for shard in shards for name in shard.tensors},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def finished_shards(folder: Path, shards: Iterable[Shard]) -> frozenset[str]:
    """Names of the planned shards that are in a folder whole: they are renamed when they are."""
    found = set()
    for shard in shards:
        file, header = folder / shard.name, shard.header()
        if file.is_file() and file.stat().st_size == len(header) + shard.nbytes:
            with file.open("rb") as stream:
                if stream.read(len(header)) == header:
                    found.add(shard.name)
    return frozenset(found)


class _OpenShard:
    """A shard being filled: its space is reserved before the first byte is written."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.path = folder / shard.name
        self.temporary = folder / f".{shard.name}.tmp"
        self.left = set(shard.tensors)
        header = shard.header()
        self.starts: dict[str, int] = {}
        end = len(header)
        for name, info in shard.tensors.items():
            self.starts[name] = end
            end += info.nbytes
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        self.descriptor = os.open(self.temporary, flags, 0o666)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.descriptor, 0, end)
            else:  # macOS: a full disk is found later
                os.ftruncate(self.descriptor, end)
            self._write(header, 0)
        except OSError:
            self.abandon()
            raise

    def _write(self, data: bytes | memoryview, start: int) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            part = view[done : done + MAX_CALL_BYTES]
            done += os.pwrite(self.descriptor, part, start + done)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        data, start = memory_of(tensor.detach().cpu().contiguous()), self.starts[name]
        self._write(data, start)
        if hasattr(os, "posix_fadvise"):  # Linux then begins to write at once, not at the fsync
            os.posix_fadvise(self.descriptor, start, len(data), os.POSIX_FADV_DONTNEED)
        self.left.remove(name)

    def finish(self) -> None:
        os.fsync(self.descriptor)
        os.close(self.descriptor)
        os.replace(self.temporary, self.path)
        sync(self.path.parent)

    def abandon(self) -> None:
        os.close(self.descriptor)
        self.temporary.unlink(missing_ok=True)


class ShardWriter:
    """Writes the tensors of planned shards, in any order; a shard has its name when it is whole.
    Unfinished ones vanish on the way out of an error; those in ``others`` are not written."""

    def __init__(
        self,
        folder: Path,
        shards: Iterable[Shard],
        others: frozenset[str] = frozenset(),
        finished: Callable[[Path], None] = lambda file: None,
    ) -> None:
        self.folder = folder
        self.others = others
        self.finished = finished
        self.shard_of = {name: shard for shard in shards for name in shard.tensors}
        self.open: dict[str, _OpenShard] = {}
        self.closed = 0
        """Shards finished by this writer."""

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        unfinished = sorted(name for shard in self.open.values() for name in shard.left)
        for shard in self.open.values():
            shard.abandon()
        self.open.clear()
        if kind is None and unfinished:
            raise RuntimeError(f"tensors that were never written: {', '.join(unfinished[:3])}")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its place; the last of a shard finishes it. Raises OSError before the
        first byte of a shard that there is no space for."""
        shard = self.shard_of[name]
        planned, given = shard.tensors[name], TensorInfo(tensor.dtype, tuple(tensor.shape))
        if planned != given:
            raise RuntimeError(f"{name} is {given}, planned was {planned}")
        if shard.name in self.others:
            return
        if shard.name not in self.open:
            self.open[shard.name] = _OpenShard(self.folder, shard)
        current = self.open[shard.name]
        current.write(name, tensor)
        if not current.left:
            del self.open[shard.name]
            current.finish()
            self.finished(current.path)
            self.closed += 1
