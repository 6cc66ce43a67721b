"""The command line of estimates: ``--max-memory`` and ``--dry-run``."""

import argparse

from rich.console import Console

from ..costs.dry_run import estimate
from ..costs.hardware import parse_memory
from ..models.layouts import unsupported
from ..pruning.recipe import Recipe
from .options import add_machine, given, print_json

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
    add_machine(group, "memory, bytes, FLOPs and seconds")
    group.add_argument("--disk-gbps", type=float, help="1e9 bytes/s of a node's disk")
    group.add_argument("--ranks", type=int, help="processes, a device each (default: 1)")
    group.add_argument("--nodes", type=int, help="machines that they run on (default: 1)")


def dry_run(arguments: argparse.Namespace, recipe: Recipe) -> None:
    """Print the estimate of ``cfsp prune``; then fail where the run itself would.

    Raises:
        CfspError: an architecture that cannot be pruned, too little memory; besides bad arguments.
    """
    found = estimate(
        arguments.model,
        recipe,
        eval_windows=arguments.eval_windows,
        max_memory=arguments.max_memory,
        latency_table=arguments.latency_table,
        device=arguments.device,
        **given(arguments, DRY_RUN_OPTIONS),
    )
    if not print_json(arguments, found.to_dict()):
        Console().print(found.table())
    if not found.supported:
        raise unsupported(found.architecture)
    found.check(parse_memory(arguments.max_memory))
