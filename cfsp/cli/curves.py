"""Add the scores and error curves of a scorer to a file of statistics, for later plans."""

import argparse
import dataclasses

from ..calibration.statistics import check_statistics, load_statistics, save_statistics
from ..models.opening import open_any
from ..pruning.ranking import stored_ranking, with_ranking
from ..pruning.recipe import Recipe
from .options import MODEL, add_device, add_fields, add_output, given, print_json

SCORER = "obs"
OPTIONS = ("scorer", "compensation", "damping", "dtype")
EXAMPLES = """\
cfsp curves HuggingFaceTB/SmolLM2-135M --statistics stats.safetensors
cfsp curves HuggingFaceTB/SmolLM2-135M --statistics stats.safetensors --scorer cfsp-residual
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``cfsp curves``."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "--statistics",
        required=True,
        metavar="FILE",
        help="Written by `cfsp calibrate`; is added to",
    )
    add_device(parser)
    group = parser.add_argument_group("method", "What the curves are of.")
    add_fields(group, Recipe, OPTIONS, {"scorer": SCORER})
    add_output(parser, overwrite=False)


def run(arguments: argparse.Namespace) -> None:
    """Make the curves, where they are not there, and write the statistics anew."""
    recipe = Recipe(scorer=arguments.scorer or SCORER, allocator="knapsack")
    recipe = dataclasses.replace(recipe, **given(arguments, OPTIONS))
    statistics = load_statistics(arguments.statistics)
    opened = open_any(arguments.model, None, recipe.dtype, arguments.device)
    check_statistics(statistics, opened.model, opened.layout, opened.blocks.fingerprint())
    known = stored_ranking(statistics, recipe) is not None
    if not known:
        ranked = with_ranking(
            statistics, opened.blocks.ffn_weights, recipe, progress=not arguments.quiet
        )
        save_statistics(ranked, arguments.statistics)
    summary = {
        "statistics": arguments.statistics,
        "scorer": recipe.scorer,
        "compensation": recipe.resolved_compensation,
        "damping": recipe.damping,
        "new": not known,
    }
    if not print_json(arguments, summary):
        added = "has them already" if known else "error curves added"
        print(f"{arguments.statistics}: {recipe.scorer}, {summary['compensation']}: {added}")
