"""Safetensors files: headers are read once, tensors where and when they are needed."""

import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from ..errors import CfspError, named, reason, shown
from ..typed import Bound, decode
from .documents import check_regular, parse_json, read_json, reading
from .memory import Room, memory_of, new_room

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
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
READ_BYTES = 32 << 20  # per call, so that threads share one matrix; Linux moves at most 2 GiB
READERS = min(8, os.cpu_count() or 1)  # a fast disk wants several requests at a time
MAX_DIMENSIONS = 64
Natural64 = Annotated[int, Bound("0 or more", lambda value: value >= 0)]


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

    @property
    def parts(self) -> tuple["StoredTensor", ...]:
        """As of a :class:`JoinedTensor`: itself."""
        return (self,)


@dataclass(frozen=True)
class JoinedTensor(TensorInfo):
    """A tensor whose values are those of several stored ones, one behind the other."""

    parts: tuple[StoredTensor, ...]


Readable = StoredTensor | JoinedTensor


Shape = Annotated[
    tuple[Natural64, ...],
    Bound(
        f"at most {MAX_DIMENSIONS} sizes of fewer than 2^63 bytes in all",
        lambda sizes: (
            len(sizes) <= MAX_DIMENSIONS and math.prod(max(1, size) for size in sizes) < 2**59
        ),
    ),
]


@dataclass(frozen=True)
class _Entry:
    """What a header says of a tensor."""

    dtype: str
    shape: Shape
    data_offsets: tuple[Natural64, Natural64]


@dataclass(frozen=True)
class Header:
    """What a file says of itself before the first value."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def open_header(file: Path) -> Header:
    """The header of a safetensors file, by the format's own rules: nothing twice, dtypes known,
    sizes and offsets whole, and tensors that cover the data to its end without gap or overlap.
    Raises CfspError for a file that breaks one, is truncated, cannot be read or is something else.
    """
    check_regular(file)
    corrupt = f"{file} is corrupt"
    with reading(file), file.open("rb") as stream:
        size, prefix = os.fstat(stream.fileno()).st_size, stream.read(8)
        length = int.from_bytes(prefix, "little") if len(prefix) == 8 else 0
        if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            if prefix.lstrip()[:1] in (b"{", b"["):
                raise CfspError(f"{file} is a JSON document, not a safetensors file")
            raise CfspError(f"{corrupt}: its header of {length} bytes is not there")
        data = stream.read(length)
    try:
        text = data.decode()
        header = parse_json(text)
        if not isinstance(header, dict) or text[0] != "{":
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise CfspError(f"{corrupt}: bad header: {reason(error)}") from None
    what = f"{corrupt}: bad header"
    metadata = decode(dict[str, str], header.pop("__metadata__", {}), what, "__metadata__")
    entries = decode(dict[str, _Entry], header, what)
    base, end = 8 + length, 0
    tensors = {}
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise CfspError(
                f"{file} holds tensors of type {named(entry.dtype)}, which is not supported"
            )
        start = base + entry.data_offsets[0]
        tensors[name] = StoredTensor(DTYPES[entry.dtype], entry.shape, file, start)
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        if start != end or stop - start != tensors[name].nbytes:
            raise CfspError(
                f"{what}: {named(name)} has offsets {start} to {stop} for shape "
                f"{shown(list(entry.shape))}, where the tensor before it ends at {end}"
            )
        end = stop
    if base + end != size:
        raise CfspError(f"{corrupt}: {size} bytes, its header speaks of {base + end}")
    return Header(tensors, metadata)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Name -> place of every tensor of a safetensors file; raises CfspError as
    :func:`open_header` does."""
    return open_header(file).tensors


def _is_file_name(text: str) -> bool:
    return Path(text).name == text != ".." and text.isprintable() and 0 < len(text) < 256


@dataclass(frozen=True)
class _Index:
    weight_map: dict[
        str, Annotated[str, Bound("the name of a file in the same folder", _is_file_name)]
    ]
    metadata: Any = None


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Name -> place of every tensor of a model folder, of one file or of several shards; raises
    CfspError where a file is missing or corrupt, or index and shards hold different tensors."""
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file() or not index.is_file():
        return read_header(single)
    weight_map = decode(_Index, read_json(index), str(index)).weight_map
    headers = {shard: read_header(folder / shard) for shard in sorted(set(weight_map.values()))}
    stored = {(name, shard) for shard, tensors in headers.items() for name in tensors}
    for name, shard in sorted(weight_map.items() - stored):
        raise CfspError(f"{folder / shard} lacks {named(name)}, which {index.name} says it holds")
    for name, shard in sorted(stored - weight_map.items()):
        raise CfspError(f"{folder / shard} holds {named(name)}, which {index.name} does not say")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def check_finite(what: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise CfspError for the first of ``what``'s tensors that holds NaN or infinity, which would
    spread wherever its values are used. Sums tell, in one reading; a sum that is too large alone
    has the values looked at."""
    floats = {k: x for k, x in tensors.items() if x.is_floating_point() and not x.is_meta}
    if not floats:
        return
    sums = [
        x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)) for x in floats.values()
    ]
    if all(torch.stack([x.double() for x in sums]).isfinite().tolist()):
        return
    for name, tensor in floats.items():
        if not tensor.detach().isfinite().all():
            raise CfspError(f"{what}: {named(name)} holds NaN or infinite values")


def _read_chunk(file: Path, descriptor: int, view: memoryview, start: int) -> None:
    done = 0
    with reading(file):
        while done < len(view):
            got = os.preadv(descriptor, [view[done:]], start + done)
            if got == 0:
                raise CfspError(f"{file} is corrupt: it ends at byte {start + done}")
            done += got


def read_tensors(tensors: Mapping[str, Readable], room: Room = new_room) -> dict[str, torch.Tensor]:
    """Read tensors into CPU memory, as stored; several threads read, each file is opened once.
    ``room`` gives the contiguous memory of a tensor."""
    found = {name: room(stored.shape, stored.dtype) for name, stored in tensors.items()}
    descriptors: dict[Path, int] = {}
    chunks: list[tuple[Path, int, memoryview, int]] = []
    try:
        for name, whole in tensors.items():
            left = memory_of(found[name]) if whole.nbytes else memoryview(b"")
            for stored in whole.parts:
                if stored.file not in descriptors:
                    descriptors[stored.file] = os.open(stored.file, os.O_RDONLY)
                view, left = left[: stored.nbytes], left[stored.nbytes :]
                for done in range(0, len(view), READ_BYTES):
                    part = view[done : done + READ_BYTES]
                    place = descriptors[stored.file], part, stored.start + done
                    chunks.append((stored.file, *place))
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


def will_need(tensors: Iterable[Readable]) -> None:
    """Have the system read tensors into its cache of files, where it can, without waiting."""
    if not hasattr(os, "posix_fadvise"):
        return
    for tensor in tensors:
        for part in tensor.parts:
            with suppress(OSError), part.file.open("rb") as file:
                os.posix_fadvise(file.fileno(), part.start, part.nbytes, os.POSIX_FADV_WILLNEED)


def first_values(stored: Readable, count: int) -> torch.Tensor:
    """The first ``count`` values of the first row of a matrix, without reading the rest."""
    left, reads = min(count, math.prod(stored.shape[1:])), {}
    for number, part in enumerate(stored.parts):
        taken = min(left, part.numel)
        reads[str(number)] = StoredTensor(part.dtype, (taken,), part.file, part.start)
        left -= taken
        if not left:
            break
    return torch.cat(list(read_tensors(reads).values()))
