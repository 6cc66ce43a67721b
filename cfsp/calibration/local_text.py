"""The texts of a file or folder: plain text, tables, what ``datasets`` saved and folders that are
laid out as on the hub. No code of a folder is ever run."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CfspError
from ..io.documents import read_json
from .columns import pick_column, row_text
from .table_files import Table, arrow_columns, checked, lines_of, open_table


def local_texts(
    path: Path, splits: Sequence[str], column: str | None, tokenizer: Any
) -> Iterator[str]:
    """The texts of a file, or of a folder: of the first of ``splits`` that is there, else of its
    only one. Of a table, those of the column ``column``, or else of the one that
    :func:`pick_column` picks, without nulls; chats go through the tokenizer's chat template.
    CfspError where there is nothing to read."""
    for source, table in _sources(path, splits):
        if table is None:
            text = "".join(lines_of(source)).removeprefix("\ufeff")
            yield text.replace("\r\n", "\n").replace("\r", "\n")
        else:
            yield from _column_texts(table, source, column, tokenizer)


def _sources(path: Path, splits: Sequence[str]) -> Iterator[tuple[Path, Table | None]]:
    """Every file to read with its table, None for plain text; or the folder with the one of all."""
    if not path.is_dir():
        yield path, open_table(path)
        return
    odd = (entry for entry in path.rglob("*") if not entry.is_file() and not entry.is_dir())
    if found := next(odd, None):  # datasets would wait for a pipe
        raise CfspError(f"{found} is neither a file nor a folder")
    from datasets import Dataset, load_dataset_builder, load_from_disk

    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        _check_saved(path)
        saved = load_from_disk(str(path))
        data = (saved if isinstance(saved, Dataset) else _split(saved, splits, path)).data

        def values(name: str) -> Iterator[Any]:
            for chunk in data.column(name).chunks:
                yield from checked(chunk)

        yield path, Table(arrow_columns(data.schema), values)
        return
    whole = path.resolve()
    files = load_dataset_builder(str(whole)).config.data_files or {}
    for file in _split({str(name): those for name, those in files.items()}, splits, path):
        if not Path(os.path.normpath(file)).is_relative_to(whole):
            raise CfspError(f"{path}: its README names {file!r}, outside of the folder")
        yield Path(file), open_table(Path(file))


def _check_saved(path: Path) -> None:
    """Raise CfspError where what ``datasets`` saved names files outside of the folder."""
    for document in (*path.rglob("dataset_dict.json"), *path.rglob("state.json")):
        said = read_json(document)
        said = said if isinstance(said, dict) else {}
        parts = said.get("splits") or said.get("_data_files") or []
        for part in parts if isinstance(parts, list) else ():
            name = str(part.get("filename", "")) if isinstance(part, dict) else str(part)
            if Path(name).name != name:
                raise CfspError(f"{document} names {name!r}, which is not in its folder")


def _split(found: Mapping[str, Any], wanted: Sequence[str], path: Path) -> Any:
    name = next((name for name in wanted if name in found), None)
    if name is None and len(found) != 1:
        raise CfspError(
            f"{path} has no split {' or '.join(wanted)}, got {', '.join(found) or 'none'}"
        )
    return found[name or next(iter(found))]


def _column_texts(table: Table, path: Path, column: str | None, tokenizer: Any) -> Iterator[str]:
    column = pick_column(table.columns, column, str(path))
    for number, value in enumerate(table.values(column), 1):
        try:
            text = row_text(value, tokenizer)
        except CfspError as error:
            told = ", ".join(f"{name} ({kind})" for name, kind in table.columns.items())
            raise CfspError(
                f"{path}, row {number} of column {column!r}: {error}; columns: {told}"
            ) from error
        if text is not None:
            yield text
