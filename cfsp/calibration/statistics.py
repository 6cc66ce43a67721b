"""What a calibration says about every block and channel, and its file."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..errors import CfspError
from ..io.documents import to_json
from ..io.files import saved_file
from ..io.memory import memory_of
from ..io.safetensors import open_header, read_tensors
from ..models.blocks import Blocks
from ..models.fingerprints import tokens_fingerprint
from ..models.parts.channels import Units, sizes_of
from .curves import Ranking, ranking_of
from .grams import Gram
from .statistics_header import (
    EXPERT_SUMS,
    FORMAT,
    INFLUENCE_METRICS,
    SUMS,
    StatisticsHeader,
    check_tensors,
    decoded,
)


@dataclass(frozen=True)
class BlockStatistics:
    """Sums over the calibration tokens for one block of F columns, the inputs of its down and
    output projections: channels, and values of heads. All on the CPU, in fp64."""

    tokens: int
    windows: int
    sum: torch.Tensor
    """[F], sum of the input of these projections."""
    sum_of_squares: torch.Tensor
    """[F], sum of its square."""
    influence: torch.Tensor
    """[4], sums of the metrics of INFLUENCE_METRICS over tokens."""
    units: tuple[Units, ...] = ()
    """The parts whose columns these are, one after the other; when not given, a single FFN where
    there are columns."""
    expert_tokens: tuple[int, ...] = ()
    """Tokens that each part saw, and each expert of those that have some; () where all saw all."""
    expert_energy: torch.Tensor = torch.empty(0, dtype=torch.float64)  # noqa: RUF009 - not changed
    """[E], of every expert of a part that has several: sum over its tokens of the squared norm of
    its output."""
    expert_gated: torch.Tensor = torch.empty(0, dtype=torch.float64)  # noqa: RUF009 - not changed
    """[E], sum over its tokens of the norm of its output times the token's share."""
    grams: tuple[Gram, ...] = ()
    """Gram matrices of each part, and of each expert of those that have some, on the device, while
    their block is at work; () otherwise."""

    def __post_init__(self) -> None:
        if not self.units and len(self.sum):
            object.__setattr__(self, "units", (Units(len(self.sum)),))
        routed = sum(own.experts for own in self.units if own.experts > 1)
        for name in EXPERT_SUMS if routed else ():
            if not len(getattr(self, name)):  # not known
                object.__setattr__(self, name, torch.zeros(routed, dtype=torch.float64))

    @property
    def gram(self) -> Gram | None:
        """The Gram matrix of a block with a single part, or of what :meth:`parts` gives."""
        return self.grams[0] if len(self.grams) == 1 else None

    def parts(self) -> tuple["BlockStatistics", ...]:
        """The statistics of every part, and of every expert of those that have some, each alone."""
        if len(self.expert_tokens) < 2:
            return (self,) if self.units else ()
        sizes = sizes_of(self.units)
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


@dataclass(frozen=True)
class Statistics:
    """The artefact of a calibration: serves any number of budgets."""

    blocks: tuple[BlockStatistics, ...]
    model_fingerprint: str
    provenance: dict[str, Any]
    """Calibration settings, tokens' hash, micro-batch, dtype and versions."""
    rankings: tuple[Ranking, ...] = ()
    """Scores, and error curves where the recipe of the calibration reads them."""

    @property
    def intermediate_sizes(self) -> tuple[int, ...]:
        """Columns of every block."""
        return tuple(len(block.sum) for block in self.blocks)

    def importance(self, metric: str) -> torch.Tensor:
        """[L] fp64, coarse importance of every block: its mean influence per token."""
        return torch.tensor([b.importance(metric) for b in self.blocks], dtype=torch.float64)


def statistics_fingerprint(statistics: Statistics) -> str:
    """SHA-256 over everything that statistics hold, as 64 hexadecimal digits."""
    digest = hashlib.sha256(to_json(_header(statistics)).encode())
    for name, tensor in sorted(_tensors(statistics).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(memory_of(tensor.contiguous()))
    return digest.hexdigest()


def _header(statistics: Statistics) -> dict[str, Any]:
    """All but the tensors, as plain values."""
    blocks = statistics.blocks
    return {
        "format": FORMAT,
        "tokens": [block.tokens for block in blocks],
        "windows": [block.windows for block in blocks],
        "units": [[[u.count, u.experts, u.columns] for u in block.units] for block in blocks],
        "expert_tokens": [block.expert_tokens for block in blocks],
        "rankings": [
            [*ranking.made_by[:2], float(ranking.damping)] for ranking in statistics.rankings
        ],
        "influence_metrics": INFLUENCE_METRICS,
        "model_fingerprint": statistics.model_fingerprint,
        "provenance": statistics.provenance,
    }


def _tensors(statistics: Statistics) -> dict[str, torch.Tensor]:
    tensors = {}
    for number, block in enumerate(statistics.blocks):
        names = (*SUMS, *(EXPERT_SUMS if len(block.expert_energy) else ()))
        tensors.update({f"block.{number:04d}.{name}": getattr(block, name) for name in names})
    for number, ranking in enumerate(statistics.rankings):
        tensors.update({f"ranking.{number:04d}.{k}": t for k, t in ranking.tensors().items()})
    return tensors


def check_model(what: str, sizes: tuple[int, ...], made_with: str, model: Blocks) -> None:
    """Raise CfspError where ``what``, made with so many columns in every block and this
    fingerprint, is of another model, or of other parts of it."""
    own = model.layout.columns(model.model)
    if sizes != own:
        raise CfspError(
            f"{what} another model, or other `units` of it: {len(sizes)} blocks with {sum(sizes)} "
            f"channels in all, the model has {len(own)} with {sum(own)}"
        )
    if made_with != model.fingerprint():
        raise CfspError(f"{what} another model: same shapes, different weights")


def check_statistics(statistics: Statistics, model: Blocks) -> None:
    """Raise CfspError where the statistics were made with another model."""
    sizes, made_with = statistics.intermediate_sizes, statistics.model_fingerprint
    check_model("the statistics are of", sizes, made_with, model)


def check_text(statistics: Statistics, windows: torch.Tensor) -> None:
    """Raise CfspError where calibration windows [N, S], drawn anew, are not those that the
    statistics were made of."""
    known = statistics.provenance
    if "tokens_sha256" not in known:
        return
    if tokens_fingerprint(windows[: known["windows"]]) != known["tokens_sha256"]:
        dataset = known.get("calibration", {}).get("dataset", "of the calibration")
        raise CfspError(
            f"dataset {dataset} gives other text than when the statistics were made: calibrate "
            "again"
        )


def save_statistics(statistics: Statistics, path: str | Path) -> None:
    """Write statistics as one safetensors file, whole or not at all. Raises CfspError where they
    hold what :func:`load_statistics` would refuse."""
    tensors = _tensors(statistics)
    sums = {"sha256": statistics_fingerprint(statistics)}
    text = to_json({**_header(statistics), **sums})
    check_tensors(decoded(text), tensors)
    with saved_file(path, "statistics") as partial:
        partial.write_bytes(save(tensors, metadata={"cfsp": text}))


def _block(
    header: StatisticsHeader, number: int, tensors: Mapping[str, torch.Tensor]
) -> BlockStatistics:
    prefix, none = f"block.{number:04d}.", torch.empty(0, dtype=torch.float64)
    total, squares, influence = (tensors[prefix + name] for name in SUMS)
    energy, gated = (tensors.get(prefix + name, none) for name in EXPERT_SUMS)
    return BlockStatistics(
        header.tokens[number],
        header.windows[number],
        total,
        squares,
        influence,
        tuple(Units(*own) for own in header.units[number]),
        header.expert_tokens[number],
        expert_energy=energy,
        expert_gated=gated,
    )


def load_statistics(path: str | Path) -> Statistics:
    """Read what :func:`save_statistics` wrote.

    Raises:
        CfspError: no such file, not a statistics file of this version, or damaged.
    """
    try:
        file = open_header(Path(path))
        header = decoded(file.metadata.get("cfsp", "{}"))
        check_tensors(header, file.tensors)
        tensors = read_tensors(file.tensors)
        check_tensors(header, tensors)
    except CfspError as error:
        raise CfspError(f"cannot read statistics {path}: {error}") from None
    blocks = tuple(_block(header, number, tensors) for number in range(len(header.tokens)))
    rankings = tuple(
        ranking_of(made_by, f"ranking.{number:04d}.", tensors)
        for number, made_by in enumerate(header.rankings)
    )
    found = Statistics(blocks, header.model_fingerprint, header.provenance, rankings)
    if statistics_fingerprint(found) != header.sha256:
        raise CfspError(f"cannot read statistics {path}: its checksum does not match: damaged")
    return found
