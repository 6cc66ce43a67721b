"""Choose widths and kept channels from statistics, to look at or edit."""

import argparse
from contextlib import nullcontext
from pathlib import Path

from ..calibration.mixtures import dataset_paths
from ..calibration.statistics import check_statistics, load_statistics
from ..costs.latency_measurement import table_for
from ..errors import CfspError
from ..io.outputs import new_file
from ..models.depth import shallower
from ..models.opening import open_any
from ..pruning.plan import PruningPlan
from ..pruning.plan_file import save_plan
from ..pruning.recipe import Recipe
from ..run.depth import known_depth
from ..run.job import as_calibrated, plan_model
from .options import MODEL, add_device, add_output, refuse, show
from .prune import add_recipe, recipe_of

EXAMPLES = """\
cfsp plan HuggingFaceTB/SmolLM2-135M --statistics stats.safetensors --sparsity 0.5
cfsp plan HuggingFaceTB/SmolLM2-135M --statistics stats.safetensors --out plan.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--out", metavar="PLAN.json", help="Save the plan")
    add_device(parser)
    add_recipe(parser)
    add_output(parser)


def run(arguments: argparse.Namespace) -> None:
    if not arguments.statistics:
        raise CfspError("cfsp plan needs --statistics FILE; `cfsp calibrate` makes it")
    refuse(arguments, ("blocks", "block_choice"), "{} is for `cfsp calibrate`: its statistics tell")
    recipe = recipe_of(arguments)
    inputs = [getattr(arguments, name) for name in ("model", "statistics", "recipe")]
    inputs += [arguments.latency_table, *dataset_paths(recipe.calibration.dataset)]
    out = arguments.out
    with nullcontext() if out is None else new_file(Path(out), arguments.overwrite, inputs) as file:
        plan = _planned(arguments, recipe)
        if file is not None:
            save_plan(plan, file)
    show(arguments, {"widths": plan.widths, "sparsity": plan.sparsity}, plan.table())


def _planned(arguments: argparse.Namespace, recipe: Recipe) -> PruningPlan:
    statistics = load_statistics(arguments.statistics)
    where = {"device": arguments.device, "whole": recipe.searches}
    opened = open_any(arguments.model, **where, **recipe.opening)
    known = known_depth(None, statistics, recipe)
    if known is not None:
        opened = shallower(opened, known.kept)
    check_statistics(statistics, opened.blocks)
    table = table_for(
        opened,
        recipe.model_budget,
        arguments.latency_table,
        not arguments.quiet,
        whole_ffns=recipe.removes_ffns,
    )
    recipe = as_calibrated(recipe, statistics)
    return plan_model(opened, statistics, recipe, table, progress=not arguments.quiet)
