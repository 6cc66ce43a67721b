"""What several commands of the command line have in common."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, get_args

from rich.console import Console, RenderableType

from ..costs.hardware import HARDWARE
from ..errors import CfspError, printable
from ..evaluation.quality import EVALUATION_WINDOWS, Perplexity
from ..io.documents import to_json
from ..settings import Setting, setting_of
from .flags import flag

MODEL = "Hub id, local folder or .gguf file"
ARGUMENTS = {int: "N", float: "X", str: "TEXT"}
"""What the value of an option is called, by its type."""
OUTPUT = {
    "quiet": "No estimate, no progress bars",
    "json": "One JSON object as the last line of stdout",
    "overwrite": "Replace what --out names",
}
JOB_OPTIONS = ("out", "eval_dataset", "eval_windows", "device", "max_memory", "overwrite", "resume")
"""Options of prune and recover that are parameters of their functions."""


def names_of(kind: type, but: str = "") -> tuple[str, ...]:
    """The fields of a dataclass, but one."""
    return tuple(field.name for field in dataclasses.fields(kind) if field.name != but)


def add_fields(
    group: Any, kind: type, names: Sequence[str], defaults: Mapping[str, str] | None = None
) -> None:
    """An option for each of these fields of a dataclass, from its setting; None where not given.
    ``defaults`` says what holds then, where that is not the default of the field."""
    for field in dataclasses.fields(kind):
        if field.name not in names:
            continue
        setting = setting_of(field) or Setting("")
        text = setting.help.removesuffix(".").replace("%", "%%")
        value_type = next(t for t in get_args(field.type) or (field.type,) if t is not NoneType)
        if value_type is bool:
            group.add_argument(flag(field.name), action="store_const", const=True, help=text)
            continue
        metavar = setting.metavar or ARGUMENTS[value_type]
        default = (defaults or {}).get(field.name) or setting.unset or field.default
        shown = f" (default: {default})" if isinstance(default, int | float | str) else ""
        if isinstance(setting.choices, Mapping):
            metavar = "NAME"
            told = (f"\n  {choice}: {said}" for choice, said in setting.choices.items())
            text, shown = "".join((text, *told)), f"\n{shown.lstrip()}"
        elif setting.choices:
            metavar = "|".join(setting.choices)
        group.add_argument(flag(field.name), type=value_type, metavar=metavar, help=text + shown)


def given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The options, of these, that the command line has."""
    values = {name: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")


def add_output(parser: argparse.ArgumentParser, *, but: str = "") -> None:
    """``--quiet``, ``--json`` and ``--overwrite``, but one of them."""
    group = parser.add_argument_group("output", "What is printed, and what may be replaced.")
    for name, text in OUTPUT.items():
        if name != but:
            group.add_argument(flag(name), action="store_true", help=text)


def add_resume(parser: argparse.ArgumentParser) -> None:
    text = "Continue a run of this command that was interrupted; --overwrite begins anew"
    parser.add_argument("--resume", action="store_true", help=text)


def add_job(parser: argparse.ArgumentParser) -> Any:
    """``--eval-dataset``, ``--eval-windows``, and ``--dry-run`` with ``--hardware`` and
    ``--tflops``; returns the group of the last three."""
    about = "Perplexity on held-out text, before and after."
    add = parser.add_argument_group("evaluation", about).add_argument
    add(
        "--eval-dataset",
        metavar="NAME|PATH[:WEIGHT],...",
        help="Text to measure on (default: the held-out parts of --dataset; builtin where these "
        "are all files)",
    )
    text = "0 skips it (default: %(default)s)"
    add("--eval-windows", type=int, metavar="N", default=EVALUATION_WINDOWS, help=text)
    about = "What a run would take, from the config alone; weights are not read."
    group = parser.add_argument_group("dry run", about)
    add = group.add_argument
    add(
        "--dry-run", action="store_true", help="Print memory, bytes, FLOPs and seconds; run nothing"
    )
    text = "Estimate for this hardware (default: this machine)"
    add("--hardware", metavar="|".join(HARDWARE), help=text)
    add("--tflops", type=float, metavar="X", help="1e12 FLOP/s that a device sustains")
    return group


def refuse(arguments: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Raise CfspError for the first of these options that the command line has; ``why`` has {}
    where its name goes."""
    for name in given(arguments, names):
        raise CfspError(why.format(flag(name)))


def check_no_dry_run(arguments: argparse.Namespace, options: Sequence[str]) -> None:
    """Refuse a run without an output folder, or with options that only a dry run can use."""
    if not arguments.out:
        raise CfspError(f"cfsp {arguments.command} needs --out DIR, or --dry-run")
    refuse(arguments, options, "{} is for --dry-run")


def show(
    arguments: argparse.Namespace, values: Mapping[str, Any], *shown: RenderableType | None
) -> None:
    """Print, on the first rank, one JSON object where ``--json`` asks for it, or else what is shown
    to a person."""
    if not arguments.group.first:
        return
    if arguments.json:
        print(to_json(values))
        return
    for item in shown:
        if isinstance(item, str):
            print(printable(item))
        elif item is not None:
            Console().print(item)


def perplexity_lines(before: Perplexity | None, after: Perplexity | None) -> list[str]:
    """One, and one for each dataset where they are several; none where none was measured."""
    if before is None or after is None:
        return []
    text = f"({before.dataset}, {before.windows} windows of {before.seqlen})"
    return [
        f"perplexity: {before.perplexity:.2f} -> {after.perplexity:.2f} {text}",
        *(
            f"perplexity of {name}: {value:.2f} -> {after.by_dataset[name]:.2f}"
            for name, value in before.by_dataset.items()
        ),
    ]
