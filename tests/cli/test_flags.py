"""Errors of the library name parameters, and the command line turns them into its options."""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cfsp
from cfsp.cli.flags import with_flags
from cfsp.cli.main import build_parser

LIBRARY = Path(cfsp.__file__).parent
NOT_OURS = {"--nproc-per-node", "--check", "--trust-remote-code"}
"""Options of torchrun, sha256sum and vLLM."""
PRINTED = LIBRARY / "report" / "usage.py"
"""Commands to copy, not errors."""


def texts() -> Iterator[tuple[str, str]]:
    """Every string of the library outside its command line, docstrings and the commands that it
    quotes aside; 0 is where a value goes."""
    for file in sorted(LIBRARY.rglob("*.py")):
        if file.is_relative_to(LIBRARY / "cli") or file == PRINTED:
            continue
        nodes = list(ast.walk(ast.parse(file.read_text())))
        seen = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                seen |= {id(value) for value in node.values}
                parts = [getattr(value, "value", None) for value in node.values]
                text = "".join(part if isinstance(part, str) else "0" for part in parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            if id(node) not in seen:
                yield (
                    f"{file.name}:{node.lineno}",
                    re.sub("`cfsp [^`]*`|cfsp evaluate --json", "", text),
                )


def options() -> set[str]:
    """The long options of all commands."""
    found: set[str] = set()
    kinds = argparse._SubParsersAction
    commands = next(action for action in build_parser()._actions if isinstance(action, kinds))
    for parser in commands.choices.values():
        with pytest.raises(SystemExit):
            parser.parse_args(["--help"])
        found.update(*(action.option_strings for action in parser._actions))
    return found


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("`seqlen`", "--seqlen"),
        ("lower `samples` or `micro_batch`", "lower --samples or --micro-batch"),
        ("`resume=True` continues it", "--resume continues it"),
        ("with `compensation='least-squares'`; more", "with --compensation least-squares; more"),
        ("and `damping=0.2`.", "and --damping 0.2."),
        ("`compensation='none'`", "--compensation none"),
        ("`width_multiple=8`", "--width-multiple 8"),
        ("`cfsp latency MODEL` makes one", "`cfsp latency MODEL` makes one"),
        ("a `b c` d", "a `b c` d"),
    ],
)
def test_a_parameter_becomes_its_option(text, shown):
    assert with_flags(text) == shown


def test_errors_of_the_library_name_no_options():
    named = [
        (place, text)
        for place, text in texts()
        if set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - NOT_OURS
    ]
    assert named == []


def test_every_parameter_in_an_error_has_an_option():
    known, found = options(), set()
    for place, text in texts():
        for option in re.findall(r"--[a-z][a-z-]+", with_flags(text)):
            if option not in NOT_OURS:
                found.add(option)
                assert option in known, (place, text, option)
    assert {"--seqlen", "--micro-batch", "--resume", "--overwrite"} <= found
