"""A setting told once: its dataclass field carries the default, the help, choices and bounds.

:func:`check`, the options of the command line and docs/api.md all come from it."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from .errors import CfspError, unknown_name

Value = TypeVar("Value")
_KEY = "setting"


@dataclass(frozen=True)
class Bound:
    """What a number must be; ``text`` in the words of an error: "1 or more"."""

    text: str
    holds: Callable[[Any], bool]


FRACTION = Bound("in [0, 1)", lambda value: 0 <= value < 1)
NOT_NEGATIVE = Bound("0 or more", lambda value: 0 <= value < math.inf)


def at_least(least: int) -> Bound:
    """Of a count."""
    return Bound(f"{least} or more", lambda value: not value < least)


def positive(words: str = "above 0") -> Bound:
    """Of a finite number above 0."""
    return Bound(words, lambda value: 0 < value < math.inf)


@dataclass(frozen=True)
class Setting:
    """What is known of a field beside its name, type and default; ``help`` in full sentences."""

    help: str
    choices: Collection[str] = ()
    """The valid values; a mapping tells each in one line."""
    must_be: Bound | None = None
    unset: str = ""
    """What the default stands for where it does not say it itself."""
    metavar: str | None = None
    called: str = ""
    """What errors call the field, where that is not its name."""

    def metadata(self) -> dict[str, Any]:
        return {_KEY: self}


def setting(default: Value, help: str, **more: Any) -> Value:
    """A dataclass field with this default and :class:`Setting`; typed as its default, as
    :func:`dataclasses.field` is."""
    return dataclasses.field(default=default, metadata=Setting(help, **more).metadata())


def setting_of(field: "dataclasses.Field[Any]") -> Setting | None:
    return field.metadata.get(_KEY)


KINDS: dict[type, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
}


def _check_kind(field: "dataclasses.Field[Any]", value: Any) -> None:
    """Of numbers, which True and False are not here, and of these two."""
    kind = (*get_args(field.type), field.type)[0]
    known, text = KINDS.get(kind, (object, ""))
    if not isinstance(value, known) or (isinstance(value, bool) and kind in (int, float)):
        raise CfspError(f"{field.name} must be {text}, got {value!r}")


def check(settings: Any) -> None:
    """Raise CfspError for the first field of a dataclass whose value breaks its own rules; None is
    valid where it is the default."""
    for field in dataclasses.fields(settings):
        about, value = setting_of(field), getattr(settings, field.name)
        if about is None or (value is None and field.default is None):
            continue
        if about.choices and value not in about.choices:
            raise unknown_name(about.called or field.name, value, about.choices)
        _check_kind(field, value)
        if about.must_be is not None and not about.must_be.holds(value):
            raise CfspError(f"{field.name} must be {about.must_be.text}, got {value}")
