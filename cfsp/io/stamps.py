"""Whether files are still those that were opened: by size, time of change and inode."""

from collections.abc import Iterable
from pathlib import Path

from ..errors import CfspError

Stamps = dict[Path, tuple[int, int, int]]
"""File -> size in bytes, time of change in ns, inode; of what a link points to."""


def stamps_of(files: Iterable[Path]) -> Stamps:
    """The stamps of files; CfspError for one that is not there."""
    found: Stamps = {}
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise CfspError(f"cannot read {file}: {error.strerror}") from None
        found[file] = status.st_size, status.st_mtime_ns, status.st_ino
    return found


def check_unchanged(stamps: Stamps) -> None:
    """Raise CfspError for the first file that is not what it was when its stamp was taken."""
    for file, stamp in stamps_of(stamps).items():
        if stamp != stamps[file]:
            raise CfspError(f"{file} has changed since this run opened it: start again")
