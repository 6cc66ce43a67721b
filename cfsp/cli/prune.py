"""Prune a model into a new folder."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..api import prune
from ..calibration.windows import Calibration
from ..checkpoints.card import fits_summary, refits_summary
from ..costs.dry_run import estimate
from ..costs.hardware import parse_memory
from ..errors import CfspError
from ..io.places import check_place
from ..pruning.plan_file import load_plan
from ..pruning.recipe import Recipe, load_recipe
from . import options
from .process import sigterm

EXAMPLES = """\
cfsp prune HuggingFaceTB/SmolLM2-135M --out pruned --sparsity 0.3
cfsp prune meta-llama/Llama-3.1-8B --budget params=6B --dry-run --hardware h100
"""
AMOUNT = ("blocks", "block_choice", "units", "experts")
SIZES = ("width_multiple", "group_multiple", "uniform")
METHOD = (
    *("scorer", "allocator", "compensation", "expert_score"),
    *("importance", "error_scale", "importance_exponent"),
)
FIT = ("damping", "width_windows", "sequential", "epochs", "learning_rate")
SEARCH = ("search_generations", "search_offspring", "search_windows", "search_seed")
CALIBRATION_OPTIONS = options.names_of(Calibration)
RECIPE_OPTIONS = options.names_of(Recipe, but="calibration")
DRY_RUN_OPTIONS = ("hardware", "tflops", "disk_gbps", "ranks", "nodes")


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """The options of a calibration, and how its forward calls run."""
    group = parser.add_argument_group("calibration", "The text that the model is calibrated on.")
    options.add_fields(group, Calibration, CALIBRATION_OPTIONS)
    group = parser.add_argument_group("machine", "Where and how the model runs.")
    options.add_fields(group, Recipe, ("dtype", "micro_batch"))
    group.add_argument(
        "--max-memory",
        metavar="20GiB|device=20GiB,host=8GiB",
        help="Choose the micro-batch to fit, refuse what cannot (default: a GPU's free memory)",
    )


def add_recipe(parser: argparse.ArgumentParser) -> Any:
    """The options of a plan; returns the group of what is known already."""
    group = parser.add_argument_group("amount", "How much is removed.")
    options.add_fields(group.add_mutually_exclusive_group(), Recipe, ("sparsity", "budget"))
    group.add_argument(
        "--latency-table",
        metavar="TABLE.json",
        help="Written by `cfsp latency`, perhaps on another machine, for --budget latency=0.25 "
        "(default: measured on --device, once)",
    )
    options.add_fields(group, Recipe, (*AMOUNT, *SIZES))
    text = "How channels are chosen, and what makes up for them."
    options.add_fields(parser.add_argument_group("method", text), Recipe, METHOD)
    text = "How the weights that stay are fitted."
    options.add_fields(parser.add_argument_group("fit", text), Recipe, FIT)
    text = "How far allocator search goes."
    options.add_fields(parser.add_argument_group("search", text), Recipe, SEARCH)
    group = parser.add_argument_group("input", "What is known already.")
    group.add_argument("--recipe", metavar="FILE.yaml", help="Start from this recipe's settings")
    text = "Written by `cfsp calibrate`; no new calibration"
    group.add_argument("--statistics", metavar="FILE", help=text)
    return group


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """Defaults, then the recipe file, then what the command line says."""
    path = getattr(arguments, "recipe", None)
    recipe = load_recipe(path) if path else Recipe()
    if getattr(arguments, "statistics", None):
        fixed = (*CALIBRATION_OPTIONS, "width_windows")
        options.refuse(arguments, fixed, "--statistics fixes the calibration; drop {}")
    calibration = options.given(arguments, CALIBRATION_OPTIONS)
    choices = options.given(arguments, RECIPE_OPTIONS)
    if not path:  # a default of its own beside what else is asked for
        choices.setdefault("sparsity", Recipe.sparsity)
    if "budget" in choices:  # what the file says of the other gives way
        choices["sparsity"] = Recipe.sparsity
    elif choices.get("sparsity") is not None:
        choices["budget"] = None
    choices["calibration"] = dataclasses.replace(recipe.calibration, **calibration)
    return dataclasses.replace(recipe, **choices)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=options.MODEL)
    parser.add_argument("--out", metavar="DIR", help="The new folder; needed but for --dry-run")
    options.add_device(parser)
    options.add_resume(parser)
    parser.add_argument(
        "--verify",
        action="store_true",
        help="Check the SHA-256 of the model's files, by SHA256SUMS or the hub's cache, and list "
        "those of the result",
    )
    group = add_recipe(parser)
    group.add_argument("--plan", metavar="PLAN.json", help="Apply a saved, perhaps edited plan")
    add_calibration(parser)
    add = options.add_job(parser).add_argument
    add("--disk-gbps", type=float, metavar="X", help="1e9 bytes/s of the disk of each machine")
    add("--ranks", type=int, metavar="N", help="Processes, each with its own device (default: 1)")
    add("--nodes", type=int, metavar="N", help="Machines that they run on (default: 1)")
    options.add_output(parser)


def run(arguments: argparse.Namespace) -> None:
    if arguments.dry_run:
        if arguments.plan or arguments.statistics:
            raise CfspError("--dry-run estimates a whole run; drop --plan and --statistics")
        if arguments.group.size > 1:
            raise CfspError("--dry-run is for one process; --ranks says how many a run will have")
        names = ("eval_windows", "max_memory", "latency_table", "device", *DRY_RUN_OPTIONS)
        given = options.given(arguments, names)
        found = estimate(arguments.model, recipe_of(arguments), **given)
        options.show(arguments, found.to_dict(), found.table())
        if found.refusal:  # as the run itself would fail
            raise CfspError(found.refusal)
        found.check(parse_memory(arguments.max_memory))
        return
    options.check_no_dry_run(arguments, DRY_RUN_OPTIONS)
    check_place(Path(arguments.out), [arguments.plan, arguments.recipe])
    plan = load_plan(arguments.plan) if arguments.plan else None
    if plan is not None:
        fixed = ("recipe", *RECIPE_OPTIONS, *CALIBRATION_OPTIONS)
        options.refuse(arguments, fixed, "--plan fixes the recipe; drop {}")
    passed_on = (*options.JOB_OPTIONS, "statistics", "latency_table", "verify")
    with sigterm() as stop:
        result = prune(
            arguments.model,
            recipe=recipe_of(arguments),
            plan=plan,
            stop=stop,
            progress=not arguments.quiet,
            ranks=arguments.group,
            **options.given(arguments, passed_on),
        )
    report = result.report
    options.show(
        arguments,
        {"out": str(result.out), **report.to_dict()},
        result.plan.table(),
        *(f"{title}: {was} -> {now}" for title, was, now in report.sizes.rows()),
        f"least squares: {fits_summary(report.fits)}" if any(report.fits) else None,
        f"blocks fitted again: {refits_summary(report.refits)}" if report.refits else None,
        *options.perplexity_lines(report.perplexity_before, report.perplexity_after),
        f"saved, reloaded and compared: {result.out}",
    )
