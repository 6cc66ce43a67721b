"""Values from outside, checked and taken apart by the annotations of dataclasses.

A document is declared once, as a frozen dataclass; :func:`decode` makes one of what a JSON or YAML
parser gave, and names the place of the first value that is not what its annotation says::

    plan.json: blocks[3].width must be a whole number, got '5'
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from .errors import CfspError, named, shown

MOST = 2**31 - 1
"""What a count or a seed is at most, where nothing else is said."""
MAX_BITS = 64


@dataclass(frozen=True)
class Bound:
    """What a value must be; ``text`` in the words of an error: "1 or more"."""

    text: str
    holds: Callable[[Any], bool]


def between(low: float, high: float) -> Bound:
    """Of a number, both ends included."""
    return Bound(f"in [{low}, {high}]", lambda value: low <= value <= high)


Count = Annotated[int, between(1, MOST)]
Natural = Annotated[int, between(0, MOST)]
NotNegative = Annotated[float, Bound("0 or more", lambda value: value >= 0)]


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether it is a number, true and false not counted, that a float can hold."""
    try:
        return _is_number(value, numbers.Real) and math.isfinite(value)
    except OverflowError:
        return False


def _is_text(value: Any) -> bool:
    """Text that any file or path may hold: no NUL, no half of a surrogate pair."""
    try:
        return isinstance(value, str) and b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def _is_whole(value: Any) -> bool:
    return _is_number(value, numbers.Integral) and int(value).bit_length() < MAX_BITS


def _real(value: Any) -> str:
    return "a finite number" if _is_number(value, numbers.Real) else "a number"


SCALARS: dict[type, tuple[Callable[[Any], bool], Callable[[Any], str]]] = {
    bool: (lambda value: isinstance(value, bool), lambda _: "true or false"),
    int: (_is_whole, lambda _: "a whole number"),
    float: (is_finite, _real),
    str: (_is_text, lambda value: "text in UTF-8" if isinstance(value, str) else "text"),
}
"""Type -> whether a value is of it, and in the words of an error what it should have been."""


Decoder = Callable[[Any], Any]


class _Wrong(Exception):
    """A value that is not what it should be, and the way to it, which grows as this goes up."""

    def __init__(self, text: str, path: str = "") -> None:
        self.text, self.path = text, path


def _must_be(words: str, value: Any) -> _Wrong:
    return _Wrong(f"must be {words}, got {shown(value)}")


def decode(kind: Any, value: Any, what: str = "", at: str = "") -> Any:
    """``value``, plain as of a parser, as ``kind``: bool, int, float, str, ``X | None``,
    ``tuple[X, ...]``, ``tuple[X, Y]``, ``dict[str, X]``, a dataclass of such fields, Any; or one of
    these ``Annotated`` with a :class:`Bound`. Raises CfspError for anything else, and for a key
    that is missing or unknown; ``what`` is the document, ``at`` the place in it."""
    try:
        return _decoder(kind)(value)
    except _Wrong as wrong:
        where = ": ".join(part for part in (what, (at + wrong.path).lstrip(".") or "it") if part)
        raise CfspError(f"{where} {wrong.text}") from None


@cache
def _decoder(kind: Any) -> Decoder:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value: value
    if origin is Annotated:
        return partial(_bounded, _decoder(inner[0]), inner[1:])
    if origin in (Union, UnionType):
        some = _decoder(next(part for part in inner if part is not NoneType))
        return lambda value: None if value is None else some(value)
    if origin is tuple:
        return partial(_tuple, tuple(map(_decoder, (part for part in inner if part is not ...))))
    if origin is dict:
        return partial(_dict, _decoder(inner[1]))
    if dataclasses.is_dataclass(kind):
        return partial(_dataclass, kind)
    return partial(_scalar, kind, *SCALARS[kind])


def _scalar(kind: Any, is_one: Callable[[Any], bool], words: Callable, value: Any) -> Any:
    if not is_one(value):
        raise _must_be(words(value), value)
    return kind(value)


def _bounded(decoder: Decoder, bounds: tuple[Bound, ...], value: Any) -> Any:
    found = decoder(value)
    for bound in bounds:
        if not bound.holds(found):
            raise _must_be(bound.text, value)
    return found


def _part(step: str | int, decoder: Decoder, value: Any) -> Any:
    """Decode a part; an error says where it is, by the key or position that leads there."""
    try:
        return decoder(value)
    except _Wrong as wrong:
        wrong.path = (f"[{step}]" if isinstance(step, int) else f".{named(step)}") + wrong.path
        raise


def _tuple(decoders: tuple[Decoder, ...], value: Any) -> tuple[Any, ...]:
    """Of any length where there is one decoder."""
    if not isinstance(value, list | tuple):
        raise _must_be("a list", value)
    if len(decoders) > 1 and len(value) != len(decoders):
        raise _must_be(f"a list of {len(decoders)}", value)
    return tuple(_part(n, decoders[n % len(decoders)], part) for n, part in enumerate(value))


def _dict(decoder: Decoder, value: Any) -> dict[str, Any]:
    return {key: _part(key, decoder, part) for key, part in _mapping(value).items()}


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(map(_is_text, value)):
        raise _must_be("a mapping of texts", value)
    return value


@cache
def _fields(kind: Any) -> tuple[dict[str, Decoder], set[str]]:
    """Decoders of all fields, and those that have no default."""
    hints = get_type_hints(kind, include_extras=True)
    fields = dataclasses.fields(kind)
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    return {field.name: _decoder(hints[field.name]) for field in fields}, needed


def _dataclass(kind: Any, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    decoders, needed = _fields(kind)
    if unknown := [key for key in _mapping(value) if key not in decoders]:
        key, valid = shown(unknown[0]), ", ".join(decoders)
        raise _Wrong(f"has the unknown key {key}; valid: {valid}")
    if missing := sorted(needed - value.keys()):
        raise _Wrong("is missing", f".{missing[0]}")
    return kind(**{key: _part(key, decoders[key], part) for key, part in value.items()})


def check_whole(name: str, value: Any, least: int = 0, most: int = MOST) -> None:
    """Raise CfspError for a parameter that is not a whole number, or too small or large."""
    decode(int, value, "", name)
    if not least <= value <= most:
        wanted = f"{least} or more" if value < least else f"at most {most}"
        raise CfspError(f"{name} must be {wanted}, got {value}")
