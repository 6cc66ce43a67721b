"""Where the result of a job goes, and the folder that it works in."""

import argparse
from pathlib import Path
from typing import Any

from cfsp.io.files import write_json


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, whole or not at all, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


def check_work(parser: argparse.ArgumentParser, folder: Path) -> None:
    """End with the parser's error where a folder to fill and to empty holds anything."""
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"--work {folder} is not empty, and it would be removed")
