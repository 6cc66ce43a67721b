"""Gram matrices of FFN activations on disk: one file for each block, read when asked for."""

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch

from ..errors import CfspError
from ..io.safetensors import StoredTensor, TensorInfo, read_header, read_tensors
from ..io.shard_writer import Shard

FIT, HELD_OUT = "fit", "held_out"
WITHOUT = "scorer cfsp, the published method, needs none"
"""What errors say to those who cannot have Gram matrices."""
PANEL = 1024
"""Rows of a triangle that are one tensor in the file, as wide as the last of them is long."""

HELD_OUT_SHARE = 10
"""One window in so many is held out: a fit hardly misses a tenth of its tokens, and the error of a
block's output is known to a few percent from some thousands of them."""

TokensAndSum = tuple[int, torch.Tensor]
"""The number of tokens, and the sum of x over them [F] fp64."""


def held_out_windows(windows: int) -> int:
    """How many of the calibration windows, the last, are held out; of a single one none."""
    return max(1, windows // HELD_OUT_SHARE) if windows > 1 else 0


def parts_of(held_out: int) -> tuple[str, ...]:
    """The parts of a calibration that holds out so many windows or tokens."""
    return (FIT, HELD_OUT) if held_out else (FIT,)


@dataclass(frozen=True)
class Gram:
    """Second moments of the activation x [T, F] of one FFN over one part of the calibration."""

    tokens: int
    """The number of tokens, T."""
    sum: torch.Tensor
    """[F] fp64, sum of x over tokens."""
    product: torch.Tensor
    """[F, F] fp32, x^T x, symmetric."""

    def moments(self, centred: bool = False) -> torch.Tensor:
        """[F, F] x^T x / T in fp32; centred: the covariance in fp64. Zero without tokens."""
        tokens = max(self.tokens, 1)
        if not centred:
            return self.product / tokens
        mean = self.sum / tokens
        return (self.product.double() / tokens).addr_(mean, mean, alpha=-1)


@dataclass(frozen=True)
class GramFolder:
    """The folder that holds the Gram matrices of a calibration."""

    path: Path

    def file(self, block: int) -> Path:
        """The file of one block."""
        return self.path / f"block-{block:04d}.safetensors"

    def header(self, block: int) -> dict[str, StoredTensor]:
        """What the file of a block holds. Raises CfspError where it is missing or damaged."""
        try:
            return read_header(self.file(block))
        except CfspError as error:
            raise CfspError(f"Gram matrices: {error}; calibrate again") from None


def check_replaceable(path: Path) -> None:
    """Raise CfspError where a folder holds anything but Gram matrices."""
    found = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    for file in found:
        if not file.name.removeprefix(".").startswith("block-"):
            raise CfspError(f"{path} is in the way: it holds {file.name}; choose another place")


def temporary_folder(path: Path | None = None) -> GramFolder:
    """An empty folder, removed once nothing refers to it; None: where temporary files go
    (``TMPDIR``). Gram matrices that a killed process left in it go at once. Raises CfspError where
    it cannot be made, or holds something else."""
    try:
        if path is not None:
            check_replaceable(path)
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        folder = GramFolder(path or Path(tempfile.mkdtemp(prefix="cfsp-grams-")))
    except OSError as error:
        raise CfspError(f"cannot write Gram matrices: {error}") from None
    weakref.finalize(folder, shutil.rmtree, folder.path, ignore_errors=True)
    return folder


def panels(channels: int) -> Iterator[tuple[str, int, int]]:
    """(name, first row, row behind the last) of every panel of a triangle."""
    for start in range(0, channels, PANEL):
        yield f"product.{start:06d}", start, min(start + PANEL, channels)


def tensor_name(block: int, ffn: int, part: str, what: str) -> str:
    """Name in a block's file of the ``tokens``, the ``sum`` or a panel of an FFN or expert."""
    return f"block.{block:04d}.ffn.{ffn:04d}.{part}.{what}"


def planned_file(file: Path, block: int, sizes: Sequence[int], windows: int) -> Shard:
    """What the file of a block holds, its FFNs and experts having ``sizes`` channels."""
    sums, triangles = {}, {}
    for ffn, channels in enumerate(sizes):
        for part in parts_of(held_out_windows(windows)):
            name = partial(tensor_name, block, ffn, part)
            sums[name("tokens")] = TensorInfo(torch.int64, (1,))
            sums[name("sum")] = TensorInfo(torch.float64, (channels,))
            for panel, start, end in panels(channels):
                triangles[name(panel)] = TensorInfo(torch.float32, (end - start, end))
    return Shard(file.name, {**sums, **triangles})


@cache
def file_bytes(sizes: tuple[int, ...], windows: int) -> int:
    """Size of the file of a block."""
    return planned_file(Path(), 0, sizes, windows).file_bytes


def gram_digest(sums: Mapping[str, TokensAndSum]) -> str:
    """16 hexadecimal digits over all parts, which tell one calibration from another."""
    digest = hashlib.sha256()
    for part, (tokens, total) in sorted(sums.items()):
        digest.update(f"{part} {tokens}".encode() + total.numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class StoredGram:
    """The Gram matrices of one FFN, or of one expert."""

    folder: GramFolder = field(repr=False, compare=False)
    block: int
    ffn: int
    """Its number among the FFNs and experts of the block."""
    channels: int
    tokens: tuple[int, int]
    """Tokens of the fitting and of the held-out part, 0 where nothing was held out."""
    digest: str
    """See :func:`gram_digest`."""

    def fit(self, device: torch.device | str = "cpu") -> Gram:
        """Over the windows that a compensation is fitted on. Raises CfspError where the file is
        missing, damaged or of another calibration, as :meth:`held_out` does."""
        _read_ahead(self.folder.file(self.block + 1))
        return self._read(FIT, device)

    def held_out(self, device: torch.device | str = "cpu") -> Gram | None:
        """Over the windows that a compensation is judged by; None where there are none."""
        return self._read(HELD_OUT, device) if self.tokens[1] else None

    def _read(self, part: str, device: torch.device | str) -> Gram:
        stored = self.folder.header(self.block)
        tokens, total = self.checked(stored)[part]
        product = torch.empty(self.channels, self.channels, device=device)
        for name, start, end in panels(self.channels):
            found = stored.get(tensor_name(self.block, self.ffn, part, name))
            if found is None or found.shape != (end - start, end) or found.dtype != torch.float32:
                raise self._other()
            panel = read_tensors({name: found})[name].to(device)
            product[start:end, :end] = panel
            product[:start, start:end] = panel[:, :start].T
            square = product[start:end, start:end]
            square += square.tril(-1).T
        return Gram(tokens, total.to(device), product)

    def checked(self, stored: Mapping[str, StoredTensor]) -> dict[str, TokensAndSum]:
        """What the block's file says of every part. Raises CfspError for another calibration's."""
        sums: dict[str, TokensAndSum] = {}
        for part in parts_of(self.tokens[1]):
            names = [tensor_name(self.block, self.ffn, part, what) for what in ("tokens", "sum")]
            if not stored.keys() >= set(names):
                raise self._other()
            tokens, total = read_tensors({name: stored[name] for name in names}).values()
            sums[part] = int(tokens[0]), total
        if gram_digest(sums) != self.digest:
            raise self._other()
        return sums

    def _other(self) -> CfspError:
        file = self.folder.file(self.block)
        return CfspError(f"{file} is not of these statistics: calibrate again")


def _read_ahead(file: Path) -> None:
    """Tell Linux that a file will be read soon."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # the last block has none after it
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)
