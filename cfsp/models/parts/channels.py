"""The channels of an FFN: its matrices, the units that share a width, where channels lie."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from cfsp_kernels import gather_columns, gather_rows

from ...errors import CfspError


@dataclass(frozen=True)
class Routing:
    """Whose the rows of an activation [T, F] are, one expert after the other."""

    offsets: torch.Tensor
    """[E + 1] int32, where the rows of each begin; those after the last are of none."""
    experts: torch.Tensor
    """[T] int64, the expert of each row."""
    tokens: torch.Tensor
    """[T] int64, its position among the tokens of the call."""


def expert_offsets(experts: torch.Tensor, count: int) -> torch.Tensor:
    """[count + 1] int32, where the rows of each expert begin among rows in order of ``experts``."""
    every = torch.arange(count + 1, device=experts.device)
    return torch.searchsorted(experts, every, out_int32=True)


class Observer(Protocol):
    """What an FFN hands its activation to, in each run of its block."""

    def totals(self) -> torch.Tensor:
        """[2, F], or [2, E * F] for E experts, fp64: what statistics of this run are added to."""

    def outputs(self) -> torch.Tensor:
        """[2, E * 2] fp64, of E experts: what the sums and sums of squares are added to of the norm
        of an expert's output, and of that times the token's share."""

    def add(self, x: torch.Tensor, routing: Routing | None = None) -> None:
        """``x``: the activation [..., F], whose statistics were added; ``routing``: of experts."""


@dataclass(frozen=True)
class PartWeights:
    """The matrices of one part, torch Linear layout. F columns of down, D hidden size."""

    gate: torch.Tensor | None
    """[F, D], or None where the part has no gate."""
    up: torch.Tensor | None
    """[F, D], or None of an attention."""
    down: torch.Tensor
    """[D, F]."""

    def contiguous(self) -> "PartWeights":
        """With unit strides along the last dimension, as the ops take them: copies where a family
        keeps its matrices otherwise."""
        gate, up = (None if x is None else x.contiguous() for x in (self.gate, self.up))
        return PartWeights(gate, up, self.down.contiguous())


class CutDown(NamedTuple):
    """The down projection of a pruned FFN."""

    weight: torch.Tensor
    """[D, width]."""
    bias: torch.Tensor | None
    """[D], to be added to the bias that the projection may have."""


def in_place(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """As the room of what is cut: matrices of experts go where they were, one expert after the
    other, in front of those that are still to be cut. Nothing else has room there."""
    raise NotImplementedError


Compensate = Callable[[int, torch.Tensor, torch.Tensor | None], CutDown]
"""Takes (number of the expert, its down [D, F], where [D, width] of it may go)."""


@dataclass(frozen=True)
class Units:
    """What of a part of a block goes or stays as a whole: channels of an FFN, or of each of several
    experts, all of one width; KV groups of an attention."""

    count: int
    """Of one expert."""
    experts: int = 1
    columns: int = 1
    """Columns of the down projection that a unit is: those of all heads of a KV group."""

    @property
    def size(self) -> int:
        """Columns of the down projection of one expert."""
        return self.count * self.columns

    @property
    def total(self) -> int:
        """Columns of all experts."""
        return self.size * self.experts

    @property
    def are_channels(self) -> bool:
        """Whether a unit is a channel."""
        return self.columns == 1

    def scores(self, of_columns: torch.Tensor) -> torch.Tensor:
        """[experts * count], the mean over the columns of every unit."""
        return (
            of_columns.unflatten(0, (-1, self.columns)).mean(1) if self.columns > 1 else of_columns
        )

    def columns_of(self, kept: torch.Tensor) -> torch.Tensor:
        """The columns of some units [..., n] int64, [..., n * columns], in their order."""
        own = torch.arange(self.columns, device=kept.device)
        return (kept[..., None] * self.columns + own).flatten(-2)


def sizes_of(units: Sequence[Units]) -> list[int]:
    """Columns of the down projection of every part, and of every expert of those that have some."""
    return [own.size for own in units for _ in range(own.experts)]


EXPERT_WIDTH_MULTIPLE = 8
"""Widths of experts: their grouped matrix products take rows of whole 16 bytes only."""


def check_expert_width(width: int, experts: int, name: str = "width_multiple") -> None:
    """Raise CfspError for a width, or multiple of widths, at which experts cannot run."""
    if experts > 1 and width % EXPERT_WIDTH_MULTIPLE:
        raise CfspError(
            f"{name} {width} is no multiple of {EXPERT_WIDTH_MULTIPLE}, as the grouped matrix "
            "products of experts need it"
        )


@dataclass(frozen=True)
class UnitAxis:
    """The dimension of a parameter along which units lie."""

    dimension: int
    sections: tuple[int, ...] = (1,)
    """Places that a unit takes in each of the sections that come in turn, each of all units: (1, 1)
    where gate and up are one matrix, gate first; (2,) where those of a channel lie side by side."""
    fixed: int = 0
    """Places after them that are of no unit: the keys and values that all heads share."""

    def size(self, count: int) -> int:
        """Of the dimension, for a number of units."""
        return count * sum(self.sections) + self.fixed

    def count(self, size: int) -> int:
        """The number of units, for a size of the dimension."""
        return (size - self.fixed) // sum(self.sections)

    def places(self, kept: torch.Tensor, count: int) -> torch.Tensor:
        """Where ``kept`` of a number of units lie, in order, with what is of no unit."""
        found, start = [], 0
        for each in self.sections:
            own = torch.arange(each, device=kept.device)
            found.append((start + kept[:, None] * each + own).flatten())
            start += count * each
        return torch.cat([*found, torch.arange(start, start + self.fixed, device=kept.device)])

    def cut(
        self, tensor: torch.Tensor, kept: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A vector or matrix with only the kept units [n] int64; in ``out``, if given."""
        kept, count = kept.to(tensor.device), self.count(tensor.shape[self.dimension])
        index = self.places(kept, count)
        if tensor.dim() == 1:
            return torch.index_select(tensor, 0, index, out=out)
        return (gather_rows if self.dimension == 0 else gather_columns)(tensor, index, out=out)
