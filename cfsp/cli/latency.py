"""Measure the seconds of a forward call of a model by the widths of its FFNs."""

import argparse
import re

from rich.console import Console
from rich.table import Table

from ..api import latency_table
from ..costs.latency import LatencyTable, save_table
from ..errors import CfspError
from ..pruning.budget import BATCH, LENGTH
from ..pruning.recipe import Recipe
from .options import MODEL, add_device, add_fields, add_output, check_new, print_json

EXAMPLES = """\
cfsp latency HuggingFaceTB/SmolLM2-135M --out table.json
cfsp latency HuggingFaceTB/SmolLM2-135M --shape 8x1 --device cuda
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``cfsp latency``."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--out", metavar="TABLE.json", help="Write the table here too")
    add_device(parser)
    add_fields(parser, Recipe, ("dtype",))
    parser.add_argument(
        "--shape",
        default=f"{BATCH}x{LENGTH}",
        metavar="BATCHxLENGTH",
        help="Tokens of a forward call; 8x1: generation, 8 at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--again", action="store_true", help="Measure even where the table is kept from before"
    )
    add_output(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure or look up the table of a model, print it, write it."""
    found = re.fullmatch(r"(\d+)x(\d+)", arguments.shape)
    if found is None:
        raise CfspError(f"shape {arguments.shape!r}: expected batch x length, such as 1x1024")
    out = check_new(arguments.out, arguments.overwrite) if arguments.out else None
    table = latency_table(
        arguments.model,
        batch=int(found[1]),
        length=int(found[2]),
        dtype=arguments.dtype or Recipe.dtype,
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
