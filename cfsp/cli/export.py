"""Write a model in the format of another runtime."""

import argparse

from ..checkpoints.exports import EXPORTERS, export
from ..checkpoints.exports.gguf_tensors import GGUF_TYPES
from .options import MODEL, add_output, given, show

EXAMPLES = """\
cfsp export pruned --to gguf --type f16 --out pruned.gguf
cfsp export pruned --to padded --multiple 128 --out padded
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--to", required=True, metavar="|".join(EXPORTERS), help="The format")
    parser.add_argument("--out", required=True, metavar="PATH", help="A folder; gguf: a file")
    add = parser.add_argument_group("format", "What only some formats have.").add_argument
    text = "gguf: type of the matrices (default: as stored)"
    add("--type", metavar="|".join(GGUF_TYPES), help=text)
    add("--pre", metavar="NAME", help="gguf: llama.cpp's pre-tokenizer (default: found out)")
    text = "padded: multiple of the width (default: 1)"
    add("--multiple", type=int, metavar="N", help=text)
    add_output(parser)


def run(arguments: argparse.Namespace) -> None:
    result = export(
        arguments.model,
        arguments.to,
        arguments.out,
        progress=not arguments.quiet,
        **given(arguments, ("type", "pre", "multiple", "overwrite")),
    )
    show(
        arguments,
        result.to_dict(),
        *(f"{name.replace('_', ' ')}: {value}" for name, value in result.details.items()),
        f"written, read back and compared: {result.out} ({result.nbytes:,} bytes)",
    )
