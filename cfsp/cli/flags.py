"""The option of a parameter. Errors of the library name parameters, `seqlen` or `resume=True`; on
the command line they name options."""

import re


def flag(name: str) -> str:
    """The option of a parameter."""
    return f"--{name.replace('_', '-')}"


def with_flags(text: str) -> str:
    """An error in the words of the command line: "`resume=True` continues" -> "--resume continues",
    "`bos='always'`" -> "--bos always"."""

    def option(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        return flag(name) if value in (None, "True") else f"{flag(name)} {value}"

    return re.sub(r"`(?P<name>\w+)(='?(?P<value>[\w.-]+)'?)?`", option, text)
