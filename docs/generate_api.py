"""Write docs/api.md from the docstrings of what ``cfsp`` and ``cfsp_kernels`` export.

``python docs/generate_api.py`` writes it, ``--check`` fails where it is not up to date.
"""

import argparse
import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from cfsp.settings import Setting, setting_of

PAGE = Path(__file__).with_name("api.md")
PACKAGES = ("cfsp", "cfsp_kernels")
HEAD = """\
# API

What `import cfsp` and `import cfsp_kernels` give, from their docstrings by
`python docs/generate_api.py`. The commands are told by `cfsp --help` and `cfsp COMMAND --help`.
"""


def as_markdown(text: str) -> str:
    """Roles and double backticks as code."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")


def text_of(thing: Any) -> str:
    """A docstring as Markdown: headings of its parts bold, arguments and errors as lists."""
    text = as_markdown(inspect.getdoc(thing) or "")
    text = re.sub(r"\n {8}(\S)", r" \1", text)
    text = re.sub(r"^ {4}(\w[\w, ]*): ", r"* `\1`: ", text, flags=re.MULTILINE)
    return re.sub(r"^(Args|Returns|Raises):\n", r"**\1**\n\n", text, flags=re.MULTILINE)


def short(text: str) -> str:
    """Types without the modules they lie in."""
    return re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", text.replace("collections.abc.", ""))


def parameter_text(parameter: inspect.Parameter) -> str:
    """A parameter with its type and default; a default that is an object as its class."""
    text, default = str(parameter.replace(default=parameter.empty)), parameter.default
    if default is parameter.empty:
        return short(text)
    shown = repr(default)
    if isinstance(default, type):
        shown = default.__name__
    elif dataclasses.is_dataclass(default):
        shown = f"{type(default).__name__}(...)"
    return f"{short(text)} = {shown}"


def signature_of(name: str, function: Any) -> str:
    """How it is called, a parameter a line."""
    signature = inspect.signature(function)
    lines, keyword_only = [], False
    for parameter in signature.parameters.values():
        if parameter.kind == parameter.KEYWORD_ONLY and not keyword_only:
            lines.append("*")
        keyword_only = keyword_only or parameter.kind in (
            parameter.KEYWORD_ONLY,
            parameter.VAR_POSITIONAL,
        )
        lines.append(parameter_text(parameter))
    result = inspect.formatannotation(signature.return_annotation)
    ends = "" if signature.return_annotation is signature.empty else f" -> {short(result)}"
    inside = "".join(f"\n    {line}," for line in lines)
    return f"{name}({inside}\n){ends}" if lines else f"{name}(){ends}"


def setting_text(field: Any, setting: Setting) -> tuple[str, str]:
    """A field with its type and default, and its help with the choices and what None stands for."""
    shown = f"{field.name}: {inspect.formatannotation(field.type)}"
    if field.default is not dataclasses.MISSING:
        shown += f" = {field.default!r}".replace("'", '"')
    text = setting.help
    if isinstance(setting.choices, Mapping):
        text += " " + "; ".join(f"{name}: {told}" for name, told in setting.choices.items()) + "."
    elif setting.choices:
        text += f" One of {', '.join(setting.choices)}."
    if field.default is None and setting.unset:
        text += f" None: {setting.unset}."
    return shown, text


def members_of(kind: type) -> list[str]:
    """Fields of a dataclass with the help of their settings, or with what stands under them; public
    methods and properties."""
    lines = []
    if dataclasses.is_dataclass(kind):
        settings = {field.name: (field, setting_of(field)) for field in dataclasses.fields(kind)}
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
        for field, after in zip_longest(body, body[1:]):
            if not isinstance(field, ast.AnnAssign):
                continue
            described, setting = settings[field.target.id]
            if setting is not None:
                shown, text = setting_text(described, setting)
            else:
                told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                text = " ".join(str(after.value.value).split()) if told else ""
                shown = ast.unparse(field).replace("'", '"')
            lines.append(f"* `{shown}`{': ' * bool(text)}{as_markdown(text)}")
    for name, member in vars(kind).items():
        function = member.fget if isinstance(member, property) else member
        function = getattr(function, "func", None) or getattr(function, "__func__", function)
        if name.startswith("_") or not inspect.isroutine(function) or not function.__doc__:
            continue
        shown = f"{name}()" if inspect.isroutine(member) else name
        first = text_of(function).split("\n\n")[0].replace("\n", " ")
        lines.append(f"* `{shown}`: {first}")
    return lines


def entry(name: str, thing: Any) -> str:
    """The section of one exported name."""
    parts = [f"### {name}"]
    if isinstance(thing, type):
        parts.extend([text_of(thing), "\n".join(members_of(thing))])
    else:
        parts.extend([f"```python\n{signature_of(name, thing)}\n```", text_of(thing)])
    return "\n\n".join(part for part in parts if part)


def api() -> str:
    """The whole page."""
    sections = [HEAD.rstrip()]
    for package in PACKAGES:
        module = importlib.import_module(package)
        sections.append(f"## {package}\n\n{text_of(module)}")
        for name in sorted(module.__all__, key=str.lower):
            thing = getattr(module, name)
            if callable(thing):
                sections.append(entry(name, thing))
    return re.sub(r"[ \t]+\n", "\n", "\n\n".join(sections)) + "\n"


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        PAGE.write_text(api(), "utf-8")
    elif PAGE.read_text("utf-8") != api():
        print(f"{PAGE} is not up to date: python docs/generate_api.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
