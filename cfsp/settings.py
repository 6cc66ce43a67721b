"""A setting told once: its dataclass field carries the default, the help, choices and bounds.

:func:`check`, the options of the command line and docs/api.md all come from it."""

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from types import NoneType
from typing import Any, TypeVar, get_args

from .errors import CfspError, shown, unknown_name
from .typed import MOST, Bound, decode, is_finite

Value = TypeVar("Value")
_KEY = "setting"


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
    most: int = MOST
    """Of a whole number: the largest, of either sign."""
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


def check(settings: Any) -> None:
    """Raise CfspError for the first field of a dataclass whose value is not of its type or breaks
    its own rules; None is valid where it is the default."""
    for field in dataclasses.fields(settings):
        about, value = setting_of(field) or Setting(""), getattr(settings, field.name)
        if value is None and field.default is None:
            continue
        kind = next(kind for kind in (*get_args(field.type), field.type) if kind is not NoneType)
        number = is_finite(value) or isinstance(value, float)
        if about.must_be is not None and number and not about.must_be.holds(value):
            raise CfspError(f"{field.name} must be {about.must_be.text}, got {shown(value)}")
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if not isinstance(value, kind):
                raise CfspError(f"{field.name} must be a {kind.__name__}, got {shown(value)}")
            continue
        decode(kind, value, "", field.name)
        if kind is int and abs(value) > about.most:
            raise CfspError(f"{field.name} must be at most {about.most}, got {value}")
        if about.choices and value not in about.choices:
            raise unknown_name(about.called or field.name, value, about.choices)
