"""Small files, folders, and sizes as people read them."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .documents import to_json


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to fill that becomes ``path`` when all went well, and vanishes otherwise. Nobody can
    have put a link where it is meanwhile: its name is not to be guessed."""
    partial = path.with_name(f".cfsp-{secrets.token_hex(8)}")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(to_json(document, 1) + "\n", encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def format_bytes(count: float) -> str:
    """21474836480 -> "20.0 GiB"."""
    power = min(4, max(0, int(count).bit_length() - 1) // 10)
    return f"{count / 1024**power:.{int(power > 0)}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
