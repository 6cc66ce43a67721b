"""The command line: one line and exit code 2 for a user's mistake, never a traceback."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import __version__
from ..api import (
    PruneResult,
    as_calibrated,
    calibrate,
    plan_opened,
    prune,
)
from ..calibration.curves import ERROR_SCALES
from ..calibration.statistics import (
    INFLUENCE_METRICS,
    check_statistics,
    load_statistics,
    save_statistics,
)
from ..calibration.text import BOS_CHOICES
from ..calibration.windows import Calibration
from ..checkpoints.exports import EXPORTERS, export
from ..checkpoints.exports.gguf_tensors import GGUF_TYPES
from ..checkpoints.fits import fits_summary, refits_summary
from ..costs.latency_measurement import table_for
from ..distributed import joined, own_rank
from ..errors import CfspError
from ..models.loading import open_model
from ..models.opening import open_lean
from ..pruning.allocation import ALLOCATORS
from ..pruning.budget import FORM
from ..pruning.compensation import COMPENSATIONS
from ..pruning.plan_file import load_plan, save_plan
from ..pruning.recipe import DTYPES, Recipe, load_recipe
from ..pruning.scoring import SCORERS
from .curves import add_curves
from .demo import print_demo, run_demo
from .estimate import DRY_RUN_OPTIONS, add_dry_run, add_memory, dry_run
from .evaluate import add_evaluate
from .latency import add_latency, add_latency_table
from .options import (
    add_dataset,
    add_measuring,
    add_resume,
    check_no_dry_run,
    given,
    print_json,
    print_perplexities,
)
from .process import ended, quiet, sigterm
from .recover import add_recover
from .report import add_report

CALIBRATION_OPTIONS = tuple(field.name for field in dataclasses.fields(Calibration))
RECIPE_OPTIONS = tuple(
    field.name for field in dataclasses.fields(Recipe) if field.name != "calibration"
)


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line, told by one rank."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        if own_rank() == 0:
            super()._print_message(message, file)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="hub id, local folder or .gguf file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument("--quiet", action="store_true", help="no estimate, no progress bars")


def _default(field: str) -> str:
    return f"(default: {getattr(Recipe(), field)})"


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    default = Calibration()
    group = parser.add_argument_group("calibration")
    add_dataset(group, default.dataset)
    group.add_argument("--samples", type=int, help=f"windows (default: {default.samples})")
    group.add_argument("--seqlen", type=int, help=f"tokens a window (default: {default.seqlen})")
    group.add_argument("--seed", type=int, help=f"(default: {default.seed})")
    group.add_argument(
        "--bos",
        metavar="|".join(BOS_CHOICES),
        help=f"start windows with a BOS token (default: {default.bos}, as the tokenizer does)",
    )
    group.add_argument("--dtype", metavar="|".join(DTYPES), help=_default("dtype"))
    group.add_argument(
        "--micro-batch",
        type=int,
        help="windows per forward call (default: 8192 tokens on a GPU, 1 window on a CPU)",
    )


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pruning")
    group.add_argument("--recipe", metavar="FILE.yaml", help="start from this recipe's settings")
    amount = group.add_mutually_exclusive_group()
    amount.add_argument("--sparsity", type=float, help=f"fraction to remove {_default('sparsity')}")
    amount.add_argument("--budget", metavar="KIND=AMOUNT", help=f"of the whole model: {FORM}")
    add_latency_table(group)
    group.add_argument("--scorer", help=f"{', '.join(SCORERS)} {_default('scorer')}")
    group.add_argument("--allocator", help=f"{', '.join(ALLOCATORS)} (default: the scorer's)")
    group.add_argument("--compensation", help=f"{', '.join(COMPENSATIONS)} (default: the scorer's)")
    group.add_argument(
        "--damping",
        type=float,
        help="of least squares: pull towards the weights as they were, relative to the mean square "
        f"of each channel {_default('damping')}",
    )
    group.add_argument(
        "--sequential",
        action="store_const",
        const=True,
        help="fit each block once more, on what the pruned blocks before it give",
    )
    group.add_argument("--epochs", type=int, help=f"of blockwise {_default('epochs')}")
    group.add_argument(
        "--learning-rate",
        type=float,
        help=f"of blockwise, relative to the size of the weights {_default('learning_rate')}",
    )
    group.add_argument(
        "--importance", help=f"{', '.join(INFLUENCE_METRICS)} {_default('importance')}"
    )
    group.add_argument(
        "--error-scale",
        metavar="|".join(ERROR_SCALES),
        help="what the errors that a knapsack adds up are measured in: energy of the FFN's output, "
        f"of the hidden state, nothing {_default('error_scale')}",
    )
    group.add_argument(
        "--importance-exponent",
        type=float,
        help="in that sum a block counts times its importance to this power "
        f"{_default('importance_exponent')}",
    )
    for name, what in (
        ("generations", "of allocator search: rounds"),
        ("offspring", "candidates of a round"),
        ("windows", "calibration windows that candidates are measured on"),
        ("seed", "of the exchanges of width"),
    ):
        group.add_argument(
            f"--search-{name}", type=int, help=f"{what} {_default(f'search_{name}')}"
        )
    group.add_argument(
        "--width-multiple", type=int, help=f"1: exact widths {_default('width_multiple')}"
    )
    group.add_argument(
        "--uniform",
        action="store_const",
        const=True,
        help="the same width for all blocks: the result needs no modeling file of its own",
    )
    group.add_argument(
        "--statistics", metavar="FILE", help="of an earlier `cfsp calibrate`, instead of a new one"
    )


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """Defaults, then the recipe file, then what the command line says."""
    path = getattr(arguments, "recipe", None)
    recipe = load_recipe(path) if path else Recipe()
    calibration = given(arguments, CALIBRATION_OPTIONS)
    if calibration and getattr(arguments, "statistics", None):
        option = next(iter(calibration))
        raise CfspError(f"--statistics fixes the calibration; drop --{option}")
    choices = given(arguments, RECIPE_OPTIONS)
    if "budget" in choices:  # what the file says of the other gives way
        choices["sparsity"] = Recipe.sparsity
    elif "sparsity" in choices:
        choices["budget"] = None
    return dataclasses.replace(
        recipe,
        **choices,
        calibration=dataclasses.replace(recipe.calibration, **calibration),
    )


def _demo(arguments: argparse.Namespace) -> None:
    demo = run_demo(
        Path(arguments.out),
        overwrite=arguments.overwrite,
        device=arguments.device,
        progress=not arguments.quiet,
    )
    if not print_json(arguments, demo.result.report.to_dict()):
        print_demo(demo, Console())


def _calibrate(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    if out.exists() and not arguments.overwrite:
        raise CfspError(f"output {out} exists; --overwrite replaces it")
    statistics = calibrate(
        arguments.model,
        recipe=_recipe(arguments),
        gram=arguments.gram,
        gram_folder=out.with_name(f"{out.name}.grams.new"),
        device=arguments.device,
        max_memory=arguments.max_memory,
        progress=not arguments.quiet,
        ranks=arguments.group,
    )
    if not arguments.group.first:
        return
    save_statistics(statistics, out)
    summary = {
        "statistics": str(out),
        "blocks": len(statistics.blocks),
        "tokens": statistics.blocks[0].tokens,
        "importance": {
            metric: statistics.importance(metric).tolist() for metric in INFLUENCE_METRICS
        },
    }
    if not print_json(arguments, summary):
        print(f"{out}: {summary['blocks']} blocks, {summary['tokens']:,} tokens")


def _plan(arguments: argparse.Namespace) -> None:
    if not arguments.statistics:
        raise CfspError("cfsp plan needs --statistics FILE; `cfsp calibrate` makes it")
    recipe = _recipe(arguments)
    statistics = load_statistics(arguments.statistics)
    opener = open_model if recipe.searches else open_lean
    opened = opener(arguments.model, recipe.dtype, arguments.device)
    check_statistics(statistics, opened.model, opened.layout, opened.blocks.fingerprint())
    table = table_for(opened, recipe.model_budget, arguments.latency_table, not arguments.quiet)
    recipe = as_calibrated(recipe, statistics)
    plan = plan_opened(opened, statistics, recipe, table, progress=not arguments.quiet)
    if arguments.out:
        save_plan(plan, arguments.out)
    if not print_json(arguments, {"widths": plan.widths, "sparsity": plan.sparsity}):
        Console().print(plan.table())


def _prune(arguments: argparse.Namespace) -> None:
    if arguments.dry_run:
        if arguments.plan or arguments.statistics:
            raise CfspError("--dry-run estimates a whole run; drop --plan and --statistics")
        if arguments.group.size > 1:
            raise CfspError("--dry-run is for one process; --ranks says how many a run will have")
        dry_run(arguments, _recipe(arguments))
        return
    check_no_dry_run(arguments, "prune", DRY_RUN_OPTIONS)
    plan = load_plan(arguments.plan) if arguments.plan else None
    if plan is not None:
        for name in ("recipe", *RECIPE_OPTIONS, *CALIBRATION_OPTIONS):
            if getattr(arguments, name, None) is not None:
                raise CfspError(f"--plan fixes the recipe; drop --{name.replace('_', '-')}")
    with sigterm() as stop:
        result = prune(
            arguments.model,
            recipe=_recipe(arguments),
            out=arguments.out,
            statistics=arguments.statistics,
            plan=plan,
            eval_dataset=arguments.eval_dataset,
            eval_windows=arguments.eval_windows,
            device=arguments.device,
            latency_table=arguments.latency_table,
            max_memory=arguments.max_memory,
            overwrite=arguments.overwrite,
            resume=arguments.resume,
            verify=arguments.verify,
            stop=stop,
            progress=not arguments.quiet,
            ranks=arguments.group,
        )
    if not arguments.group.first:
        return
    if not print_json(arguments, {"out": str(result.out), **result.report.to_dict()}):
        _print_result(result)


def _print_result(result: PruneResult) -> None:
    report = result.report
    Console().print(result.plan.table())
    for title, was, now in report.sizes.rows():
        print(f"{title}: {was} -> {now}")
    if any(report.fits):
        print(f"least squares: {fits_summary(report.fits)}")
    if report.refits:
        print(f"blocks fitted again: {refits_summary(report.refits)}")
    print_perplexities(report.perplexity_before, report.perplexity_after)
    print(f"saved, reloaded and compared: {result.out}")


def _export(arguments: argparse.Namespace) -> None:
    result = export(
        arguments.model,
        arguments.to,
        arguments.out,
        type=arguments.type,
        pre=arguments.pre,
        multiple=arguments.multiple,
        overwrite=arguments.overwrite,
        progress=not arguments.quiet,
    )
    if not print_json(arguments, result.to_dict()):
        for name, value in result.details.items():
            print(f"{name.replace('_', ' ')}: {value}")
        print(f"written, read back and compared: {result.out} ({result.nbytes:,} bytes)")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="cfsp", description="Structured FFN pruning after one calibration pass.")
    parser.add_argument("--version", action="version", version=f"cfsp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the whole job on SmolLM2-135M, offline")
    demo.add_argument("--out", default="cfsp-demo", help="folder (default: cfsp-demo)")
    demo.add_argument("--device", default="auto", help="(default: auto)")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.set_defaults(run=_demo)

    calibration = commands.add_parser("calibrate", help="statistics of a model, once, in a file")
    _add_model(calibration)
    calibration.add_argument("--out", required=True, metavar="STATS.safetensors")
    calibration.add_argument(
        "--gram",
        action=argparse.BooleanOptionalAction,
        help="whether with Gram matrices, a folder STATS.safetensors.grams beside it: everything "
        "but the published methods reads them (default: with)",
    )
    _add_calibration(calibration)
    add_memory(calibration)
    calibration.set_defaults(run=_calibrate, shared=True)

    plan = commands.add_parser("plan", help="widths and kept channels, to look at or edit")
    _add_model(plan)
    plan.add_argument("--out", metavar="PLAN.json", help="save the plan")
    _add_recipe(plan)
    plan.set_defaults(run=_plan)

    curves = add_curves(commands)

    pruning = commands.add_parser("prune", help="a smaller model in a new folder")
    _add_model(pruning)
    pruning.add_argument("--out", metavar="DIR", help="needed but for --dry-run")
    _add_recipe(pruning)
    pruning.add_argument("--plan", metavar="PLAN.json", help="apply a saved, perhaps edited plan")
    _add_calibration(pruning)
    add_memory(pruning)
    add_dry_run(pruning)
    add_resume(pruning)
    pruning.add_argument(
        "--verify",
        action="store_true",
        help="check the SHA-256 of the model's files, by SHA256SUMS or the hub's cache, and list "
        "those of the result",
    )
    add_measuring(pruning)
    pruning.set_defaults(run=_prune, shared=True)

    recovery = add_recover(commands)
    evaluation = add_evaluate(commands)

    latency = commands.add_parser("latency", help="seconds of a model by its FFN widths, measured")
    _add_model(latency)
    add_latency(latency)

    exporting = commands.add_parser("export", help="a model in the format of another runtime")
    exporting.add_argument("model", metavar="MODEL", help="hub id, local folder or .gguf file")
    exporting.add_argument("--to", required=True, metavar="|".join(EXPORTERS))
    exporting.add_argument("--out", required=True, metavar="PATH", help="folder; gguf: a file")
    exporting.add_argument(
        "--type", metavar="|".join(GGUF_TYPES), help="gguf: of the matrices (default: as stored)"
    )
    exporting.add_argument(
        "--pre", metavar="NAME", help="gguf: llama.cpp's pre-tokenizer (default: found out)"
    )
    exporting.add_argument(
        "--multiple", type=int, metavar="N", help="padded: of the width (default: 1)"
    )
    exporting.add_argument("--quiet", action="store_true", help="no progress bars")
    exporting.set_defaults(run=_export)

    reporting = add_report(commands)

    listed = (
        *(demo, calibration, plan, curves, pruning),
        *(recovery, evaluation, latency, exporting, reporting),
    )
    for command in listed:
        command.add_argument(
            "--json", action="store_true", help="one JSON object as the last line of stdout"
        )
    for command in (demo, calibration, pruning, recovery, latency, exporting, reporting):
        command.add_argument("--overwrite", action="store_true", help="replace what --out names")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    if arguments.group.size > 1 and not getattr(arguments, "shared", False):
        raise CfspError(f"cfsp {arguments.command} is for one process; start it without torchrun")
    with quiet(arguments.group, arguments.quiet):
        arguments.run(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        with joined() as arguments.group:
            code, message = ended(lambda: _run(arguments))
            if message and arguments.group.speaks():
                print(message, file=sys.stderr)
            return code
    except CfspError as error:
        print(f"cfsp: error: {error}", file=sys.stderr)
        return 2
