"""docs/scaling.md says what benchmarks/jobs/scaling.py prints."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.jobs import scaling
from cfsp.cli.main import build_parser

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"


def test_the_tables_of_the_page_are_those_that_are_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scaling.main()
    printed = re.split(r"^## (\w+)\n", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    tables = dict(zip(printed[::2], printed[1::2], strict=True))
    assert list(tables) == ["assumptions", "steps", "memory", "traffic", "seconds", "recipes"]
    page = PAGE.read_text()
    for name, table in tables.items():
        assert table.strip() in page, name
    assert len(re.findall(r"^\| --- \|", page, re.MULTILINE)) == len(tables)


def test_the_commands_of_the_page_are_valid() -> None:
    commands = re.findall(
        r"^(?:cfsp|torchrun .* -m cfsp) (.*?)(?:\s+#.*)?$", PAGE.read_text(), re.M
    )
    assert len(commands) == 6
    for arguments in commands:
        assert build_parser().parse_args(shlex.split(arguments)).command == "prune"
