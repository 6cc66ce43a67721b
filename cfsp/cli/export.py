"""Write a model in the format of another runtime."""

import argparse

from ..checkpoints.exports import EXPORTERS, export
from ..checkpoints.exports.gguf_tensors import GGUF_TYPES
from .options import MODEL, add_output, print_json

EXAMPLES = """\
cfsp export pruned --to gguf --type f16 --out pruned.gguf
cfsp export pruned --to padded --multiple 128 --out padded
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``cfsp export``."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--to", required=True, metavar="|".join(EXPORTERS), help="The format")
    parser.add_argument("--out", required=True, metavar="PATH", help="A folder; gguf: a file")
    group = parser.add_argument_group("format", "What only some formats have.")
    group.add_argument(
        "--type",
        metavar="|".join(GGUF_TYPES),
        help="gguf: type of the matrices (default: as stored)",
    )
    group.add_argument(
        "--pre", metavar="NAME", help="gguf: llama.cpp's pre-tokenizer (default: found out)"
    )
    group.add_argument(
        "--multiple", type=int, metavar="N", help="padded: multiple of the width (default: 1)"
    )
    add_output(parser)


def run(arguments: argparse.Namespace) -> None:
    """Export, then print what was written."""
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
