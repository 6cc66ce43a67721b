"""Measure the seconds of a forward call of a model by its FFN widths and KV groups."""

import argparse
import re
from contextlib import nullcontext
from pathlib import Path

from rich.table import Table

from ..api import latency_table
from ..costs.latency import LatencyTable, save_table
from ..errors import CfspError, shown
from ..io.outputs import new_file
from ..pruning.budget import BATCH, LENGTH, SHAPE
from ..pruning.recipe import Recipe
from .options import MODEL, add_device, add_fields, add_output, given, show

EXAMPLES = """\
cfsp latency HuggingFaceTB/SmolLM2-135M --out table.json
cfsp latency HuggingFaceTB/SmolLM2-135M --shape 8x1+4096 --units channels,groups --device cuda
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL)
    add("--out", metavar="TABLE.json", help="Write the table here too")
    add_device(parser)
    add_fields(parser, Recipe, ("dtype", "units"))
    text = (
        "Tokens of a forward call, and those in the cache before it; 8x1+4096: generation, 8 at a "
        "time (default: %(default)s)"
    )
    add("--shape", default=f"{BATCH}x{LENGTH}", metavar="BATCHxLENGTH[+CONTEXT]", help=text)
    add("--again", action="store_true", help="Measure even where the table is kept from before")
    add_output(parser)


def run(arguments: argparse.Namespace) -> None:
    found = re.fullmatch(SHAPE, arguments.shape, re.ASCII)
    if found is None:
        text = "expected batch x length, such as 1x1024, perhaps + context"
        raise CfspError(f"shape {shown(arguments.shape)}: {text}")
    out, inputs = arguments.out, [arguments.model]
    new = nullcontext() if out is None else new_file(Path(out), arguments.overwrite, inputs)
    with new as file:
        table = latency_table(
            arguments.model,
            batch=int(found[1]),
            length=int(found[2]),
            context=int(found[3] or 0),
            progress=not arguments.quiet,
            **given(arguments, ("dtype", "units", "device", "again")),
        )
        if file is not None:
            save_table(table, file)
    dense, outer = table.dense_seconds, table.outer_seconds
    whole = f"dense model: {dense * 1e3:.2f} ms, embeddings and head {outer * 1e3:.2f} ms"
    show(arguments, {**table.to_dict(), "dense_seconds": dense}, _shown(table), whole)


def _shown(table: LatencyTable) -> Table:
    """Milliseconds of a block by the units of its parts."""
    device, dtype = table.identity["device"], table.identity["dtype"]
    after = f" after {table.context}" if table.context else ""
    shown = Table(title=f"{device}, {dtype}, {table.batch} x {table.length} tokens{after}")
    for title in ("blocks", "part", "width", "ms a block", "of the dense model"):
        shown.add_column(title, justify="right")
    dense = table.dense_seconds
    for kind, curves in enumerate(table.kinds):
        count = table.blocks.count(kind)
        for number, curve in enumerate(curves):
            for width, seconds in zip(curve.widths, curve.seconds, strict=True):
                share = (dense + count * (seconds - curve.seconds[-1])) / dense
                part = "KV groups" if curve.groups else f"FFN {number}"
                sizes = (str(count), part, str(width))
                shown.add_row(*sizes, f"{seconds * 1e3:.3f}", f"{share:.1%}")
    return shown
