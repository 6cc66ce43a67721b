"""The channels of an FFN: its matrices, the groups that share a width, where channels lie."""

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

    def add(self, x: torch.Tensor, routing: Routing | None = None) -> None:
        """``x``: the activation [..., F], whose statistics were added; ``routing``: of experts."""


@dataclass(frozen=True)
class FFNWeights:
    """The matrices of one FFN, torch Linear layout. F channels, D hidden size."""

    gate: torch.Tensor | None
    """[F, D], or None where the FFN has no gate."""
    up: torch.Tensor
    """[F, D]."""
    down: torch.Tensor
    """[D, F]."""

    def contiguous(self) -> "FFNWeights":
        """With unit strides along the last dimension, as the ops take them: copies where a family
        keeps its matrices otherwise."""
        gate = None if self.gate is None else self.gate.contiguous()
        return FFNWeights(gate, self.up.contiguous(), self.down.contiguous())


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
class ChannelGroup:
    """Channels that share one width: those of an FFN, or of each of a number of experts."""

    channels: int
    """F, of one expert."""
    experts: int = 1

    @property
    def total(self) -> int:
        """Channels of all experts."""
        return self.channels * self.experts


def sizes_of(groups: Sequence[ChannelGroup]) -> list[int]:
    """Channels of every FFN, and of every expert of those that have some."""
    return [group.channels for group in groups for _ in range(group.experts)]


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
class ChannelAxis:
    """The dimension of a parameter along which channels lie."""

    dimension: int
    copies: int = 1
    """How often all channels come in turn: 2 where gate and up are one matrix."""
    interleaved: bool = False
    """Whether the copies of a channel lie side by side."""

    def places(self, kept: torch.Tensor, channels: int) -> torch.Tensor:
        """Where ``kept`` of a number of channels lie, in order."""
        copies = torch.arange(self.copies, device=kept.device)
        if self.interleaved:
            return (kept[:, None] * self.copies + copies).flatten()
        return (copies[:, None] * channels + kept).flatten()

    def cut(
        self, tensor: torch.Tensor, kept: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A vector or matrix with only the kept channels [width] int64; in ``out``, if given."""
        kept, channels = kept.to(tensor.device), tensor.shape[self.dimension] // self.copies
        index = self.places(kept, channels)
        if tensor.dim() == 1:
            return torch.index_select(tensor, 0, index, out=out)
        return (gather_rows if self.dimension == 0 else gather_columns)(tensor, index, out=out)
