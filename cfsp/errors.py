"""The one exception for what a user can mend: a line for a person, exit code 2 in a command."""

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120


class CfspError(ValueError):
    """Bad input, in one line: the offending value and what was expected. A parameter to set is in
    backquotes, `seqlen` or `resume=True`; the command line shows its option."""


class Stopped(Exception):
    """A run that was asked to stop did so between two blocks."""


class RankLost(Stopped):
    """Another rank of the job has ended, so that this one cannot go on; what is done is kept."""


def shown(value: Any) -> str:
    """A value in an error: in one line, and short."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    return _REPR.repr(value)


def named(text: str) -> str:
    """A name in an error: as it is, but short and without what a terminal would act on."""
    return shown(text)[1:-1]


def unknown_name(what: str, name: str, valid: Iterable[str]) -> CfspError:
    """The error for a name that a registry does not hold; lists those it does."""
    known = list(valid)
    near = nearest(name, known)
    return CfspError(f"unknown {what} {shown(name)}{near}; valid: {', '.join(known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """What to add where a name is not known, but looks like one that is."""
    close = get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def reason(error: object) -> str:
    """What an exception says, in one short line."""
    return " ".join(str(error).split())[:300]


def first_of(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more


def printable(text: object) -> str:
    """Text that shows as it reads: whatever would move a cursor, turn the direction of writing or
    break the line, and half a surrogate pair, becomes an escape such as ``\\x1b``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
