"""From statistics to a plan: score, allocate, select."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise

import torch

from ..calibration.curves import Ranking
from ..calibration.statistics import Statistics
from ..errors import CfspError
from ..models.parts.channels import Units
from .allocation import AllocationProblem, allocate_widths, equal_widths
from .budget import ChannelBudget
from .plan import QUANTILES, BlockPlan, PruningPlan
from .ranking import Weights, rank, scaled_curves
from .recipe import Recipe

WidthSearch = Callable[
    [Callable[[Sequence[int]], "PruningPlan"], tuple[int, ...], AllocationProblem], tuple[int, ...]
]
"""(plan of given widths, widths to begin with, the problem they solve) -> better widths."""


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
    problem = AllocationProblem(
        statistics.importance(recipe.importance)[[number for number, _ in parts]],
        tuple(
            of_left(scores, own, kept[number])
            for scores, (number, own) in zip(ranking.scores, dense, strict=True)
        ),
        budget.sparsity,
        tuple(own for _, own in parts),
        budget.costs,
        recipe.steps(parts, len(statistics.blocks)),
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
