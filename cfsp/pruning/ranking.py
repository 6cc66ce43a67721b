"""Scores of every FFN's channels and, where an allocator asks, the error at every width."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import accumulate, pairwise

import torch
from tqdm import tqdm

from ..calibration.curves import (
    ErrorCurve,
    Ranking,
    curve_widths,
    hidden_energy,
    of_experts,
    weighted,
)
from ..calibration.statistics import BlockStatistics, Statistics, check_grams
from ..models.channels import FFNWeights
from .allocation import ALLOCATORS, SEARCH
from .compensation import COMPENSATIONS
from .obs import error_curve, order_of, plain_error_curve
from .recipe import Recipe
from .scoring import SCORERS, moments_of

Weights = Callable[[int], Sequence[FFNWeights]]
"""Block number -> the matrices of its FFNs, of every expert."""


def stored_ranking(
    statistics: Statistics, recipe: Recipe, *, curves: bool = False
) -> Ranking | None:
    """The ranking for a recipe that the statistics have already, with error curves where asked for
    and where its allocator reads them; None where they have none."""
    wanted = (recipe.scorer, recipe.resolved_compensation, recipe.damping)
    curves = curves or _asks_for_curves(statistics, recipe)
    fitting = (r for r in statistics.rankings if r.made_by == wanted and (r.curves or not curves))
    return next(fitting, None)


def _asks_for_curves(statistics: Statistics, recipe: Recipe) -> bool:
    """A search begins with them where they can be had."""
    allocator, grams = recipe.resolved_allocator, statistics.gram_folder is not None
    return ALLOCATORS[allocator].needs_curves or (allocator == SEARCH and grams)


def rank(
    statistics: Statistics,
    weights: Weights,
    recipe: Recipe,
    *,
    curves: bool = False,
    progress: bool = False,
) -> Ranking:
    """Score the channels of every FFN; the ranking that the statistics have, where they have it.

    ``weights`` are called only for scorers that read weights, and for error curves; ``curves`` asks
    for these whatever the allocator. CfspError where Gram matrices are needed and not there.
    """
    found = stored_ranking(statistics, recipe, curves=curves)
    if found is not None:
        return found
    curves = curves or _asks_for_curves(statistics, recipe)
    scorer = SCORERS[recipe.scorer]
    reads_grams = scorer.needs_gram or curves
    if reads_grams:
        allocator = f"allocator {recipe.resolved_allocator!r}"
        check_grams(statistics, f"scorer {recipe.scorer!r}" if scorer.needs_gram else allocator)
    scores: list[torch.Tensor] = []
    errors: list[ErrorCurve] = []
    shown = progress and reads_grams
    bar = tqdm(statistics.blocks, desc="rank", unit="block", disable=not shown)
    for number, block in enumerate(bar):
        own_scores, own_errors = _rank_block(block, partial(weights, number), recipe, curves)
        scores += own_scores
        errors += own_errors
    made_by = (recipe.scorer, recipe.resolved_compensation, recipe.damping)
    return Ranking(*made_by, tuple(scores), tuple(errors))


def with_ranking(
    statistics: Statistics,
    weights: Weights,
    recipe: Recipe,
    *,
    curves: bool = True,
    progress: bool = False,
) -> Statistics:
    """The statistics with scores and error curves for a recipe's scorer, compensation and damping:
    :func:`cfsp.save_statistics` keeps them, and plans for any budget need neither weights nor Gram
    matrices then. Arguments and errors as :func:`rank`."""
    ranking = rank(statistics, weights, recipe, curves=curves, progress=progress)
    others = (r for r in statistics.rankings if r.made_by != ranking.made_by)
    return replace(statistics, rankings=(*others, ranking))


def scaled_curves(
    ranking: Ranking, statistics: Statistics, recipe: Recipe
) -> tuple[ErrorCurve, ...]:
    """The ranking's curves as an allocator may add them up, see :func:`weighted`."""
    if not ranking.curves:
        return ()
    block_of = [number for number, block in enumerate(statistics.blocks) for _ in block.groups]
    mse, cosine = (statistics.importance(metric).tolist() for metric in ("mse", "cosine"))
    return weighted(
        ranking.curves,
        statistics.importance(recipe.importance)[block_of],
        [hidden_energy(mse[number], cosine[number]) for number in block_of],
        recipe.error_scale,
        recipe.importance_exponent,
    )


def _rank_block(
    block: BlockStatistics,
    weights: Callable[[], Sequence[FFNWeights]],
    recipe: Recipe,
    curves: bool,
) -> tuple[list[torch.Tensor], list[ErrorCurve]]:
    """Of every FFN of a block, the scores [experts * channels], and the curve where asked."""
    weights, parts = cache(weights), block.ffns()
    scores, errors = [], []
    for expert, part in enumerate(parts):
        own = cache(lambda expert=expert: weights()[expert])
        scores.append(SCORERS[recipe.scorer].score(part, own, recipe.damping))
        if curves:
            errors.append(_curve(part, own().down, scores[-1], recipe))
    ends = accumulate((group.experts for group in block.groups), initial=0)
    ranges = [slice(*pair) for pair in pairwise(ends)]
    tokens = [part.tokens for part in parts]
    return (
        [torch.cat(scores[ffn]) for ffn in ranges],
        [of_experts(errors[ffn], tokens[ffn], block.tokens) for ffn in ranges] if curves else [],
    )


@torch.no_grad()
def _curve(
    statistics: BlockStatistics, down: torch.Tensor, scores: torch.Tensor, recipe: Recipe
) -> ErrorCurve:
    """The error of one FFN or expert when the lowest scores go, after the recipe's compensation:
    without the mean where that puts it back."""
    compensation = COMPENSATIONS[recipe.resolved_compensation]
    widths, order = curve_widths(len(scores)), order_of(scores)
    gram = moments_of(statistics, down, "an error curve", centred=compensation.adds_bias)
    if compensation.needs_gram:
        errors = error_curve(down, gram, order, widths, recipe.damping)
    else:
        errors = plain_error_curve(down, gram, order, widths)
    return ErrorCurve(widths, errors / len(down))
