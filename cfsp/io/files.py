"""Small files, folders, and sizes as people read them."""

import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CfspError
from .documents import reading, to_json
from .places import check_replaceable


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to fill that becomes ``path`` when all went well, and vanishes otherwise. Nobody can
    have put a link where it is meanwhile: its name is not to be guessed."""
    partial = path.with_name(f".cfsp-{secrets.token_hex(8)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    try:
        yield partial
        partial.chmod(mode)  # some writers make another file of this name, for its owner alone
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def json_text(document: dict[str, Any]) -> str:
    """A JSON document as a file has it."""
    return to_json(document, 1) + "\n"


@contextmanager
def saved_file(path: str | Path, what: str) -> Iterator[Path]:
    """:func:`whole_file` for a document at a path that a user chose: replaces only a file that cfsp
    wrote, and raises CfspError where ``what`` cannot be written."""
    path = Path(path)
    try:
        check_replaceable(path, path, overwrite=True, kind="file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            yield partial
    except OSError as error:
        raise CfspError(f"cannot write {what} {path}: {error.strerror}") from None


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json_text(document), encoding="utf-8")


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def format_bytes(count: float) -> str:
    """21474836480 -> "20.0 GiB"."""
    power = min(4, max(0, int(count).bit_length() - 1) // 10)
    return f"{count / 1024**power:.{int(power > 0)}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


Stamps = dict[Path, tuple[int, int, int]]
"""File -> size in bytes, time of change in ns, inode; of what a link points to."""


def stamps_of(files: Iterable[Path]) -> Stamps:
    """The stamps of files; CfspError for one that is not there."""
    found: Stamps = {}
    for file in files:
        with reading(file):
            status = file.stat()
        found[file] = status.st_size, status.st_mtime_ns, status.st_ino
    return found


def check_unchanged(stamps: Stamps) -> None:
    """Raise CfspError for the first file that is not what it was when its stamp was taken."""
    for file, stamp in stamps_of(stamps).items():
        if stamp != stamps[file]:
            raise CfspError(f"{file} has changed since this run opened it: start again")
