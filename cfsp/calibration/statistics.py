"""What a calibration says about every block and channel, and its file."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CfspError
from ..models.blocks import Blocks
from ..models.channels import ChannelGroup, sizes_of
from .curves import Ranking, ranking_of
from .grams import WITHOUT, GramFolder, StoredGram, check_replaceable

FORMAT = "cfsp-statistics-3"
READABLE = (FORMAT, "cfsp-statistics-2")
"""The earlier one knew no Gram matrices."""
INFLUENCE_METRICS = ("angular", "cosine", "mse", "mae")


@dataclass(frozen=True)
class BlockStatistics:
    """Sums over the calibration tokens for one block of F channels; all on the CPU, in fp64."""

    tokens: int
    windows: int
    sum: torch.Tensor
    """[F], sum of the FFN activation (the input of the down projection)."""
    sum_of_squares: torch.Tensor
    """[F], sum of its square."""
    influence: torch.Tensor
    """[4], sums of the metrics of INFLUENCE_METRICS over tokens."""
    groups: tuple[ChannelGroup, ...] = ()
    """The FFNs whose channels these are, one after the other; when not given, a single one."""
    expert_tokens: tuple[int, ...] = ()
    """Tokens that each FFN saw, and each expert of those that have some; () where all saw all."""
    grams: tuple[StoredGram, ...] = ()
    """Gram matrices of each FFN, and of each expert of those that have some; () without."""

    def __post_init__(self) -> None:
        if not self.groups:
            object.__setattr__(self, "groups", (ChannelGroup(len(self.sum)),))

    @property
    def gram(self) -> StoredGram | None:
        """The Gram matrices of a block with a single FFN, or of what :meth:`ffns` gives."""
        return self.grams[0] if len(self.grams) == 1 else None

    def ffns(self) -> tuple["BlockStatistics", ...]:
        """The statistics of every FFN, and of every expert of those that have some, each alone."""
        if len(self.expert_tokens) < 2:
            return (self,)
        sizes = sizes_of(self.groups)
        sums, squares = self.sum.split(sizes), self.sum_of_squares.split(sizes)
        return tuple(
            BlockStatistics(
                tokens,
                self.windows,
                sums[ffn],
                squares[ffn],
                self.influence,
                grams=self.grams[ffn : ffn + 1],
            )
            for ffn, tokens in enumerate(self.expert_tokens)
        )

    @property
    def norm(self) -> torch.Tensor:
        """[F], n_i: L2 norm of a channel over a window, root of the mean square per window."""
        return (self.sum_of_squares / self.windows).sqrt()

    @property
    def mean(self) -> torch.Tensor:
        """[F], mean activation over tokens; 0 where there were none."""
        return self.sum / max(self.tokens, 1)

    @property
    def variance(self) -> torch.Tensor:
        """[F], variance of the activation over tokens (population)."""
        return (self.sum_of_squares / max(self.tokens, 1) - self.mean.square()).clamp_min(0)

    def importance(self, metric: str) -> float:
        """Mean influence per token: angular in half turns, the others in their own units."""
        return float(self.influence[INFLUENCE_METRICS.index(metric)]) / self.tokens


SUMS = ("sum", "sum_of_squares", "influence")
"""The tensors of a block in the statistics file."""


@dataclass(frozen=True)
class Statistics:
    """The artefact of a calibration: serves any number of budgets, scorers and allocators."""

    blocks: tuple[BlockStatistics, ...]
    model_fingerprint: str
    provenance: dict[str, Any]
    """Calibration settings, tokens' hash, micro-batch, dtype and versions."""
    rankings: tuple[Ranking, ...] = ()
    """Scores and error curves that were asked for; see :func:`ranking.with_ranking`."""

    @property
    def intermediate_sizes(self) -> tuple[int, ...]:
        """FFN channels of every block."""
        return tuple(len(block.sum) for block in self.blocks)

    @property
    def gram_folder(self) -> GramFolder | None:
        """Where its Gram matrices are; None without."""
        return next((gram.folder for block in self.blocks for gram in block.grams), None)

    def without_grams(self) -> "Statistics":
        """The same without Gram matrices."""
        return replace(self, blocks=tuple(replace(block, grams=()) for block in self.blocks))

    def importance(self, metric: str) -> torch.Tensor:
        """[L] fp64, coarse importance of every block: its mean influence per token."""
        return torch.tensor([b.importance(metric) for b in self.blocks], dtype=torch.float64)


def statistics_fingerprint(statistics: Statistics) -> str:
    """SHA-256 over all sums, as 64 hexadecimal digits; of Gram matrices, over their digests."""
    digest = hashlib.sha256(statistics.model_fingerprint.encode())
    for block in statistics.blocks:
        digest.update(f"{block.tokens} {block.windows} {block.expert_tokens}".encode())
        for name in SUMS:
            digest.update(getattr(block, name).numpy().tobytes())
        digest.update("".join(gram.digest for gram in block.grams).encode())
    for ranking in statistics.rankings:
        digest.update(repr(ranking.made_by).encode())
        for name, tensor in ranking.tensors().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def check_model(what: str, sizes: tuple[int, ...], made_with: str, model: Blocks) -> None:
    """Raise CfspError where ``what``, made with FFNs of these sizes and this fingerprint, is of
    another model."""
    own = model.layout.intermediate_sizes(model.model)
    if sizes != own:
        raise CfspError(
            f"{what} another model: {len(sizes)} blocks with up to {max(sizes)} channels, the "
            f"model has {len(own)} with up to {max(own)}"
        )
    if made_with != model.fingerprint():
        raise CfspError(f"{what} another model: same shapes, different weights")


def check_statistics(statistics: Statistics, model: Blocks) -> None:
    """Raise CfspError where the statistics were made with another model."""
    sizes, made_with = statistics.intermediate_sizes, statistics.model_fingerprint
    check_model("the statistics are of", sizes, made_with, model)


def check_grams(statistics: Statistics, what: str) -> None:
    """Raise CfspError where ``what`` needs Gram matrices that the statistics lack, or whose files
    are missing, damaged or of another calibration."""
    if not all(block.grams for block in statistics.blocks):
        lack = f"{what} needs Gram matrices, which the statistics lack"
        raise CfspError(f"{lack}: calibrate again without `gram=False`; {WITHOUT}")
    for number, block in enumerate(statistics.blocks):
        stored = block.grams[0].folder.header(number)
        for gram in block.grams:
            gram.checked(stored)


def gram_path(path: Path) -> Path:
    """Where the Gram matrices of a statistics file are: beside it."""
    return path.with_name(f"{path.name}.grams")


def _save_grams(statistics: Statistics, path: Path) -> None:
    """Put the Gram matrices beside a statistics file, where they are not there already."""
    target, source = gram_path(path), statistics.gram_folder
    if source is not None and target.exists() and target.samefile(source.path):
        return
    check_replaceable(target)
    old, partial = (target.with_name(f"{target.name}.{end}") for end in ("old", "partial"))
    for folder in (old, partial):
        shutil.rmtree(folder, ignore_errors=True)
    if source is not None:
        partial.mkdir(parents=True)
        try:
            for number in range(len(statistics.blocks)):
                _link(source.file(number), partial)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    if target.exists():
        os.replace(target, old)
    if source is not None:
        os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)


def _link(file: Path, folder: Path) -> None:
    """Put a file into a folder too, as a link where the disk allows it."""
    try:
        os.link(file, folder / file.name)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(file, folder / file.name)


def save_statistics(statistics: Statistics, path: str | Path) -> None:
    """Write statistics as one safetensors file, whole or not at all.

    Gram matrices are a folder beside it, ``PATH.grams``, of one file for each block.
    """
    path, blocks = Path(path), statistics.blocks
    tensors = {}
    for number, block in enumerate(blocks):
        tensors.update({f"block.{number:04d}.{name}": getattr(block, name) for name in SUMS})
    for number, ranking in enumerate(statistics.rankings):
        tensors.update({f"ranking.{number:04d}.{k}": t for k, t in ranking.tensors().items()})
    header = {
        "format": FORMAT,
        "tokens": [block.tokens for block in blocks],
        "windows": [block.windows for block in blocks],
        "groups": [[[g.channels, g.experts] for g in block.groups] for block in blocks],
        "expert_tokens": [block.expert_tokens for block in blocks],
        "grams": [[[g.channels, g.tokens, g.digest] for g in block.grams] for block in blocks],
        "rankings": [ranking.made_by for ranking in statistics.rankings],
        "influence_metrics": INFLUENCE_METRICS,
        "model_fingerprint": statistics.model_fingerprint,
        "provenance": statistics.provenance,
    }
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata={"cfsp": json.dumps(header)})
        _save_grams(statistics, path)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise CfspError(f"cannot write statistics {path}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _block(file: Any, header: dict[str, Any], number: int, folder: GramFolder) -> BlockStatistics:
    grams = header["grams"][number] if "grams" in header else ()
    return BlockStatistics(
        header["tokens"][number],
        header["windows"][number],
        **{name: file.get_tensor(f"block.{number:04d}.{name}") for name in SUMS},
        groups=tuple(ChannelGroup(*group) for group in header["groups"][number]),
        expert_tokens=tuple(header["expert_tokens"][number]),
        grams=tuple(
            StoredGram(folder, number, ffn, channels, tuple(tokens), digest)
            for ffn, (channels, tokens, digest) in enumerate(grams)
        ),
    )


def load_statistics(path: str | Path) -> Statistics:
    """Read what :func:`save_statistics` wrote; Gram matrices are read when they are needed.

    Raises:
        CfspError: no such file, or not a statistics file.
    """
    folder = GramFolder(gram_path(Path(path)))
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("cfsp", "{}"))
            if header.get("format") not in READABLE:
                raise CfspError(f"{path} is not a statistics file of this version ({FORMAT})")
            count = len(header["tokens"])
            blocks = tuple(_block(file, header, number, folder) for number in range(count))
            rankings = []
            for number, made_by in enumerate(header.get("rankings", ())):
                prefix = f"ranking.{number:04d}."
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
                tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
                rankings.append(ranking_of(made_by, tensors))
    except (OSError, SafetensorError) as error:
        raise CfspError(f"cannot read statistics {path}: {error}") from None
    return Statistics(blocks, header["model_fingerprint"], header["provenance"], tuple(rankings))
