"""The command line of recovery: ``cfsp recover``."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from ..calibration.text import BOS_CHOICES
from ..costs.hardware import parse_memory
from ..errors import CfspError
from ..recovery import Distillation, Recovery, RecoveryResult, recover
from ..recovery.estimate import estimate_recovery
from ..recovery.settings import ALLOCATIONS, GRADIENT_CHECKPOINTING, METHODS, TARGETS
from .options import (
    add_dataset,
    add_machine,
    add_measuring,
    add_resume,
    check_no_dry_run,
    given,
    print_json,
    print_perplexities,
)
from .process import sigterm

SETTINGS = tuple(f.name for f in dataclasses.fields(Recovery) if f.name != "distillation")
WEIGHTS = tuple(f.name for f in dataclasses.fields(Distillation) if f.name != "teacher")


def add_recover(commands: Any) -> argparse.ArgumentParser:
    """``cfsp recover`` among the commands of a command line."""
    parser = commands.add_parser("recover", help="train a pruned model, to a new folder")
    parser.add_argument("model", metavar="DIR", help="folder that cfsp prune or recover wrote")
    parser.add_argument("--out", metavar="DIR2", help="needed but for --dry-run")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--quiet", action="store_true", help="no estimate, no progress bars")
    _add_training(parser.add_argument_group("training"))
    _add_text(parser.add_argument_group("text"))
    _add_distillation(parser.add_argument_group("distillation"))
    parser.add_argument(
        "--keep-adapter", action="store_true", help="keep the adapters too, in DIR2/adapter"
    )
    add_resume(parser)
    add_measuring(parser)
    _add_memory(parser.add_argument_group("memory and time"))
    parser.set_defaults(run=run)
    return parser


def _add_training(group: Any) -> None:
    default = Recovery()
    for name, choices, text in (
        ("method", METHODS, "low-rank adapters, or all parameters of the FFNs"),
        ("allocation", ALLOCATIONS, "ranks of the blocks, of as many parameters in all"),
        ("targets", TARGETS, "what gets adapters"),
    ):
        group.add_argument(
            f"--{name}",
            metavar="|".join(choices),
            help=f"{text} (default: {getattr(default, name)})",
        )
    group.add_argument("--rank", type=int, help=f"of uniform adapters (default: {default.rank})")
    group.add_argument(
        "--scaling", type=float, help=f"LoRA's alpha / rank (default: {default.scaling})"
    )
    group.add_argument("--steps", type=int, help=f"(default: {default.steps})")
    group.add_argument("--batch-size", type=int, help="windows a step (default: by size, 8 to 32)")
    group.add_argument(
        "--micro-batch",
        type=int,
        help="windows a pass (default: 8192 tokens on a GPU, 1024 on a CPU)",
    )
    group.add_argument(
        "--learning-rate",
        type=float,
        help="peak of a cosine (default: by size, 3e-4 or 1e-4; ffn: a tenth)",
    )


def _add_text(group: Any) -> None:
    add_dataset(group, "that of the pruning")
    group.add_argument("--seqlen", type=int, help="tokens a window (default: as pruned)")
    group.add_argument("--seed", type=int, help=f"(default: {Recovery().seed})")
    group.add_argument("--bos", metavar="|".join(BOS_CHOICES), help="(default: as pruned)")


def _add_distillation(group: Any) -> None:
    group.add_argument(
        "--teacher", metavar="MODEL", help="learn from this model too, usually the dense one"
    )
    default = Distillation("")
    for name, text in (
        ("temperature", "of both distributions"),
        ("text_weight", "cross entropy with the text"),
        ("logits_weight", "KL divergence from the teacher's distributions"),
        ("hidden_weight", "squared distance from its hidden states"),
    ):
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, type=float, help=f"{text} (default: {getattr(default, name)})")


def _add_memory(group: Any) -> None:
    group.add_argument(
        "--gradient-checkpointing",
        metavar="|".join(GRADIENT_CHECKPOINTING),
        help="recompute activations (default: auto, where memory is too small otherwise)",
    )
    group.add_argument("--max-memory", metavar="20GiB", help="(default: a GPU's free memory)")
    add_machine(group, "memory, FLOPs and seconds")


def settings_of(arguments: argparse.Namespace) -> Recovery:
    """What the command line says of a recovery."""
    weights = given(arguments, WEIGHTS)
    if weights and not arguments.teacher:
        raise CfspError(f"--{next(iter(weights)).replace('_', '-')} needs --teacher MODEL")
    distillation = Distillation(arguments.teacher, **weights) if arguments.teacher else None
    return Recovery(**given(arguments, SETTINGS), distillation=distillation)


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    settings = settings_of(arguments)
    if arguments.dry_run:
        _dry_run(arguments, settings)
        return
    check_no_dry_run(arguments, "recover", ("hardware", "tflops"))
    with sigterm() as stop:
        result = recover(
            arguments.model,
            arguments.out,
            settings,
            eval_dataset=arguments.eval_dataset,
            eval_windows=arguments.eval_windows,
            device=arguments.device,
            max_memory=arguments.max_memory,
            keep_adapter=arguments.keep_adapter,
            overwrite=arguments.overwrite,
            resume=arguments.resume,
            stop=stop,
            progress=not arguments.quiet,
        )
    values = {"out": str(result.out), "settings": result.report.settings.to_dict()}
    if not print_json(arguments, {**values, **result.report.to_dict()}):
        _print_result(result)


def _dry_run(arguments: argparse.Namespace, settings: Recovery) -> None:
    found = estimate_recovery(
        Path(arguments.model),
        settings,
        eval_windows=arguments.eval_windows,
        max_memory=arguments.max_memory,
        device=arguments.device,
        hardware=arguments.hardware,
        tflops=arguments.tflops,
    )
    if not print_json(arguments, found.to_dict()):
        Console().print(found.table())
    found.check(parse_memory(arguments.max_memory))


def _print_result(result: RecoveryResult) -> None:
    report = result.report
    if report.ranks:
        print(f"ranks by {report.settings.allocation}: {' '.join(map(str, report.ranks))}")
    print(
        f"parameters trained: {report.trained_parameters:,} "
        f"(uniform ranks: {report.uniform_parameters:,})"
        if report.ranks
        else f"parameters trained: {report.trained_parameters:,}"
    )
    print(f"loss: {report.losses[0]:.3f} -> {report.losses[-1]:.3f} in {len(report.losses)} steps")
    print_perplexities(report.perplexity_before, report.perplexity_after)
    print(f"saved, reloaded and compared: {result.out}")
