"""JSON and YAML from files that others may have written: read whole, bounded, with one value for a
key, or refused in one line; and JSON as it is written."""

import json
import math
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ..errors import CfspError, reason
from ..typed import decode

MAX_BYTES = 100_000_000
"""Of a JSON document: the plan of a model with 30 million channels, kept at random, fits."""
MAX_YAML_BYTES = 500_000
"""A parser in Python takes seconds for it; recipe.yaml of a large model has a tenth."""
MAX_CONTAINERS = 1 << 20
"""Lists and mappings of a JSON document: each takes 20 times the memory of its two characters."""


@contextmanager
def reading(path: str | Path, what: str = "") -> Iterator[None]:
    """An error while a file is read, or in what it holds, is one line: of the system, or a
    ValueError, as for a NUL in the name. ``what`` is the kind of document, "plan "."""
    try:
        yield
    except CfspError:
        raise
    except (OSError, ValueError) as error:
        why = reason(getattr(error, "strerror", None) or error)
        raise CfspError(f"cannot read {what}{path}: {why}") from None


def check_regular(path: str | Path, what: str = "") -> None:
    """Raise CfspError for what is not a regular file or a link to one: opening a FIFO waits for
    ever, and a device may have no end."""
    with reading(path, what):
        mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "FIFO, socket or device"
        raise CfspError(f"cannot read {what}{path}: it is a {kind}, not a file")


def read_text(path: str | Path, what: str = "", most: int = MAX_BYTES) -> str:
    """A UTF-8 file of at most so many bytes; CfspError for anything else."""
    check_regular(path, what)
    with reading(path, what):
        with Path(path).open("rb") as stream:
            data = stream.read(most + 1)
        if len(data) > most:
            raise ValueError(f"it has more than the {most:,} bytes of a document")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"it is not UTF-8, at byte {error.start}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {twice[:60]!r} is there twice")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def _whole(text: str) -> int:
    if text == "-0":  # of JSON's parsers only Python's takes it for a whole number
        raise ValueError("-0 is not a whole number")
    return int(text)


def parse_json(text: str, *, finite: bool = True) -> Any:
    """JSON as its standard has it; ValueError for anything else, for a key that is there twice, for
    half a surrogate pair, and for deep nesting. NaN and infinity too where not ``finite``."""
    if text.count("[") + text.count("{") > MAX_CONTAINERS:
        raise ValueError(f"more than {MAX_CONTAINERS:,} lists and mappings")
    try:
        document = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_finite if finite else float,
            parse_float=_finite,
            parse_int=_whole,
        )
        if "\\ud" in text.lower():
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return document


class _Loader(yaml.SafeLoader):
    """Reads plain documents, which hold no more than their text says."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        found = super().construct_mapping(node, deep)
        if isinstance(node, yaml.MappingNode) and len(found) < len(node.value):
            raise yaml.YAMLError(f"a key is there twice, before line {node.end_mark.line + 1}")
        return found


def parse_yaml(text: str) -> Any:
    """Plain YAML, without aliases; ValueError for anything else."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(str(error)) from None  # PyYAML trips over some malformed scalars


def read_json(path: str | Path, what: str = "", *, finite: bool = True) -> Any:
    """A JSON document, or CfspError; see :func:`parse_json`."""
    with reading(path, what):
        return parse_json(read_text(path, what), finite=finite)


def read_yaml(path: str | Path, what: str = "") -> Any:
    """A YAML document, or CfspError."""
    with reading(path, what):
        return parse_yaml(read_text(path, what, MAX_YAML_BYTES))


def read_as(kind: Any, path: str | Path, what: str, form: str) -> Any:
    """What a JSON document has beside its ``format``, which must be ``form``; ``kind`` as for
    :func:`cfsp.typed.decode`."""
    document = read_json(path, f"{what} ")
    if not isinstance(document, dict) or document.pop("format", None) != form:
        raise CfspError(f"{path} is not a {what} of this version ({form})")
    return decode(kind, document, f"{path} is not a valid {what}")


def to_json(document: Any, indent: int | None = None) -> str:
    """JSON in one line, or indented; null for numbers that are not finite, which JSON lacks."""
    return json.dumps(_without_nan(document), indent=indent, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return value


class _Dumper(yaml.SafeDumper):
    """Writes a value in full wherever it occurs, without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def to_yaml(document: Any) -> str:
    """YAML of plain values, in their order."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False)
