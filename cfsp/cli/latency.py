"""The command line of latency: ``cfsp latency`` and ``--latency-table``."""

import argparse
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..api import latency_table
from ..costs.latency import LatencyTable, save_table
from ..errors import CfspError
from ..pruning.budget import BATCH, LENGTH
from ..pruning.recipe import DTYPES
from .options import print_json


def add_latency(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``cfsp latency`` beside the model."""
    parser.add_argument(
        "--shape",
        default=f"{BATCH}x{LENGTH}",
        metavar="BATCHxLENGTH",
        help="tokens of a forward call; 8x1: generation, 8 at a time (default: %(default)s)",
    )
    parser.add_argument("--dtype", default="auto", metavar="|".join(DTYPES))
    parser.add_argument("--out", metavar="TABLE.json", help="write the table here too")
    parser.add_argument(
        "--again", action="store_true", help="measure even where the table is kept from before"
    )
    parser.set_defaults(run=run_latency)


def add_latency_table(group: argparse._ArgumentGroup) -> None:
    """``--latency-table``."""
    group.add_argument(
        "--latency-table",
        metavar="TABLE.json",
        help="of `cfsp latency`, perhaps on another machine, for --budget latency=0.25 "
        "(default: measured on --device, once)",
    )


def run_latency(arguments: argparse.Namespace) -> None:
    """Measure or look up the table of a model, print it, write it."""
    found = re.fullmatch(r"(\d+)x(\d+)", arguments.shape)
    if found is None:
        raise CfspError(f"shape {arguments.shape!r}: expected batch x length, such as 1x1024")
    out = Path(arguments.out) if arguments.out else None
    if out is not None and out.exists() and not arguments.overwrite:
        raise CfspError(f"output {out} exists; --overwrite replaces it")
    table = latency_table(
        arguments.model,
        batch=int(found[1]),
        length=int(found[2]),
        dtype=arguments.dtype,
        device=arguments.device,
        again=arguments.again,
        progress=not arguments.quiet,
    )
    if out is not None:
        save_table(table, out)
    if not print_json(arguments, {**table.to_dict(), "dense_seconds": table.dense_seconds}):
        print_latency(table, Console())


def print_latency(table: LatencyTable, console: Console) -> None:
    """Milliseconds of a block by width, and of the whole model."""
    identity = table.identity
    shown = Table(
        title=f"{identity['device']}, {identity['dtype']}, {table.batch} x {table.length} tokens"
    )
    for title in ("blocks", "FFN", "width", "ms a block", "of the dense model"):
        shown.add_column(title, justify="right")
    dense = table.dense_seconds
    for kind, curves in enumerate(table.kinds):
        count = table.blocks.count(kind)
        for number, curve in enumerate(curves):
            for width, seconds in zip(curve.widths, curve.seconds, strict=True):
                left = dense + count * (seconds - curve.seconds[-1])
                shown.add_row(
                    str(count),
                    str(number),
                    f"{width}",
                    f"{seconds * 1e3:.3f}",
                    f"{left / dense:.1%}",
                )
    console.print(shown)
    console.print(
        f"dense model: {dense * 1e3:.2f} ms, embeddings and head {table.outer_seconds * 1e3:.2f} ms"
    )
