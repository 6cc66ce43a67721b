"""The command line of ``cfsp curves``."""

import argparse
import dataclasses
from typing import Any

from ..calibration.statistics import check_statistics, load_statistics, save_statistics
from ..models.opening import open_any
from ..pruning.compensation import COMPENSATIONS
from ..pruning.ranking import stored_ranking, with_ranking
from ..pruning.recipe import Recipe
from ..pruning.scoring import SCORERS
from .options import print_json


def add_curves(commands: Any) -> argparse.ArgumentParser:
    """``cfsp curves``; returns its parser."""
    default = Recipe(scorer="obs")
    parser: argparse.ArgumentParser = commands.add_parser(
        "curves", help="scores and error curves, put into a file of statistics for later plans"
    )
    parser.add_argument("model", metavar="MODEL", help="hub id, local folder or .gguf file")
    parser.add_argument(
        "--statistics",
        required=True,
        metavar="FILE",
        help="of `cfsp calibrate`; is added to",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument("--dtype", default=default.dtype, help="(default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument(
        "--scorer", default=default.scorer, help=f"{', '.join(SCORERS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--compensation", help=f"{', '.join(COMPENSATIONS)} (default: the scorer's)"
    )
    parser.add_argument(
        "--damping", type=float, default=default.damping, help="(default: %(default)s)"
    )
    parser.set_defaults(run=curves)
    return parser


def curves(arguments: argparse.Namespace) -> None:
    """Make the curves, where they are not there, and write the statistics anew."""
    recipe = dataclasses.replace(
        Recipe(scorer=arguments.scorer, allocator="knapsack"),
        compensation=arguments.compensation,
        damping=arguments.damping,
        dtype=arguments.dtype,
    )
    statistics = load_statistics(arguments.statistics)
    opened = open_any(arguments.model, dtype=recipe.dtype, device=arguments.device)
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
