"""Gram matrices of FFN activations, on disk: one file for each block, read when asked for."""

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import CfspError
from ..io.safetensors import StoredTensor, TensorInfo, read_header, read_tensors
from ..io.shard_writer import Shard

FIT, HELD_OUT = "fit", "held_out"
PARTS = (FIT, HELD_OUT)
WITHOUT = "scorer cfsp, the published method, needs none"
"""What errors say to those who cannot have them."""
PANEL = 1024
"""Rows of a triangle that are one tensor in the file, as wide as the last of them is long."""

HELD_OUT_SHARE = 10
"""One window in so many is held out: a fit hardly misses a tenth of its tokens, and the error of a
block's output is known to a few percent from some thousands of them."""


def held_out_windows(windows: int) -> int:
    """How many of the calibration windows, the last, are held out; of a single one none."""
    return max(1, windows // HELD_OUT_SHARE) if windows > 1 else 0


def parts_of(windows: int) -> tuple[str, ...]:
    """The parts of the calibration that there are."""
    return (FIT, HELD_OUT) if held_out_windows(windows) else (FIT,)


@dataclass(frozen=True)
class Gram:
    """Second moments of the activation x [T, F] of one FFN over one part of the calibration."""

    tokens: int
    """T."""
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
    """Where the Gram matrices of a calibration are."""

    path: Path

    def file(self, block: int) -> Path:
        """The file of one block."""
        return self.path / f"block-{block:04d}.safetensors"


def check_replaceable(path: Path) -> None:
    """Raise CfspError where a folder holds anything but Gram matrices."""
    found = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    for file in found:
        if not file.name.removeprefix(".").startswith("block-"):
            raise CfspError(f"{path} is in the way: it holds {file.name}; choose another place")


def temporary_folder(path: Path | None = None) -> GramFolder:
    """An empty folder that is removed when nothing refers to it any more; None: where temporary
    files go (``TMPDIR``). Gram matrices that a killed process left in it go at once.

    Raises:
        CfspError: it cannot be made, or holds something else.
    """
    try:
        if path is None:
            path = Path(tempfile.mkdtemp(prefix="cfsp-grams-"))
        else:
            check_replaceable(path)
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
    except OSError as error:
        raise CfspError(f"cannot write Gram matrices: {error}") from None
    folder = GramFolder(path)
    weakref.finalize(folder, shutil.rmtree, path, ignore_errors=True)
    return folder


def panels(channels: int) -> Iterator[tuple[int, int]]:
    """(first row, row behind the last) of every panel of a triangle."""
    return ((start, min(start + PANEL, channels)) for start in range(0, channels, PANEL))


def tensor_name(block: int, ffn: int, part: str, what: str) -> str:
    """Name in a block's file of the ``tokens``, the ``sum`` or a panel of an FFN."""
    return f"block.{block:04d}.ffn.{ffn:04d}.{part}.{what}"


def panel_name(block: int, ffn: int, part: str, start: int) -> str:
    """Name in a block's file of the panel that begins with a row."""
    return tensor_name(block, ffn, part, f"product.{start:06d}")


def planned_file(name: str, block: int, sizes: Sequence[int], windows: int) -> Shard:
    """What the file of a block holds, its FFNs having ``sizes`` channels."""
    sums, triangles = {}, {}
    for ffn, channels in enumerate(sizes):
        for part in parts_of(windows):
            sums[tensor_name(block, ffn, part, "tokens")] = TensorInfo(torch.int64, (1,))
            sums[tensor_name(block, ffn, part, "sum")] = TensorInfo(torch.float64, (channels,))
            for start, end in panels(channels):
                shape = (end - start, end)
                triangles[panel_name(block, ffn, part, start)] = TensorInfo(torch.float32, shape)
    return Shard(name, {**sums, **triangles})


def file_bytes(sizes: Sequence[int], windows: int) -> int:
    """Size of the file of a block."""
    shard = planned_file("", 0, sizes, windows)
    return len(shard.header()) + shard.nbytes


def gram_digest(sums: Mapping[str, tuple[int, torch.Tensor]]) -> str:
    """Tells the Gram matrices of one calibration from those of another: 16 hexadecimal digits.

    ``sums``: tokens, and the sum of x over them in fp64, of every part.
    """
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
    """Counts the FFNs and experts of the block."""
    channels: int
    tokens: tuple[int, int]
    """Of the fitting and of the held-out part; the second is 0 where nothing was held out."""
    digest: str
    """See :func:`gram_digest`."""

    def fit(self, device: torch.device | str = "cpu") -> Gram:
        """Over the windows that a compensation is fitted on.

        Raises:
            CfspError: the file is missing, damaged or of another calibration.
        """
        _read_ahead(self.folder.file(self.block + 1))
        return self._read(FIT, torch.device(device))

    def held_out(self, device: torch.device | str = "cpu") -> Gram | None:
        """Over the windows that a compensation is judged by; None where there are none.

        Raises:
            CfspError: the file is missing, damaged or of another calibration.
        """
        return self._read(HELD_OUT, torch.device(device)) if self.tokens[1] else None

    def _read(self, part: str, device: torch.device) -> Gram:
        file = self.folder.file(self.block)
        stored = _header(file)
        tokens, total = self.checked(file, stored)[part]
        product = torch.empty(self.channels, self.channels, device=device)
        for start, end in panels(self.channels):
            panel = self._panel(file, stored, part, start, end).to(device)
            product[start:end, :end] = panel
            product[:start, start:end] = panel[:, :start].T
            square = product[start:end, start:end]
            square += square.tril(-1).T
        return Gram(tokens, total.to(device), product)

    def checked(
        self, file: Path, stored: Mapping[str, StoredTensor]
    ) -> dict[str, tuple[int, torch.Tensor]]:
        """Tokens and sum of every part. Raises CfspError for the file of another calibration."""
        try:
            small = {
                (part, what): stored[tensor_name(self.block, self.ffn, part, what)]
                for part, tokens in zip(PARTS, self.tokens, strict=True)
                for what in ("tokens", "sum")
                if tokens or part == FIT
            }
        except KeyError:
            raise self._other(file) from None
        values = read_tensors({f"{part} {what}": x for (part, what), x in small.items()})
        sums = {
            part: (int(values[f"{part} tokens"][0]), values[f"{part} sum"])
            for part, what in small
            if what == "sum"
        }
        if gram_digest(sums) != self.digest:
            raise self._other(file)
        return sums

    def _panel(
        self, file: Path, stored: Mapping[str, StoredTensor], part: str, start: int, end: int
    ) -> torch.Tensor:
        found = stored.get(panel_name(self.block, self.ffn, part, start))
        if found is None or found.shape != (end - start, end) or found.dtype != torch.float32:
            raise self._other(file)
        return read_tensors({"": found})[""]

    @staticmethod
    def _other(file: Path) -> CfspError:
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


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        return read_header(file)
    except CfspError as error:
        raise CfspError(f"Gram matrices: {error}; calibrate again") from None


def check_files(blocks: Sequence[Sequence[StoredGram]]) -> None:
    """Raise CfspError where a file is missing, cut short or of another calibration.

    ``blocks``: the Gram matrices of every block.
    """
    for grams in blocks:
        if grams:
            file = grams[0].folder.file(grams[0].block)
            stored = _header(file)
            for gram in grams:
                gram.checked(file, stored)


def link_files(source: GramFolder, target: Path, blocks: int) -> None:
    """Put the files of a calibration into a new folder too, as links where the disk allows it.

    Raises:
        OSError: no space, or no permission.
    """
    target.mkdir(parents=True)
    for block in range(blocks):
        file = source.file(block)
        copy = target / file.name
        try:
            os.link(file, copy)
        except OSError:  # another disk, or a file system without hard links
            shutil.copyfile(file, copy)
