"""The command line of ``cfsp report``."""

import argparse
from pathlib import Path
from typing import Any

from ..checkpoints.documents import read_evaluation, read_result
from ..errors import CfspError
from ..report.page import write_report
from ..report.pictures import write_pictures
from .options import print_json


def add_report(commands: Any) -> argparse.ArgumentParser:
    """``cfsp report``; returns its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report", help="one HTML page about pruned folders"
    )
    parser.add_argument("folders", metavar="DIR", nargs="+", help="what cfsp prune wrote")
    parser.add_argument("--out", default="report.html", help="(default: %(default)s)")
    parser.add_argument(
        "--evaluation",
        metavar="FILE",
        action="append",
        default=[],
        help="what `cfsp evaluate --json` printed, of these and of other models; may be repeated",
    )
    parser.add_argument("--png", metavar="DIR", help="write pictures for model cards there too")
    parser.set_defaults(run=report, quiet=True)
    return parser


def report(arguments: argparse.Namespace) -> None:
    """Write the page, and the pictures where they are asked for."""
    out = Path(arguments.out)
    if out.exists() and not arguments.overwrite:
        raise CfspError(f"output {out} exists; --overwrite replaces it")
    results = [read_result(folder) for folder in arguments.folders]
    evaluations = [model for file in arguments.evaluation for model in read_evaluation(file)]
    pictures: list[Path] = []
    if arguments.png:
        names = [result.name for result in results]
        if len(set(names)) < len(names):
            raise CfspError("--png names pictures after folders, and two of them have one name")
        pictures = [
            picture for result in results for picture in write_pictures(result, Path(arguments.png))
        ]
    write_report(results, out, evaluations)
    written = [str(path) for path in (out, *pictures)]
    if not print_json(arguments, {"report": str(out), "pictures": written[1:]}):
        print("\n".join(written))
