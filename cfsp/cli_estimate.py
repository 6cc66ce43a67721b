"""The command line of estimates: ``--max-memory`` and ``--dry-run``."""

import argparse
import json

from rich.console import Console

from .dry_run import estimate
from .errors import CfspError
from .hardware import HARDWARE
from .layouts import unsupported
from .memory import parse_budget
from .recipe import Recipe

DRY_RUN_OPTIONS = ("hardware", "tflops", "disk_gbps", "ranks", "nodes")


def add_memory(parser: argparse.ArgumentParser) -> None:
    """``--max-memory``."""
    parser.add_argument(
        "--max-memory",
        metavar="20GiB|device=20GiB,host=8GiB",
        help="choose the micro-batch to fit, refuse what cannot (default: a GPU's free memory)",
    )


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """``--dry-run`` and what it rests on."""
    group = parser.add_argument_group("dry run")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print memory, bytes, FLOPs and seconds from the config alone; weights are not read",
    )
    group.add_argument(
        "--hardware", metavar="|".join(HARDWARE), help="for this machine (default: the one here)"
    )
    group.add_argument("--tflops", type=float, help="1e12 FLOP/s that a device sustains")
    group.add_argument("--disk-gbps", type=float, help="1e9 bytes/s of a node's disk")
    group.add_argument("--ranks", type=int, help="processes, a device each (default: 1)")
    group.add_argument("--nodes", type=int, help="machines that they run on (default: 1)")


def check_no_dry_run(arguments: argparse.Namespace) -> None:
    """Refuse a run without an output folder, or with what only a dry run can use."""
    if not arguments.out:
        raise CfspError("cfsp prune needs --out DIR, or --dry-run")
    for name in DRY_RUN_OPTIONS:
        if getattr(arguments, name) is not None:
            raise CfspError(f"--{name.replace('_', '-')} is for --dry-run")


def dry_run(arguments: argparse.Namespace, recipe: Recipe) -> None:
    """Print the estimate of ``cfsp prune``; then fail where the run itself would.

    Raises:
        CfspError: an architecture that cannot be pruned, too little memory; besides bad arguments.
    """
    given = {name: getattr(arguments, name) for name in DRY_RUN_OPTIONS}
    found = estimate(
        arguments.model,
        recipe,
        eval_windows=arguments.eval_windows,
        max_memory=arguments.max_memory,
        latency_table=arguments.latency_table,
        device=arguments.device,
        **{name: value for name, value in given.items() if value is not None},
    )
    if arguments.json:
        print(json.dumps(found.to_dict()))
    else:
        Console().print(found.table())
    if not found.supported:
        raise unsupported(found.architecture)
    found.check(parse_budget(arguments.max_memory))
