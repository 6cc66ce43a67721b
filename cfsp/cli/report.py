"""Write one HTML page about pruned folders, which asks for nothing from any network."""

import argparse
from pathlib import Path

from ..checkpoints.documents import read_evaluation, read_result
from ..errors import CfspError
from ..report.page import write_report
from ..report.pictures import write_pictures
from .options import add_output, check_new, print_json

EXAMPLES = """\
cfsp report pruned --out report.html
cfsp report pruned half --evaluation evaluation.json --png pictures
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``cfsp report``."""
    parser.add_argument("folders", metavar="DIR", nargs="+", help="What cfsp prune wrote")
    parser.add_argument("--out", default="report.html", help="The page (default: %(default)s)")
    parser.add_argument(
        "--evaluation",
        metavar="FILE",
        action="append",
        default=[],
        help="What `cfsp evaluate --json` printed, of these and of other models; may be repeated",
    )
    parser.add_argument(
        "--png",
        metavar="DIR",
        help="Write pictures for model cards there too; needs the extra `report`",
    )
    add_output(parser, quiet=False)
    parser.set_defaults(quiet=True)


def run(arguments: argparse.Namespace) -> None:
    """Write the page, and the pictures where they are asked for."""
    out = check_new(arguments.out, arguments.overwrite)
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
