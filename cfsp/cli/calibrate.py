"""Collect the statistics of a dense model in one forward pass, once, in a file."""

import argparse
from pathlib import Path

from ..api import calibrate
from ..calibration.mixtures import dataset_paths
from ..calibration.statistics import INFLUENCE_METRICS, save_statistics
from ..io.outputs import new_file
from ..pruning.recipe import Recipe
from ..run import shared_output
from .options import MODEL, add_device, add_fields, add_output, given, show
from .prune import add_calibration, recipe_of

EXAMPLES = """\
cfsp calibrate HuggingFaceTB/SmolLM2-135M --out stats.safetensors
cfsp calibrate HuggingFaceTB/SmolLM2-135M --out stats.safetensors --dataset wikitext2:3,c4:1
cfsp calibrate HuggingFaceTB/SmolLM2-135M --out stats.safetensors --scorer obs
"""
METHOD = ("scorer", "units", "allocator", "compensation", "damping")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--out", required=True, metavar="STATS.safetensors", help="The new file")
    add_device(parser)
    group = parser.add_argument_group("method", "What the statistics are for, at any budget.")
    add_fields(group, Recipe, (*METHOD, "blocks", "block_choice"))
    group.add_argument("--recipe", metavar="FILE.yaml", help="Start from this recipe's settings")
    add_calibration(parser)
    add_output(parser)


def run(arguments: argparse.Namespace) -> None:
    out, recipe = Path(arguments.out), recipe_of(arguments)
    texts = dataset_paths(recipe.calibration.dataset)
    new = new_file(out, arguments.overwrite, [arguments.model, arguments.recipe, *texts])
    with shared_output(out, new, arguments.group) as file:
        statistics = calibrate(
            arguments.model,
            recipe=recipe,
            progress=not arguments.quiet,
            ranks=arguments.group,
            **given(arguments, ("device", "max_memory")),
        )
        if arguments.group.first:
            save_statistics(statistics, file)
    importance = {name: statistics.importance(name).tolist() for name in INFLUENCE_METRICS}
    blocks, tokens = len(statistics.blocks), statistics.blocks[0].tokens
    summary = {"statistics": str(out), "blocks": blocks, "tokens": tokens, "importance": importance}
    show(arguments, summary, f"{out}: {blocks} blocks, {tokens:,} tokens")
