"""What is checked before a job begins: its files, its recipe and inputs, its memory."""

import sys
from pathlib import Path

from ..calibration.statistics import Statistics, check_statistics
from ..costs.budgets import check_biases, check_recipe
from ..costs.dry_run import Request, estimate_opened
from ..costs.hardware import MemoryBudget
from ..costs.latency import LatencyTable
from ..distributed import Ranks
from ..errors import CfspError
from ..io.hashes import check_hashes, known_hashes
from ..models.finding import weight_files
from ..models.opening import OpenModel
from ..pruning.compaction import check_plan
from ..pruning.plan import PruningPlan
from ..pruning.ranking import check_ranked
from ..pruning.recipe import Recipe
from ..pruning.refit import check_refits
from .depth import DepthCut
from .job import check_reach


def check_files(model: str | Path, progress: bool, ranks: Ranks) -> None:
    """Raise CfspError on every rank where a weight file is not what it should be."""
    problem = None
    try:
        known = list(known_hashes(weight_files(model)).items())
        check_hashes(dict(known[ranks.share(len(known))]), progress=progress)
    except CfspError as error:
        problem = str(error)
    ranks.check(problem)


def check_job(
    opened: OpenModel,
    depth: DepthCut | None,
    recipe: Recipe,
    plan: PruningPlan | None,
    statistics: Statistics | None,
    table: LatencyTable | None,
    ranks: Ranks,
) -> None:
    """Raise CfspError where recipe, plan or statistics do not fit the model, without the blocks
    that will go, or each other."""
    described = depth.shallower if depth is not None else opened.described
    blocks = opened.blocks if depth is None else depth.blocks or opened.blocks
    if plan is None:
        check_recipe(described, recipe, table)
    else:
        check_biases(described, recipe.resolved_compensation)
        check_plan(plan, blocks)
    if statistics is not None:
        check_statistics(statistics, blocks)
        if plan is None and not recipe.only_blocks:
            check_ranked(statistics, recipe)
            check_reach(statistics, recipe)
    if recipe.refits:
        check_refits(opened.model, opened.layout, ranks.size)


def announced_micro_batch(
    opened: OpenModel,
    depth: DepthCut | None,
    request: Request,
    budget: MemoryBudget,
    progress: bool,
    ranks: Ranks,
) -> int:
    """Windows per call, the same on every rank, of an estimate printed and found to fit."""
    shallower = depth.shallower if depth is not None else None
    estimate = estimate_opened(opened, request, budget, shallower=shallower, measure=progress)
    if progress:
        print(estimate.summary(), file=sys.stderr)
    estimate.check(budget)
    return -int(ranks.most(-estimate.micro_batch))
