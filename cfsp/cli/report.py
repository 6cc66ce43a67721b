"""Write one HTML page about pruned folders, which asks for nothing from any network."""

import argparse
from pathlib import Path

from ..checkpoints.documents import read_evaluation, read_result
from ..errors import CfspError
from ..io.outputs import new_file
from ..report.page import report_html
from ..report.pictures import write_pictures
from .options import add_output, show

EXAMPLES = """\
cfsp report pruned --out report.html
cfsp report pruned half --evaluation evaluation.json --png pictures
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", metavar="DIR", nargs="+", help="What cfsp prune wrote")
    add("--out", default="report.html", help="The page (default: %(default)s)")
    text = "What `cfsp evaluate --json` printed, of these and of other models; may be repeated"
    add("--evaluation", metavar="FILE", action="append", default=[], help=text)
    text = "Write pictures for model cards there too; needs the extra `report`"
    add("--png", metavar="DIR", help=text)
    add_output(parser, but="quiet")
    parser.set_defaults(quiet=True)


def run(arguments: argparse.Namespace) -> None:
    out, overwrite = Path(arguments.out), arguments.overwrite
    inputs, paths = [*arguments.folders, *arguments.evaluation], list[Path]()
    with new_file(out, overwrite, inputs) as page:
        results = [read_result(folder) for folder in arguments.folders]
        evaluations = [model for file in arguments.evaluation for model in read_evaluation(file)]
        if arguments.png:
            if len({result.name for result in results}) < len(results):
                raise CfspError("--png names pictures after folders, and two of them have one name")
            for result in results:
                paths += write_pictures(result, Path(arguments.png), overwrite, inputs)
        page.write_text(report_html(results, evaluations), encoding="utf-8")
    pictures = list(map(str, paths))
    show(arguments, {"report": str(out), "pictures": pictures}, str(out), *pictures)
