"""The pruning plan: which channels of which block stay. Small, printable, editable."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise

import torch
from rich.table import Table

from ..calibration.curves import ErrorCurve, Ranking
from ..calibration.statistics import Statistics
from ..errors import CfspError
from ..models.ffns.channels import ChannelGroup, sizes_of
from .allocation import AllocationProblem, allocate_widths, equal_widths
from .budget import ChannelBudget
from .least_squares import removed_channels
from .ranking import Weights, rank, scaled_curves
from .recipe import Recipe

QUANTILES = 33
WidthSearch = Callable[
    [Callable[[Sequence[int]], "PruningPlan"], tuple[int, ...], AllocationProblem], tuple[int, ...]
]
"""(plan of given widths, widths to begin with, the problem they solve) -> better widths."""


@dataclass(frozen=True)
class BlockPlan:
    """What one block keeps."""

    kept: tuple[torch.Tensor, ...]
    """Kept channels of every FFN: [experts, width] int64, ascending, counted in the expert; () of a
    block without one."""
    importance: float
    groups: tuple[ChannelGroup, ...]
    """The dense channels of every FFN."""
    score_quantiles: tuple[float, ...] = ()
    """Spread of the scores of all channels, see :func:`score_quantiles`."""
    error_curves: tuple[ErrorCurve, ...] = ()
    """Error of every FFN, with the recipe's compensation; () where the ranking had none."""

    @property
    def intermediate_size(self) -> int:
        """Channels of all FFNs and experts before pruning."""
        return sum(group.total for group in self.groups)

    @property
    def ffn_widths(self) -> tuple[int, ...]:
        """Width of every FFN, that of one expert where it has several."""
        return tuple(kept.shape[1] for kept in self.kept)

    @property
    def width(self) -> int:
        """Channels kept in all FFNs and experts."""
        return sum(kept.numel() for kept in self.kept)

    @property
    def share(self) -> float:
        """Of its channels that stay; all of a block without an FFN."""
        return self.width / self.intermediate_size if self.groups else 1.0

    @property
    def flat_kept(self) -> torch.Tensor:
        """[width] int64, ascending: kept channels, counted through all FFNs and experts."""
        experts = (channels for kept in self.kept for channels in kept)
        starts = accumulate(sizes_of(self.groups), initial=0)
        counted = [start + channels for channels, start in zip(experts, starts, strict=False)]
        return torch.cat([torch.empty(0, dtype=torch.int64), *counted])

    @property
    def removed(self) -> torch.Tensor:
        """[intermediate_size - width] int64, ascending: the others, counted as ``flat_kept``."""
        return removed_channels(self.flat_kept, self.intermediate_size)


@dataclass(frozen=True)
class PruningPlan:
    """Kept channels of every block, with the recipe and the model they are for."""

    blocks: tuple[BlockPlan, ...]
    model_fingerprint: str
    recipe: Recipe

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels kept in every block."""
        return tuple(block.width for block in self.blocks)

    @property
    def sparsity(self) -> float:
        """Fraction of all FFN channels that goes."""
        return 1 - sum(self.widths) / sum(block.intermediate_size for block in self.blocks)

    def warn_of_rounding(self) -> None:
        """Warn where nothing goes, or a sparsity is missed by a point of percentage or more."""
        asked, multiple = self.recipe.sparsity, self.recipe.width_multiple
        hint = "" if multiple == 1 else "; a smaller `width_multiple` comes closer"
        if self.sparsity == 0:
            warnings.warn(
                f"the plan removes nothing, in multiples of {multiple}{hint}", stacklevel=2
            )
        elif self.recipe.budget is None and abs(self.sparsity - asked) >= 0.01:
            warnings.warn(
                f"the plan removes {self.sparsity:.2%} of the FFN channels, not {asked:.2%}, in "
                f"multiples of {multiple}{hint}",
                stacklevel=2,
            )

    def table(self) -> Table:
        """The plan as a table for a terminal."""
        table = Table(title=f"{self.recipe.scorer}: {self.sparsity:.2%} of FFN channels removed")
        for title in ("block", "importance", "channels", "kept", ""):
            table.add_column(title, justify="left" if title == "" else "right")
        for number, block in enumerate(self.blocks):
            kept, bar = f"{block.width} ({block.share:.1%})", "█" * round(block.share * 24)
            sizes = (f"{block.importance:.5f}", str(block.intermediate_size))
            table.add_row(str(number), *sizes, *((kept, bar) if block.groups else ()))
        return table


def make_plan(
    statistics: Statistics,
    weights: Weights,
    recipe: Recipe,
    budget: ChannelBudget | None = None,
    *,
    search: WidthSearch | None = None,
    progress: bool = False,
) -> PruningPlan:
    """Score, allocate, select; raises CfspError where no widths meet the budget.

    ``weights`` as for :func:`rank`. ``budget`` is what the recipe's comes to in this model; None:
    the recipe has a sparsity. ``search`` is for allocator ``search``.
    """
    if budget is None and recipe.budget is not None:
        raise CfspError(f"budget {recipe.budget} is of a whole model: give the model itself")
    if recipe.searches and search is None:
        raise CfspError("allocator 'search' measures pruned models: give the model itself")
    ranking = rank(statistics, weights, recipe, progress=progress)
    ffns = [(number, ffn) for number, block in enumerate(statistics.blocks) for ffn in block.groups]
    sizes, experts = [ffn.channels for _, ffn in ffns], tuple(ffn.experts for _, ffn in ffns)
    budget = budget or ChannelBudget(recipe.sparsity, experts)
    problem = AllocationProblem(
        statistics.importance(recipe.importance)[[number for number, _ in ffns]],
        ranking.scores,
        budget.sparsity,
        experts,
        budget.costs,
        recipe.width_multiple,
        () if recipe.uniform else scaled_curves(ranking, statistics, recipe),
    )

    def widths_at(sparsity: float) -> tuple[int, ...]:
        if recipe.uniform:
            return equal_widths(sizes, sparsity, recipe.width_multiple)
        asked = replace(problem, sparsity=sparsity)
        return allocate_widths(asked, recipe.resolved_allocator, recipe.width_multiple)

    widths = budget.widths(widths_at, sizes, recipe.width_multiple, equal=recipe.uniform)
    plan_of = _selection(statistics, ranking, recipe)
    return plan_of(search(plan_of, widths, problem) if search is not None else widths)


def _selection(
    statistics: Statistics, ranking: Ranking, recipe: Recipe
) -> Callable[[Sequence[int]], PruningPlan]:
    """Gives the plan of a width for every FFN; a block is selected once for the same widths."""
    importance = statistics.importance(recipe.importance).tolist()
    ends = list(accumulate((len(block.groups) for block in statistics.blocks), initial=0))

    @cache
    def of_block(number: int, widths: tuple[int, ...]) -> BlockPlan:
        groups, ffns = statistics.blocks[number].groups, slice(*ends[number : number + 2])
        empty = BlockPlan((), importance[number], groups, (), ranking.curves[ffns])
        return with_highest(empty, ranking.scores[ffns], widths)

    def plan_of(widths: Sequence[int]) -> PruningPlan:
        parts = (tuple(widths[start:end]) for start, end in pairwise(ends))
        blocks = tuple(of_block(number, own) for number, own in enumerate(parts))
        return PruningPlan(blocks, statistics.model_fingerprint, recipe)

    return plan_of


def with_highest(
    block: BlockPlan, scores: Sequence[torch.Tensor], widths: Sequence[int]
) -> BlockPlan:
    """The block with the channels of the highest scores, [experts * channels] of every FFN."""
    kept = tuple(
        torch.stack([select_channels(own, width) for own in of_ffn.chunk(group.experts)])
        for of_ffn, group, width in zip(scores, block.groups, widths, strict=True)
    )
    return replace(
        block, kept=kept, score_quantiles=score_quantiles(torch.cat([torch.empty(0), *scores]))
    )


def select_channels(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of the ``width`` highest scores [F], [width] int64 in ascending order; equal scores
    go to the lower index. CfspError where a score is NaN, or the width is not in [1, F]."""
    if not 1 <= width <= len(scores):
        raise CfspError(f"width must be in [1, {len(scores)}], got {width}")
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
