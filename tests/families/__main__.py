"""``python -m tests.families --write`` makes docs/families.md; without it, prints the rows."""

import argparse
import tempfile
from pathlib import Path

from .checks import outcomes
from .page import HEAD, PAGE, row
from .tiny import FAMILIES


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("names", nargs="*", metavar="FAMILY", help="of these; all of them")
    arguments = parser.parse_args()
    if arguments.write and arguments.names:
        parser.error("--write takes all families")
    with tempfile.TemporaryDirectory() as root:
        rows = [row(o) for o in outcomes(arguments.names or FAMILIES, Path(root)).values()]
    if arguments.write:
        PAGE.write_text(HEAD + "".join(rows))
    else:
        print("".join(rows), end="")


if __name__ == "__main__":
    main()
