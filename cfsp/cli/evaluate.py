"""Measure perplexity, speed and tasks of models, side by side."""

import argparse

from rich.markup import escape
from rich.table import Table

from ..calibration.windows import Calibration
from ..errors import printable
from ..evaluation.side_by_side import evaluate
from ..evaluation.speed import Generation
from ..pruning.recipe import Recipe
from ..report.tables import evaluation_table
from .flags import flag
from .options import MODEL, add_device, add_fields, add_output, given, show

EXAMPLES = """\
cfsp evaluate HuggingFaceTB/SmolLM2-135M pruned
cfsp evaluate HuggingFaceTB/SmolLM2-135M pruned --windows 0 --speed --batch 8 --json
"""
GENERATION = vars(Generation())
OPTIONS = (
    *("dataset", "seqlen", "windows", "bos", "text_column", "dtype", "device", "speed"),
    *(*GENERATION, "task_path", "limit"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", metavar="MODEL", nargs="+", help=MODEL)
    add_device(parser)
    add_fields(parser, Recipe, ("dtype",))
    group = parser.add_argument_group("perplexity", "On held-out text, over whole windows.")
    add = group.add_argument
    text = "One dataset, its held-out part, or a local file or folder (default: %(default)s)"
    add("--dataset", metavar="NAME|PATH", default=Calibration.dataset, help=text)
    add_fields(group, Calibration, ("seqlen", "bos", "text_column"))
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
    add_output(parser, but="overwrite")


def run(arguments: argparse.Namespace) -> None:
    found = evaluate(
        arguments.models,
        tasks=[name for name in (arguments.tasks or "").split(",") if name],
        progress=not arguments.quiet,
        ranks=arguments.group,
        **given(arguments, OPTIONS),
    )
    values = found[0] if len(found) == 1 else {"models": found}
    shown: str | Table
    if "perplexity" in values and not {"speed", "tasks"} & values.keys():
        shown = (
            f"perplexity {values['perplexity']:.4f} over {values['windows']} windows of "
            f"{values['seqlen']} ({values['tokens']:,} predicted tokens, {values['seconds']:.1f} s)"
        )
    else:
        shown, told = Table(""), evaluation_table(found, ())
        for label in told["labels"]:
            shown.add_column(escape(printable(label)), justify="right", overflow="fold")
        for measure in told["measures"]:
            shown.add_row(escape(printable(measure["title"])), *measure["texts"])
    show(arguments, values, shown)
