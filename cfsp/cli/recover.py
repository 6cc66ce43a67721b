"""Train a pruned model to win back what pruning cost, to a new folder."""

import argparse

from ..costs.hardware import parse_memory
from ..recovery import Distillation, Recovery, recover
from ..recovery.estimate import estimate_recovery
from . import options
from .process import sigterm

EXAMPLES = """\
cfsp recover pruned --out recovered --steps 500
cfsp recover pruned --out recovered --teacher HuggingFaceTB/SmolLM2-135M
"""
SETTINGS = options.names_of(Recovery, but="distillation")
WEIGHTS = options.names_of(Distillation, but="teacher")
TEXT = ("dataset", "text_column", "seqlen", "seed", "bos")
MEMORY = ("micro_batch", "gradient_checkpointing")
DRY_RUN_OPTIONS = ("hardware", "tflops")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="DIR", help="Folder that cfsp prune or recover wrote")
    add("--out", metavar="DIR2", help="The new folder; needed but for --dry-run")
    add("--keep-adapter", action="store_true", help="Keep the adapters too, in DIR2/adapter")
    options.add_device(parser)
    options.add_resume(parser)
    group = parser.add_argument_group("training", "What is trained, and how.")
    options.add_fields(group, Recovery, [name for name in SETTINGS if name not in (*TEXT, *MEMORY)])
    options.add_fields(parser.add_argument_group("text", "What it is trained on."), Recovery, TEXT)
    group = parser.add_argument_group("distillation", "Learning from another model too.")
    options.add_fields(group, Distillation, ("teacher", *WEIGHTS))
    group = parser.add_argument_group("memory", "What keeps training in a device's memory.")
    options.add_fields(group, Recovery, MEMORY)
    group.add_argument("--max-memory", metavar="20GiB", help="(default: a GPU's free memory)")
    options.add_job(parser)
    options.add_output(parser)


def settings_of(arguments: argparse.Namespace) -> Recovery:
    distillation = None
    if arguments.teacher:
        distillation = Distillation(arguments.teacher, **options.given(arguments, WEIGHTS))
    else:
        options.refuse(arguments, WEIGHTS, "{} needs --teacher MODEL")
    return Recovery(**options.given(arguments, SETTINGS), distillation=distillation)


def run(arguments: argparse.Namespace) -> None:
    settings = settings_of(arguments)
    if arguments.dry_run:
        names = ("eval_windows", "max_memory", "device", *DRY_RUN_OPTIONS)
        given = options.given(arguments, names)
        found = estimate_recovery(arguments.model, settings, **given)
        options.show(arguments, found.to_dict(), found.table())
        found.check(parse_memory(arguments.max_memory))
        return
    options.check_no_dry_run(arguments, DRY_RUN_OPTIONS)
    with sigterm() as stop:
        result = recover(
            arguments.model,
            settings=settings,
            stop=stop,
            progress=not arguments.quiet,
            **options.given(arguments, (*options.JOB_OPTIONS, "keep_adapter")),
        )
    report, losses = result.report, result.report.losses
    uniform = f" (uniform ranks: {report.uniform_parameters:,})" if report.ranks else ""
    ranks = f"ranks by {report.settings.allocation}: {' '.join(map(str, report.ranks))}"
    options.show(
        arguments,
        {"out": str(result.out), "settings": report.settings.to_dict(), **report.to_dict()},
        ranks if report.ranks else None,
        f"parameters trained: {report.trained_parameters:,}{uniform}",
        f"loss: {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps",
        *options.perplexity_lines(report.perplexity_before, report.perplexity_after),
        f"saved, reloaded and compared: {result.out}",
    )
