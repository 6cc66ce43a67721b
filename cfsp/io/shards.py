"""Safetensors files: headers read once, tensors read where they are needed, shards written whole.

The layout of what is written follows from names, shapes and dtypes alone, so that equal tensors
give equal bytes wherever they came from, and is known before the first tensor is.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..errors import CfspError
from .arena import mapped_bytes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAPPED_BYTES = 1 << 20
MAX_CALL_BYTES = 1 << 30  # Linux moves at most 2 GiB per call
READ_BYTES = 32 << 20  # per call, so that threads share one matrix
READERS = min(8, os.cpu_count() or 1)  # a fast disk wants several requests at a time

Room = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
"""(shape, dtype) -> a tensor to fill."""


@dataclass(frozen=True)
class TensorInfo:
    """What a tensor is, without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """Where a tensor lies on disk."""

    file: Path
    start: int
    """First byte of the values, from the start of the file."""


def _entry(file: Path, base: int, entry: dict[str, Any]) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise CfspError(f"{file} holds tensors of type {entry['dtype']}, which is not supported")
    start, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    tensor = StoredTensor(DTYPES[entry["dtype"]], shape, file, base + start)
    if start < 0 or tensor.nbytes != end - start:
        raise ValueError(f"offsets {start} to {end} for shape {list(shape)}")
    return tensor


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Name -> place of every tensor of a safetensors file.

    Raises:
        CfspError: unreadable, truncated, or not a safetensors file; names it.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
                raise CfspError(f"{file} is corrupt: its header of {length} bytes is not there")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        base = 8 + length
        tensors = {name: _entry(file, base, entry) for name, entry in header.items()}
    except OSError as error:
        raise CfspError(f"cannot read {file}: {error.strerror}") from None
    except CfspError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CfspError(f"{file} is corrupt: bad header: {reason}") from None
    end = max((tensor.start + tensor.nbytes for tensor in tensors.values()), default=base)
    if end != size:
        raise CfspError(f"{file} is corrupt: {size} bytes, its header speaks of {end}")
    return tensors


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Name -> place of every tensor of a model folder, of one file or of several shards.

    Raises:
        CfspError: no weights, a shard is missing or corrupt, or lacks what the index says.
    """
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file() or not index.is_file():
        return read_header(single)
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        headers = {shard: read_header(folder / shard) for shard in sorted(set(weight_map.values()))}
    except OSError as error:
        raise CfspError(f"cannot read {index}: {error.strerror}") from None
    except CfspError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CfspError(f"{index} is corrupt: {type(error).__name__}: {error}") from None
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CfspError(f"{folder / shard} lacks {name}, which {index.name} says it holds")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _read_chunk(descriptor: int, view: memoryview, start: int, file: Path) -> None:
    done = 0
    try:
        while done < len(view):
            got = os.preadv(descriptor, [view[done:]], start + done)
            if got == 0:
                raise CfspError(f"{file} is corrupt: it ends at byte {start + done}")
            done += got
    except OSError as error:
        raise CfspError(f"cannot read {file}: {error.strerror}") from None


def _new_room(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory for a tensor: where it is large a mapping of its own, which goes back to the system
    when the tensor goes. A heap that threads share keeps it, in pieces."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < MAPPED_BYTES:
        return torch.empty(shape, dtype=dtype)
    return mapped_bytes(nbytes).view(dtype).view(shape)


def _chunks(
    found: Mapping[str, torch.Tensor], tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[memoryview, int, Path]]:
    """(memory, first byte in the file, file) of what one call reads at most."""
    for name, stored in tensors.items():
        if stored.nbytes:
            view = _bytes(found[name])
            for done in range(0, len(view), READ_BYTES):
                yield view[done : done + READ_BYTES], stored.start + done, stored.file


def read_tensors(
    tensors: Mapping[str, StoredTensor], room: Room = _new_room
) -> dict[str, torch.Tensor]:
    """Read tensors into CPU memory, as stored; several threads read, each file is opened once.

    Args:
        tensors: where they lie.
        room: gives the contiguous memory of a tensor; new memory unless told otherwise.

    Raises:
        CfspError: a file cannot be read or became shorter.
    """
    found = {name: room(stored.shape, stored.dtype) for name, stored in tensors.items()}
    descriptors: dict[Path, int] = {}
    try:
        for file in {stored.file: None for stored in tensors.values()}:
            descriptors[file] = os.open(file, os.O_RDONLY)
        chunks = [(descriptors[file], view, at, file) for view, at, file in _chunks(found, tensors)]
        if len(chunks) <= 1 or sum(stored.nbytes for stored in tensors.values()) < READ_BYTES:
            for chunk in chunks:
                _read_chunk(*chunk)
        else:
            with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
                for reading in [pool.submit(_read_chunk, *chunk) for chunk in chunks]:
                    reading.result()
    except OSError as error:
        raise CfspError(f"cannot read {error.filename}: {error.strerror}") from None
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return found


def first_values(stored: StoredTensor, count: int) -> torch.Tensor:
    """The first ``count`` values of the first row of a matrix, without reading the rest."""
    row = math.prod(stored.shape[1:])
    part = StoredTensor(stored.dtype, (min(count, row),), stored.file, stored.start)
    return read_tensors({"": part})[""]


@dataclass(frozen=True)
class Shard:
    """One file to write: its tensors in the order they lie in it."""

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
    shards = []
    for number, group in enumerate(groups, 1):
        name = WEIGHTS_FILE
        if len(groups) > 1:
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        by_width = sorted(group.items(), key=lambda item: -item[1].dtype.itemsize)
        shards.append(Shard(name, dict(by_width)))
    return tuple(shards)


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """The index of several shards; one file has none."""
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


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _OpenShard:
    """A shard being filled: its space is reserved before the first byte is written."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.path = folder / shard.name
        self.temporary = folder / f".{shard.name}.tmp"
        self.left = set(shard.tensors)
        header = shard.header()
        self.starts: dict[str, int] = {}
        offset = len(header)
        for name, info in shard.tensors.items():
            self.starts[name] = offset
            offset += info.nbytes
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self.descriptor = os.open(self.temporary, flags, 0o666)
        try:
            os.posix_fallocate(self.descriptor, 0, offset)
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
        data = _bytes(tensor.detach().cpu().contiguous())
        self._write(data, self.starts[name])
        if hasattr(os, "posix_fadvise"):  # Linux then begins to write at once, not at the fsync
            start, advice = self.starts[name], os.POSIX_FADV_DONTNEED
            os.posix_fadvise(self.descriptor, start, len(data), advice)
        self.left.remove(name)

    def finish(self) -> None:
        os.fsync(self.descriptor)
        os.close(self.descriptor)
        os.replace(self.temporary, self.path)
        sync_folder(self.path.parent)

    def abandon(self) -> None:
        os.close(self.descriptor)
        self.temporary.unlink(missing_ok=True)


class ShardWriter:
    """Writes the tensors of planned shards, in any order; a shard has its name when it is whole.

    A context manager: on the way out of an error, unfinished shards vanish. What belongs to a shard
    in ``others`` is not written: it is there already, or another process does it.
    """

    def __init__(
        self, folder: Path, shards: Iterable[Shard], others: frozenset[str] = frozenset()
    ) -> None:
        self.folder = folder
        self.others = others
        self.shard_of = {name: shard for shard in shards for name in shard.tensors}
        self.open: dict[str, _OpenShard] = {}
        self.closed = 0
        """Shards finished by this writer."""

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        unfinished = sorted(name for shard in self.open.values() for name in shard.left)
        for shard in self.open.values():
            shard.abandon()
        self.open.clear()
        if kind is None and unfinished:
            raise RuntimeError(f"tensors that were never written: {', '.join(unfinished[:3])}")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its place; the last of a shard finishes it.

        Raises:
            OSError: no space for the shard; raised before any of its bytes is written.
            RuntimeError: not the shape or dtype that was planned. A defect.
        """
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
            self.closed += 1


MAX_SHARD_BYTES = 5_000_000_000


Tensors = Mapping[str, TensorInfo]
