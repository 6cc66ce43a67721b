"""Safetensors files: headers are read once, tensors where and when they are needed."""

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CfspError

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
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What weights are computed in as they are stored."""
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAPPED_BYTES = 1 << 20
READ_BYTES = 32 << 20  # per call, so that threads share one matrix; Linux moves at most 2 GiB
READERS = min(8, os.cpu_count() or 1)  # a fast disk wants several requests at a time
MALFORMED = (ValueError, KeyError, TypeError, AttributeError)
"""What JSON raises that does not hold what it should."""

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


Tensors = Mapping[str, TensorInfo]


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
    """Name -> place of every tensor of a safetensors file; raises CfspError for one that cannot be
    read, is truncated, or something else."""
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
    except MALFORMED as error:
        reason = " ".join(str(error).split())[:200]
        raise CfspError(f"{file} is corrupt: bad header: {reason}") from None
    end = max((tensor.start + tensor.nbytes for tensor in tensors.values()), default=base)
    if end != size:
        raise CfspError(f"{file} is corrupt: {size} bytes, its header speaks of {end}")
    return tensors


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Name -> place of every tensor of a model folder, of one file or of several shards; raises
    CfspError where a file is missing or corrupt, or lacks what the index says."""
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file() or not index.is_file():
        return read_header(single)
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        shards = {shard: folder / shard for shard in sorted(set(weight_map.values()))}
    except OSError as error:
        raise CfspError(f"cannot read {index}: {error.strerror}") from None
    except MALFORMED as error:
        raise CfspError(f"{index} is corrupt: {type(error).__name__}: {error}") from None
    headers = {shard: read_header(file) for shard, file in shards.items()}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CfspError(f"{folder / shard} lacks {name}, which {index.name} says it holds")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def mapped_bytes(nbytes: int) -> torch.Tensor:
    """[nbytes] uint8 in a mapping of its own, which goes back to the system with the tensor."""
    memory = mmap.mmap(-1, max(nbytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]


def _new_room(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """New memory; a mapping for a large tensor, since a heap that threads share would keep it."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < MAPPED_BYTES:
        return torch.empty(shape, dtype=dtype)
    return mapped_bytes(nbytes).view(dtype).view(shape)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _read_chunk(file: Path, descriptor: int, view: memoryview, start: int) -> None:
    done = 0
    try:
        while done < len(view):
            got = os.preadv(descriptor, [view[done:]], start + done)
            if got == 0:
                raise CfspError(f"{file} is corrupt: it ends at byte {start + done}")
            done += got
    except OSError as error:
        raise CfspError(f"cannot read {file}: {error.strerror}") from None


def read_tensors(
    tensors: Mapping[str, StoredTensor], room: Room = _new_room
) -> dict[str, torch.Tensor]:
    """Read tensors into CPU memory, as stored; several threads read, each file is opened once.
    ``room`` gives the contiguous memory of a tensor."""
    found = {name: room(stored.shape, stored.dtype) for name, stored in tensors.items()}
    descriptors: dict[Path, int] = {}
    chunks: list[tuple[Path, int, memoryview, int]] = []
    try:
        for name, stored in tensors.items():
            if stored.file not in descriptors:
                descriptors[stored.file] = os.open(stored.file, os.O_RDONLY)
            view = memory_of(found[name]) if stored.nbytes else memoryview(b"")
            for done in range(0, len(view), READ_BYTES):
                part = view[done : done + READ_BYTES]
                chunks.append((stored.file, descriptors[stored.file], part, stored.start + done))
        if sum(len(view) for _, _, view, _ in chunks) <= READ_BYTES:
            for chunk in chunks:
                _read_chunk(*chunk)
        else:
            with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
                list(pool.map(lambda chunk: _read_chunk(*chunk), chunks))
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
