"""Add the scores and error curves of a scorer to a file of statistics, for later plans."""

import argparse

from ..calibration.statistics import check_statistics, load_statistics, save_statistics
from ..models.opening import open_any
from ..pruning.ranking import stored_ranking, with_ranking
from ..pruning.recipe import Recipe
from .options import MODEL, add_device, add_fields, add_output, given, show

SCORER = "obs"
OPTIONS = ("scorer", "compensation", "damping", "dtype")
EXAMPLES = """\
cfsp curves HuggingFaceTB/SmolLM2-135M --statistics stats.safetensors
cfsp curves HuggingFaceTB/SmolLM2-135M --statistics stats.safetensors --scorer cfsp-residual
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    text = "Written by `cfsp calibrate`; is added to"
    parser.add_argument("--statistics", required=True, metavar="FILE", help=text)
    add_device(parser)
    group = parser.add_argument_group("method", "What the curves are of.")
    add_fields(group, Recipe, OPTIONS, {"scorer": SCORER})
    add_output(parser, but="overwrite")


def run(arguments: argparse.Namespace) -> None:
    file = arguments.statistics
    recipe = Recipe(**{"scorer": SCORER, "allocator": "knapsack", **given(arguments, OPTIONS)})
    statistics = load_statistics(file)
    opened = open_any(arguments.model, None, recipe.dtype, arguments.device)
    check_statistics(statistics, opened.blocks)
    known = stored_ranking(statistics, recipe) is not None
    if not known:
        weights, progress = opened.blocks.ffn_weights, not arguments.quiet
        save_statistics(with_ranking(statistics, weights, recipe, progress=progress), file)
    summary = {
        "statistics": file,
        "scorer": recipe.scorer,
        "compensation": recipe.resolved_compensation,
        "damping": recipe.damping,
        "new": not known,
    }
    added = "has them already" if known else "error curves added"
    show(arguments, summary, f"{file}: {recipe.scorer}, {recipe.resolved_compensation}: {added}")
