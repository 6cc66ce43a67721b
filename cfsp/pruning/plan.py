"""The pruning plan: which channels of which block stay. Small, printable, editable."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, islice, pairwise
from typing import TypeVar

import torch
from rich.table import Table

from ..calibration.curves import ErrorCurve, Ranking
from ..calibration.statistics import Statistics
from ..errors import CfspError
from ..models.parts.channels import Units, sizes_of
from .allocation import AllocationProblem, allocate_widths, equal_widths
from .budget import ChannelBudget
from .least_squares import removed_channels
from .ranking import Weights, rank, scaled_curves
from .recipe import Recipe

QUANTILES = 33
T = TypeVar("T")
WidthSearch = Callable[
    [Callable[[Sequence[int]], "PruningPlan"], tuple[int, ...], AllocationProblem], tuple[int, ...]
]
"""(plan of given widths, widths to begin with, the problem they solve) -> better widths."""


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


def make_plan(
    statistics: Statistics,
    weights: Weights,
    recipe: Recipe,
    budget: ChannelBudget | None = None,
    *,
    experts: Sequence[torch.Tensor | None] = (),
    search: WidthSearch | None = None,
    progress: bool = False,
) -> PruningPlan:
    """Score, allocate, select; raises CfspError where no widths meet the budget.

    ``weights`` as for :func:`rank`. ``budget`` is what the recipe's comes to in this model; None:
    the recipe has a sparsity. ``experts``: those of every block that stay; (): all. ``search`` is
    for allocator ``search``.
    """
    if recipe.experts is not None and not experts:
        raise CfspError("`experts` is of a whole model: give the model itself")
    if budget is None and recipe.budget is not None:
        raise CfspError(f"budget {recipe.budget} is of a whole model: give the model itself")
    if budget is None and recipe.adds_kinds:
        raise CfspError(f"units {recipe.units} are counted in parameters: give the model itself")
    if recipe.searches and search is None:
        raise CfspError("allocator 'search' measures pruned models: give the model itself")
    ranking = rank(statistics, weights, recipe, progress=progress)
    kept = experts or [None] * len(statistics.blocks)
    dense = [(number, own) for number, block in enumerate(statistics.blocks) for own in block.units]
    parts = [
        (n, own if own.experts == 1 or (few := kept[n]) is None else replace(own, experts=len(few)))
        for n, own in dense
    ]
    budget = budget or ChannelBudget(recipe.sparsity, tuple(own.experts for _, own in parts))
    last = len(statistics.blocks) - 1
    problem = AllocationProblem(
        statistics.importance(recipe.importance)[[number for number, _ in parts]],
        tuple(
            of_left(scores, own, kept[number])
            for scores, (number, own) in zip(ranking.scores, dense, strict=True)
        ),
        budget.sparsity,
        tuple(own for _, own in parts),
        budget.costs,
        tuple(recipe.steps(own, protected=number in (0, last)) for number, own in parts),
        () if recipe.uniform else scaled_curves(ranking, statistics, recipe),
        budget.kv,
    )

    def widths_at(sparsity: float) -> tuple[int, ...]:
        asked = replace(problem, sparsity=sparsity)
        if recipe.uniform:
            return equal_widths(problem.steps, sparsity)
        return allocate_widths(asked, recipe.resolved_allocator)

    widths = budget.widths(widths_at, problem.steps, equal=recipe.uniform)
    plan_of = _selection(statistics, ranking, recipe, kept)
    return plan_of(search(plan_of, widths, problem) if search is not None else widths)


def _selection(
    statistics: Statistics,
    ranking: Ranking,
    recipe: Recipe,
    experts: Sequence[torch.Tensor | None],
) -> Callable[[Sequence[int]], PruningPlan]:
    """Gives the plan of a count for every part; a block is selected once for the same widths."""
    importance = statistics.importance(recipe.importance).tolist()
    ends = list(accumulate((len(block.units) for block in statistics.blocks), initial=0))

    @cache
    def of_block(number: int, widths: tuple[int, ...]) -> BlockPlan:
        own, parts = statistics.blocks[number].units, slice(*ends[number : number + 2])
        few, curves = experts[number], ranking.curves[parts]
        empty = BlockPlan((), importance[number], own, (), curves, few)
        return with_highest(empty, ranking.scores[parts], widths)

    def plan_of(widths: Sequence[int]) -> PruningPlan:
        parts = (tuple(widths[start:end]) for start, end in pairwise(ends))
        blocks = tuple(of_block(number, own) for number, own in enumerate(parts))
        return PruningPlan(blocks, statistics.model_fingerprint, recipe)

    return plan_of


def with_highest(
    block: BlockPlan, scores: Sequence[torch.Tensor], counts: Sequence[int]
) -> BlockPlan:
    """The block with the units of the highest scores, means of those [experts * size] of the
    columns of every part, of the experts that stay."""
    kept, of_channels = [], [torch.empty(0)]
    for dense, own, count in zip(scores, block.units, counts, strict=True):
        of_part = of_left(dense, own, block.experts)
        of_units = own.scores(of_part).unflatten(0, (-1, own.count))
        kept.append(torch.stack([select_channels(x, count) for x in of_units]))
        of_channels += [of_part] if own.are_channels else []
    quantiles = score_quantiles(torch.cat(of_channels))
    return replace(block, kept=tuple(kept), score_quantiles=quantiles)


def of_left(scores: torch.Tensor, units: Units, experts: torch.Tensor | None) -> torch.Tensor:
    """Of the scores [E * size] of a part's columns, those of the ``experts`` that stay."""
    if experts is None or units.experts == 1:
        return scores
    return scores.unflatten(0, (units.experts, -1))[experts].flatten()


def select_channels(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of the ``width`` highest scores [F], [width] int64 in ascending order; equal scores
    go to the lower index. CfspError where a score is NaN, or the width is not in [0, F]."""
    if not 0 <= width <= len(scores):
        raise CfspError(f"width must be in [0, {len(scores)}], got {width}")
    if scores.isnan().any():
        raise CfspError(f"score of channel {int(scores.isnan().nonzero()[0])} is NaN")
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:width].sort().values


def score_quantiles(scores: torch.Tensor) -> tuple[float, ...]:
    """The spread of scores [F]: the finite ones at 33 evenly spaced ranks, lowest first, to 5
    digits; () where none is."""
    ordered = scores[scores.isfinite()].sort().values
    if not len(ordered):
        return ()
    ranks = torch.linspace(0, len(ordered) - 1, QUANTILES, dtype=torch.float64).round().long()
    return tuple(float(f"{value:.5g}") for value in ordered[ranks].tolist())
