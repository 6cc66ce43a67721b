"""Measure perplexity, speed and tasks of models, side by side."""

import argparse

from rich.console import Console
from rich.table import Table

from ..calibration.windows import Calibration
from ..evaluation.side_by_side import evaluate
from ..evaluation.speed import Generation
from ..pruning.recipe import Recipe
from ..report.tables import evaluation_table
from .options import MODEL, add_device, add_fields, add_output, flag, given, print_json

EXAMPLES = """\
cfsp evaluate HuggingFaceTB/SmolLM2-135M pruned
cfsp evaluate HuggingFaceTB/SmolLM2-135M pruned --windows 0 --speed --batch 8 --json
"""
GENERATION = vars(Generation())
OPTIONS = (
    *("dataset", "seqlen", "windows", "bos", "dtype", "device", "speed"),
    *(*GENERATION, "task_path", "limit"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", metavar="MODEL", nargs="+", help=MODEL)
    add_device(parser)
    add_fields(parser, Recipe, ("dtype",))
    group = parser.add_argument_group("perplexity", "On held-out text, over whole windows.")
    add = group.add_argument
    text = "One dataset, its held-out part, or a file (default: %(default)s)"
    add("--dataset", metavar="NAME|PATH", default=Calibration.dataset, help=text)
    add_fields(group, Calibration, ("seqlen", "bos"))
    add("--windows", type=int, metavar="N", help="Only the first N; 0: none (default: all)")
    group = parser.add_argument_group("speed", "Of generation, the models taking turns.")
    add = group.add_argument
    add("--speed", action="store_true", help="Time prefill and decode; holds all models in memory")
    for name, value in GENERATION.items():
        add(flag(name), type=int, metavar="N", default=value, help="(default: %(default)s)")
    group = parser.add_argument_group("tasks", "Of the lm-evaluation-harness, extra `eval`.")
    group.add_argument("--tasks", metavar="NAME,NAME", help="Tasks or groups")
    group.add_argument("--task-path", metavar="DIR", help="Folder of task files of your own")
    group.add_argument("--limit", type=int, metavar="N", help="Only the first N examples of each")
    add_output(parser, overwrite=False)


def run(arguments: argparse.Namespace) -> None:
    found = evaluate(
        arguments.models,
        tasks=[name for name in (arguments.tasks or "").split(",") if name],
        progress=not arguments.quiet,
        ranks=arguments.group,
        **given(arguments, OPTIONS),
    )
    if not arguments.group.first:
        return
    first = found[0]
    if print_json(arguments, first if len(found) == 1 else {"models": found}):
        return
    if len(found) == 1 and not {"speed", "tasks"} & first.keys() and "perplexity" in first:
        print(
            f"perplexity {first['perplexity']:.4f} over {first['windows']} windows of "
            f"{first['seqlen']} ({first['tokens']:,} predicted tokens, {first['seconds']:.1f} s)"
        )
        return
    shown, table = evaluation_table(found, ()), Table("")
    for label in shown["labels"]:
        table.add_column(label, justify="right", overflow="fold")
    for measure in shown["measures"]:
        table.add_row(measure["title"], *measure["texts"])
    Console().print(table)
