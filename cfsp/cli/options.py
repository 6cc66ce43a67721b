"""What several commands of the command line have in common."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ..calibration.text import DATASETS
from ..costs.hardware import HARDWARE
from ..errors import CfspError
from ..evaluation.quality import EVALUATION_WINDOWS, Perplexity, perplexities_by_dataset


def add_dataset(group: Any, default: str) -> None:
    """``--dataset``, which may name several."""
    group.add_argument(
        "--dataset",
        metavar="NAME|PATH[:WEIGHT],...",
        help=f"{', '.join(DATASETS)}, or a text, parquet, json or arrow file; windows of several "
        f"are shared out by weight (default: {default})",
    )


def add_resume(parser: argparse.ArgumentParser) -> None:
    """``--resume``."""
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue a run of this command that was interrupted; --overwrite begins anew",
    )


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """``--eval-dataset`` and ``--eval-windows``."""
    group = parser.add_argument_group("evaluation, before and after")
    group.add_argument(
        "--eval-dataset",
        metavar="NAME|PATH[:WEIGHT],...",
        help="(default: the held-out parts of --dataset; builtin where these are all files)",
    )
    group.add_argument(
        "--eval-windows",
        type=int,
        default=EVALUATION_WINDOWS,
        help="0 skips it (default: %(default)s)",
    )


def add_machine(group: Any, printed: str) -> None:
    """``--dry-run``, which prints ``printed``, with ``--hardware`` and ``--tflops``."""
    group.add_argument(
        "--dry-run",
        action="store_true",
        help=f"print {printed} from the config alone; weights are not read",
    )
    group.add_argument(
        "--hardware", metavar="|".join(HARDWARE), help="for this machine (default: the one here)"
    )
    group.add_argument("--tflops", type=float, help="1e12 FLOP/s that a device sustains")


def check_no_dry_run(arguments: argparse.Namespace, command: str, options: Sequence[str]) -> None:
    """Refuse a run without an output folder, or with options that only a dry run can use."""
    if not arguments.out:
        raise CfspError(f"cfsp {command} needs --out DIR, or --dry-run")
    for name in given(arguments, options):
        raise CfspError(f"--{name.replace('_', '-')} is for --dry-run")


def given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The options, of these, that the command line has."""
    values = {name: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def print_json(arguments: argparse.Namespace, values: dict[str, Any]) -> bool:
    """Print one JSON object where ``--json`` asks for it; whether it does."""
    if arguments.json:
        print(json.dumps(values))
    return bool(arguments.json)


def print_perplexities(before: Perplexity | None, after: Perplexity | None) -> None:
    """A line, and one for each dataset where they are several; nothing where none was measured."""
    if before is None or after is None:
        return
    print(
        f"perplexity: {before.perplexity:.2f} -> {after.perplexity:.2f} "
        f"({before.dataset}, {before.windows} windows of {before.seqlen})"
    )
    for name, was, now in perplexities_by_dataset(before, after):
        print(f"perplexity of {name}: {was:.2f} -> {now:.2f}")
