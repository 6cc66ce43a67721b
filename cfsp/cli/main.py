"""The command line: one line and exit code 2 for a user's mistake, never a traceback.

A command's module is imported when the command is chosen: ``cfsp --help`` needs none of them, nor
torch. Each has ``add_arguments(parser)``, ``run(arguments)``, which calls the public function and
prints what came of it, EXAMPLES, and as its docstring what ``cfsp COMMAND --help`` says first.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from .. import __version__
from ..distributed import joined, own_rank
from ..errors import CfspError, nearest, printable
from .process import ended, keep_memory, one_line_warnings, quiet

COMMANDS = {
    "demo": "the whole job on SmolLM2-135M, offline",
    "calibrate": "statistics of a model, once, in a file",
    "plan": "widths and kept channels, to look at or edit",
    "prune": "a smaller model in a new folder",
    "recover": "train a pruned model, to a new folder",
    "evaluate": "perplexity, speed and tasks of models, side by side",
    "latency": "seconds of a model by its FFN widths, measured",
    "export": "a model in the format of another runtime",
    "report": "one HTML page about pruned folders",
}
SHARED = frozenset({"calibrate", "prune", "evaluate"})
"""Commands whose work the processes of ``torchrun`` can share."""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a help text, and indents what follows an indented line."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        lines = []
        for line in text.splitlines():
            indent = " " * (len(line) - len(line.lstrip()))
            lines += textwrap.wrap(line, width, subsequent_indent=2 * indent)
        return lines


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line, printed by one rank."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        if own_rank() == 0:
            super()._print_message(message, file)


class _Command(_Parser):
    """The parser of a command, which gets its options from the module when it parses."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.get_default("run") is None:
            module = import_module(f".{self.prog.split()[-1]}", __package__)
            examples = textwrap.indent(module.EXAMPLES, "  ")
            self.description, self.epilog = module.__doc__, f"examples:\n{examples}"
            module.add_arguments(self)
            self.set_defaults(run=module.run)
        found, unknown = super().parse_known_args(args, namespace)
        options = [arg.partition("=")[0] for arg in unknown if arg.startswith("--")]
        for option in options:
            self.error(f"unknown option {option}{nearest(option, self._option_string_actions)}")
        return found, unknown


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="cfsp", description="Structured FFN pruning of large language models.")
    parser.add_argument("--version", action="version", version=f"cfsp {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Command
    )
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, formatter_class=_Formatter)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    if arguments.group.size > 1 and arguments.command not in SHARED:
        raise CfspError(f"cfsp {arguments.command} is for one process; start it without torchrun")
    keep_memory()
    with one_line_warnings(), quiet(arguments.group, arguments.quiet):
        arguments.run(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for text in sys.argv[1:] if argv is None else argv:
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # bytes that are no text
            print(f"cfsp: error: {printable(text)} is not UTF-8", file=sys.stderr)
            return 2
    arguments = build_parser().parse_args(argv)
    try:
        with joined() as arguments.group:
            code, message = ended(lambda: _run(arguments))
            if message and arguments.group.speaks():
                print(message, file=sys.stderr)
            return code
    except CfspError as error:
        print(f"cfsp: error: {printable(error)}", file=sys.stderr)
        return 2
