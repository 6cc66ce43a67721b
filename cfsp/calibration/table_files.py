"""Files with columns: their types, and the values of one column at a time.

Parquet and Arrow are read by pyarrow; JSON and CSV row by row, so that columns that are not asked
for may hold anything."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from pyarrow import parquet

from ..errors import CfspError, shown
from ..io.documents import check_regular
from .columns import CHAT, NULL, TEXT, is_turn

ROWS_LOOKED_AT = 1000
"""By which the columns of JSON and CSV are known."""


@dataclass(frozen=True)
class Table:
    """Columns with their types, and how the values of one are read."""

    columns: Mapping[str, str]
    values: Callable[[str], Iterator[Any]]


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(pa.input_stream(str(path), compression="zstd")),
}
"""Suffix -> what opens such a file for reading."""


def suffixes(path: Path) -> tuple[str, str]:
    """(suffix of the format, suffix of the compression or "")."""
    last = path.suffix.lower()
    if last in COMPRESSIONS:
        return Path(path.stem).suffix.lower(), last
    return last, ""


def opened(path: Path) -> Any:
    """The bytes of a file, decompressed."""
    check_regular(path)
    return COMPRESSIONS.get(suffixes(path)[1], lambda plain: plain.open("rb"))(path)


def _seekable(path: Path) -> Any:
    """A file for readers that jump; zst is read whole for them."""
    stream = opened(path)
    return stream if stream.seekable() else io.BytesIO(stream.read())


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a file in UTF-8, each with its end; CfspError with the byte that is not."""
    place = 0
    with opened(path) as stream:
        for line in stream:
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                where = place + error.start
                raise CfspError(f"{path} is not text in UTF-8, at byte {where}") from None
            if b"\0" in line:
                raise CfspError(f"{path} is not text, it has NUL at byte {place + line.index(0)}")
            place += len(line)


def open_table(path: Path) -> Table | None:
    """The table in a file; None where its suffix is none of :data:`FORMATS`."""
    table_of = FORMATS.get(suffixes(path)[0])
    return table_of(path) if table_of is not None else None


def arrow_columns(schema: pa.Schema) -> dict[str, str]:
    return {field.name: _arrow_kind(field.type) for field in schema}


def _arrow_kind(kind: pa.DataType) -> str:
    of, types = kind, pa.types
    if types.is_dictionary(kind):
        of = kind.value_type
    if types.is_string(of) or types.is_large_string(of) or types.is_string_view(of):
        return TEXT
    if types.is_null(kind):
        return NULL
    if isinstance(kind, pa.ListType | pa.LargeListType) and types.is_struct(kind.value_type):
        turn = kind.value_type
        if is_turn(turn.field(number).name for number in range(turn.num_fields)):
            return CHAT
    return str(kind) if len(str(kind)) <= 60 else f"{str(kind)[:57]}..."


def checked(values: pa.Array) -> list[Any]:
    """The values of an array of Arrow's own format, which is memory as it is: a damaged offset in
    it would be followed anywhere."""
    values.validate(full=True)
    return values.to_pylist()


def _parquet(path: Path) -> Table:
    def values(column: str) -> Iterator[Any]:
        with _seekable(path) as stream:
            for batch in parquet.ParquetFile(stream).iter_batches(256, columns=[column]):
                yield from batch.column(column).to_pylist()

    with _seekable(path) as stream:
        return Table(arrow_columns(parquet.ParquetFile(stream).schema_arrow), values)


def _arrow(path: Path) -> Table:
    """A stream, as datasets caches them, or a file with a footer."""

    def batches(stream: IO[bytes]) -> tuple[pa.Schema, Iterable[pa.RecordBatch]]:
        start = stream.read(6)
        stream.seek(0)
        if start != b"ARROW1":
            reader = pa.ipc.open_stream(stream)
            return reader.schema, reader
        reader = pa.ipc.open_file(stream)
        numbers = range(reader.num_record_batches)
        return reader.schema, (reader.get_batch(number) for number in numbers)

    def values(column: str) -> Iterator[Any]:
        with _seekable(path) as stream:
            for batch in batches(stream)[1]:
                yield from checked(batch.column(column))

    with _seekable(path) as stream:
        return Table(arrow_columns(batches(stream)[0]), values)


def _json(path: Path) -> Table:
    """A list of objects, or an object a line."""

    def rows() -> Iterator[dict[str, Any]]:
        lines = lines_of(path)
        first = next((line for line in lines if line.strip("\ufeff \t\r\n")), "")
        first = first.removeprefix("\ufeff")
        if first.lstrip().startswith("["):
            found = json.loads("".join(chain([first], lines)))
        else:
            numbered = enumerate(chain([first], lines), 1)
            found = (_json_line(line, path, n) for n, line in numbered if line.strip())
        for number, row in enumerate(found, 1):
            if not isinstance(row, dict):
                raise CfspError(f"{path}: row {number} is no object with columns")
            yield row

    return _by_rows(rows, _json_kind)


def _json_line(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        at = f"line {number}: {shown(line.strip())}"
        raise CfspError(f"{path} is neither JSON nor an object a line, at {at}") from None


def _json_kind(values: list[Any]) -> str:
    """The type of these values, which are not null."""
    if not values:
        return NULL
    if all(isinstance(value, str) for value in values):
        return TEXT
    if all(
        isinstance(value, list) and all(isinstance(t, dict) and is_turn(t) for t in value)
        for value in values
    ):
        return CHAT
    words = {dict: "object", str: TEXT, bool: "boolean", int: "number", float: "number"}
    return " or ".join(sorted({words.get(type(value), "list") for value in values}))


def _csv(path: Path) -> Table:
    """Text with a header, between commas; between tabs where the suffix says so."""
    delimiter = "\t" if suffixes(path)[0] == ".tsv" else ","

    def rows() -> Iterator[dict[str, Any]]:
        csv.field_size_limit(sys.maxsize)  # or a document of more than 128 KiB is an error
        lines = lines_of(path)
        lines = chain([next(lines, "").removeprefix("\ufeff")], lines)
        reader = csv.DictReader(lines, delimiter=delimiter)
        names = reader.fieldnames or ()
        if len(set(names)) < len(names):
            raise CfspError(f"{path} has two columns of one name: {shown(', '.join(names))}")
        for number, row in enumerate(reader, 1):
            if None in row:
                raise CfspError(
                    f"{path}, row {number} has more than the {len(names)} fields of its header: "
                    f"put fields that hold {delimiter!r} in quotes"
                )
            yield {name: value or None for name, value in row.items()}

    return _by_rows(rows, _csv_kind)


def _csv_kind(values: list[str]) -> str:
    try:
        return "number" if [float(value) for value in values] else NULL
    except ValueError:
        return TEXT


def _by_rows(rows: Callable[[], Iterator[dict[str, Any]]], kind: Callable[[Any], str]) -> Table:
    found: dict[str, list[Any]] = {}
    for row in islice(rows(), ROWS_LOOKED_AT):
        for name, value in row.items():
            known = found.setdefault(name, [])
            if value is not None:
                known.append(value)
    columns = {name: kind(values) for name, values in found.items()}
    return Table(columns, lambda column: (row.get(column) for row in rows()))


FORMATS: dict[str, Callable[[Path], Table]] = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".json": _json,
    ".jsonl": _json,
    ".ndjson": _json,
    ".csv": _csv,
    ".tsv": _csv,
}
"""Suffix -> what opens such a file; others are plain text."""
