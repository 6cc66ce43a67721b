"""Scores of every FFN's channels and, where an allocator asks, the error at every width."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate, pairwise

import torch
from torch import nn
from tqdm import tqdm

from ..calibration.curves import (
    ErrorCurve,
    Ranking,
    curve_widths,
    hidden_energy,
    of_experts,
    weighted,
)
from ..calibration.statistics import BlockStatistics, Statistics
from ..errors import CfspError
from ..models.layouts import Layout
from ..models.parts.channels import PartWeights, Units
from .allocation import ALLOCATORS
from .compensation import COMPENSATIONS
from .obs import error_curve, group_removal_order, order_of, plain_error_curve
from .recipe import Recipe
from .scoring import SCORERS, moments_of

Weights = Callable[[int], Sequence[PartWeights]]
"""Block number -> the matrices of its FFNs, of every expert."""


def made_by(recipe: Recipe) -> tuple[str, str, float]:
    """See :attr:`Ranking.made_by`; blockwise fitting begins with least squares."""
    compensation = "least-squares" if recipe.blockwise else recipe.resolved_compensation
    return recipe.scorer, compensation, recipe.damping


def stored_ranking(statistics: Statistics, recipe: Recipe) -> Ranking | None:
    """The ranking for a recipe that the statistics have already, with error curves where its
    allocator reads them; None where they have none."""
    allocator = ALLOCATORS[recipe.resolved_allocator]
    for found in statistics.rankings:
        same = found.made_by == made_by(recipe)
        if not allocator.needs_curves:
            damped = SCORERS[recipe.scorer].needs_gram
            same = found.scorer == recipe.scorer
            same &= found.damping == recipe.damping or not damped
        if same and (found.curves or not allocator.needs_curves):
            return found
    return None


def check_ranked(statistics: Statistics, recipe: Recipe) -> None:
    """Raise CfspError where a plan needs what only a calibration for it can make."""
    if recipe.ranks_by_gram and stored_ranking(statistics, recipe) is None:
        allocator, scorer = recipe.resolved_allocator, recipe.scorer
        reader = f"scorer {scorer!r}" if SCORERS[scorer].needs_gram else f"allocator {allocator!r}"
        raise CfspError(
            f"{reader} needs Gram matrices, which are there in a calibration alone: calibrate with "
            f"`scorer={scorer!r}`, `allocator={allocator!r}`, "
            f"`compensation={recipe.resolved_compensation!r}` and `damping={recipe.damping:g}`"
        )


def rank(
    statistics: Statistics, weights: Weights, recipe: Recipe, *, progress: bool = False
) -> Ranking:
    """Score the channels of every FFN; the ranking that the statistics have, where they have it.

    ``weights`` are called only for scorers that read weights. CfspError where Gram matrices are
    needed, and the statistics have no ranking that was made from them.
    """
    found = stored_ranking(statistics, recipe)
    if found is not None:
        return found
    check_ranked(statistics, recipe)
    shown = progress and SCORERS[recipe.scorer].reads_weights
    bar = tqdm(statistics.blocks, desc="score", unit="block", disable=not shown)
    scores = []
    for number, block in enumerate(bar):
        scores += rank_block(block, partial(weights, number), recipe)[0]
    return Ranking(*made_by(recipe), tuple(scores))


class Ranker:
    """Scores every block of a calibration while it has weights and Gram matrices."""

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        self.layout, self.recipe = layout, recipe
        self.scores: list[torch.Tensor] = []
        self.curves: list[ErrorCurve] = []

    def visit(self, number: int, block: nn.Module, statistics: BlockStatistics) -> None:
        """Score the FFNs of a block; error curves too, where the allocator begins with them."""
        weights = partial(self.layout.part_weights, block)
        try:
            scores, errors = rank_block(statistics, weights, self.recipe, self.recipe.makes_curves)
        except CfspError as error:
            raise CfspError(f"block {number}: {error}") from error
        self.scores += scores
        self.curves += errors

    def ranking(self) -> Ranking:
        """Of all blocks that were visited."""
        return Ranking(*made_by(self.recipe), tuple(self.scores), tuple(self.curves))


def scaled_curves(
    ranking: Ranking, statistics: Statistics, recipe: Recipe
) -> tuple[ErrorCurve, ...]:
    """The ranking's curves as an allocator may add them up, see :func:`weighted`."""
    if not ranking.curves:
        return ()
    block_of = [number for number, block in enumerate(statistics.blocks) for _ in block.units]
    mse, cosine = (statistics.importance(metric).tolist() for metric in ("mse", "cosine"))
    return weighted(
        ranking.curves,
        statistics.importance(recipe.importance)[block_of],
        [hidden_energy(mse[number], cosine[number]) for number in block_of],
        recipe.resolved_error_scale,
        recipe.importance_exponent,
    )


def rank_block(
    block: BlockStatistics,
    weights: Callable[[], Sequence[PartWeights]],
    recipe: Recipe,
    curves: bool = False,
) -> tuple[list[torch.Tensor], list[ErrorCurve]]:
    """Of every part of a block, the scores [experts * size] of its columns, and the curve where
    asked."""
    weights, parts = cache(weights), block.parts()
    columns = [own.columns for own in block.units for _ in range(own.experts)]
    scores, errors = [], []
    for expert, part in enumerate(parts):
        own = cache(lambda expert=expert: weights()[expert].contiguous())
        scores.append(_scores(part, own, columns[expert], recipe))
        if curves:
            errors.append(_curve(part, own().down, scores[-1], columns[expert], recipe))
    ends = accumulate((own.experts for own in block.units), initial=0)
    ranges = [slice(*pair) for pair in pairwise(ends)]
    tokens = [part.tokens for part in parts]
    return (
        [torch.cat(scores[ffn]) for ffn in ranges],
        [of_experts(errors[ffn], tokens[ffn], block.tokens) for ffn in ranges] if curves else [],
    )


def _scores(
    statistics: BlockStatistics, weights: Callable[[], PartWeights], columns: int, recipe: Recipe
) -> torch.Tensor:
    """Those of the recipe's scorer; of KV groups, of which there are few, by what their removal
    costs after a fit, where one is made and its Gram matrix is at hand."""
    scorer = SCORERS[recipe.scorer]
    if columns == 1 or not recipe.fits or statistics.gram is None:
        return scorer.score(statistics, weights, recipe.damping)
    down, gram = weights().down, moments_of(statistics, "the score of a KV group")
    return group_removal_order(down, gram, columns, recipe.damping).scores


@torch.no_grad()
def _curve(
    statistics: BlockStatistics,
    down: torch.Tensor,
    scores: torch.Tensor,
    columns: int,
    recipe: Recipe,
) -> ErrorCurve:
    """The error of one part or expert when the units of the lowest scores go, each so many columns,
    after the recipe's compensation: without the mean where that puts it back."""
    compensation = COMPENSATIONS[recipe.resolved_compensation]
    units = Units(len(scores) // columns, columns=columns)
    counts = curve_widths(units.count)
    order = units.columns_of(order_of(units.scores(scores)))
    widths = counts * columns
    gram = moments_of(statistics, "an error curve", centred=compensation.adds_bias)
    if compensation.needs_gram:
        errors = error_curve(down, gram, order, widths, recipe.damping)
    else:
        errors = plain_error_curve(down, gram, order, widths)
    return ErrorCurve(counts, errors / len(down))
