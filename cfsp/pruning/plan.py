"""The pruning plan: which channels of which block stay. Small, printable, editable."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import TypeVar

import torch
from rich.table import Table

from ..calibration.curves import ErrorCurve
from ..models.parts.channels import Units, sizes_of
from .least_squares import removed_channels
from .recipe import Recipe

QUANTILES = 33
T = TypeVar("T")


@dataclass(frozen=True)
class BlockPlan:
    """What one block keeps."""

    kept: tuple[torch.Tensor, ...]
    """Kept units of every part: [experts, count] int64, ascending, counted in the expert; () of a
    block without one."""
    importance: float
    units: tuple[Units, ...]
    """The dense units of every part."""
    score_quantiles: tuple[float, ...] = ()
    """Spread of the scores of all channels, see :func:`score_quantiles`."""
    error_curves: tuple[ErrorCurve, ...] = ()
    """Error of every part, with the recipe's compensation; () where the ranking had none."""
    experts: torch.Tensor | None = None
    """The routed experts that stay, [n] int64, ascending; None: all. ``kept`` has these alone."""

    @property
    def intermediate_size(self) -> int:
        """Channels of all FFNs and experts before pruning."""
        return sum(own.total for own in self._ffn_units)

    @property
    def columns(self) -> int:
        """Columns of all parts before pruning."""
        return sum(own.total for own in self.units)

    @property
    def dense_experts(self) -> int:
        """Routed experts before pruning."""
        return max((own.experts for own in self.units), default=1)

    @property
    def left_units(self) -> tuple[Units, ...]:
        """The units of every part without the experts that go."""
        pairs = zip(self.units, self.kept, strict=True)
        return tuple(replace(own, experts=len(kept)) for own, kept in pairs)

    def left(self, of_each: Iterable[T]) -> Iterator[list[T]]:
        """Of what there is for each part, and each expert of those that have some, by part what is
        of those that stay."""
        each = iter(of_each)
        for own in self.units:
            found = list(islice(each, own.experts))
            cut = self.experts is not None and own.experts > 1
            yield [found[expert] for expert in self.experts] if cut else found  # type: ignore[union-attr]

    @property
    def counts(self) -> tuple[int, ...]:
        """Units that every part keeps, those of one expert where it has several."""
        return tuple(kept.shape[1] for kept in self.kept)

    @property
    def width(self) -> int:
        """Channels kept in all FFNs and experts."""
        return sum(kept.numel() for kept in self._ffn_kept)

    @property
    def share(self) -> float:
        """Of its channels that stay; all of a block without an FFN."""
        return self.width / self.intermediate_size if self._ffn_units else 1.0

    @property
    def groups(self) -> tuple[torch.Tensor, int] | None:
        """KV groups of its attention that stay, [n] int64 ascending, and how many there were; None
        where they are no units."""
        pairs = zip(self.kept, self.units, strict=True)
        return next(((kept[0], own.count) for kept, own in pairs if not own.are_channels), None)

    @property
    def _ffn_units(self) -> tuple[Units, ...]:
        return tuple(own for own in self.units if own.are_channels)

    @property
    def _ffn_kept(self) -> tuple[torch.Tensor, ...]:
        pairs = zip(self.kept, self.units, strict=True)
        return tuple(kept for kept, own in pairs if own.are_channels)

    @property
    def flat_kept(self) -> torch.Tensor:
        """[width] int64, ascending: kept channels, counted through all dense FFNs and experts."""
        starts = self.left(accumulate(sizes_of(self.units), initial=0))
        counted = [
            channels + start
            for kept, own, of_part in zip(self.kept, self.units, starts, strict=True)
            if own.are_channels
            for channels, start in zip(kept, of_part, strict=True)
        ]
        return torch.cat([torch.empty(0, dtype=torch.int64), *counted])

    @property
    def removed(self) -> torch.Tensor:
        """[intermediate_size - width] int64, ascending: the others, counted as ``flat_kept``."""
        return removed_channels(self.flat_kept, self.intermediate_size)


@dataclass(frozen=True)
class Depth:
    """Which blocks of a model are left."""

    kept: tuple[int, ...]
    """Their numbers, ascending."""
    total: int
    """How many there were."""

    @property
    def gone(self) -> tuple[int, ...]:
        """The numbers of the others."""
        return tuple(number for number in range(self.total) if number not in self.kept)


@dataclass(frozen=True)
class PruningPlan:
    """Kept channels of every block, with the recipe and the model they are for."""

    blocks: tuple[BlockPlan, ...]
    model_fingerprint: str
    recipe: Recipe
    depth: Depth | None = None
    """Which blocks of the model these are; None: all."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels kept in every block."""
        return tuple(block.width for block in self.blocks)

    @property
    def sparsity(self) -> float:
        """Fraction of all FFN channels that goes."""
        return 1 - sum(self.widths) / sum(block.intermediate_size for block in self.blocks)

    @property
    def groups(self) -> tuple[int, int] | None:
        """KV groups that stay in all blocks, and how many there were; None where they are no
        units."""
        known = [block.groups for block in self.blocks if block.groups is not None]
        return (sum(len(kept) for kept, _ in known), sum(of for _, of in known)) if known else None

    @property
    def experts(self) -> tuple[int, int] | None:
        """Routed experts that stay in all blocks, and how many there were; None where all do."""
        known = [(len(b.experts), b.dense_experts) for b in self.blocks if b.experts is not None]
        return (sum(kept for kept, _ in known), sum(of for _, of in known)) if known else None

    @property
    def removed(self) -> str:
        """What goes, in words."""
        found = [f"{self.sparsity:.2%} of FFN channels"]
        for name, of in (("KV groups", self.groups), ("experts", self.experts)):
            if of is not None:
                found.append(f"{of[1] - of[0]} of {of[1]} {name}")
        if self.depth is not None:
            found.append(f"{self.depth.total - len(self.blocks)} of {self.depth.total} blocks")
        return " and ".join(found)

    @property
    def removes_nothing(self) -> bool:
        """Whether all units of all parts stay, and all experts."""
        pairs = ((b.counts, [own.count for own in b.units]) for b in self.blocks)
        same = all(list(counts) == sizes for counts, sizes in pairs)
        return same and all(block.experts is None for block in self.blocks)

    def warn_of_rounding(self) -> None:
        """Warn where nothing goes, or a sparsity is missed by a point of percentage or more."""
        left = sum(u.total for b in self.blocks for u in b.left_units if u.are_channels)
        of_left = 1 - sum(self.widths) / left
        asked, multiple = self.recipe.sparsity, self.recipe.width_multiple
        hint = "" if multiple == 1 else "; a smaller `width_multiple` comes closer"
        if self.recipe.only_blocks:
            return
        if self.removes_nothing:
            warnings.warn(
                f"the plan removes nothing, in multiples of {multiple}{hint}", stacklevel=2
            )
        elif (
            self.recipe.budget is None
            and not self.recipe.adds_kinds
            and abs(of_left - asked) >= 0.01
        ):
            warnings.warn(
                f"the plan removes {of_left:.2%} of the FFN channels, not {asked:.2%}, in "
                f"multiples of {multiple}{hint}",
                stacklevel=2,
            )

    def table(self) -> Table:
        """The plan as a table for a terminal."""
        table = Table(title=f"{self.recipe.scorer}: {self.removed} removed")
        groups = any(block.groups for block in self.blocks)
        routed = self.experts is not None
        titles = (
            "block",
            "importance",
            *(("KV groups",) if groups else ()),
            *(("experts",) if routed else ()),
            "channels",
            "kept",
            "",
        )
        for title in titles:
            table.add_column(title, justify="left" if title == "" else "right")
        for number, block in enumerate(self.blocks):
            kept, bar = f"{block.width} ({block.share:.1%})", "█" * round(block.share * 24)
            own = f"{len(block.groups[0])} of {block.groups[1]}" if block.groups else ""
            few = block.experts
            experts = f"{len(few)} of {block.dense_experts}" if few is not None else ""
            cells = [f"{block.importance:.5f}", *((own,) if groups else ())]
            cells += [experts] if routed else []
            has_ffn = block.intermediate_size > 0
            cells += [str(block.intermediate_size), *((kept, bar) if has_ffn else ())]
            own_number = self.depth.kept[number] if self.depth is not None else number
            table.add_row(str(own_number), *cells)
        return table


def plan_of_all(
    blocks: Sequence[tuple[Units, ...]], recipe: Recipe, fingerprint: str = ""
) -> PruningPlan:
    """The plan that keeps every unit of these blocks, of a model of this fingerprint."""
    found = []
    for units in blocks:
        kept = tuple(torch.arange(own.count).expand(own.experts, -1) for own in units)
        found.append(BlockPlan(kept, 0.0, units))
    return PruningPlan(tuple(found), fingerprint, recipe)
