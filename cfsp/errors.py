"""The one exception for what a user can mend: a line for a person, exit code 2 in a command."""

from collections.abc import Iterable


class CfspError(ValueError):
    """Bad input, told in one line: the offending value and what was expected. A parameter to set is
    in backquotes, `seqlen` or `resume=True`; the command line shows its option."""


class Stopped(Exception):
    """A run that was asked to stop did so between two blocks."""


class RankLost(Stopped):
    """Another rank of the job has ended, so that this one cannot go on; what is done is kept."""


def unknown_name(what: str, name: str, valid: Iterable[str]) -> CfspError:
    """The error for a name that a registry does not hold; lists those it does."""
    return CfspError(f"unknown {what} {name!r}; valid: {', '.join(valid)}")
