"""Where a result may go, and what it may replace: only what cfsp wrote, and can prove it did."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from ..errors import CfspError

Kind = Literal["folder", "file"]
Identity = tuple[int, int]

PARTIAL = ".partial"
MARKER = "cfsp.json"
"""In every folder of ours: a list of what cfsp put there."""
FOLDER_FORMAT, STAGING_FORMAT = "cfsp-folder-1", "cfsp-staging-1"
MAX_MARKER_BYTES = 16 << 20
HEAD_BYTES = 2048
PRINTED_BYTES = 1 << 20
OURS = re.compile(
    rb'\{\s*"format": "cfsp-'  # plans, latency tables
    rb'|.{8}\{"__metadata__":\{"cfsp":'  # statistics
    rb"|GGUF.{20,200}cfsp\.format"
    rb'|<!doctype html>.{0,900}<meta name="generator" content="cfsp">'
    rb"|\x89PNG.{8,200}tEXtSoftware\0cfsp",
    re.DOTALL,
)
"""How the files that cfsp writes begin."""


def partial_path(out: Path) -> Path:
    """The folder in which a result is made."""
    return out.with_name(f"{out.name}{PARTIAL}")


def check_place(out: Path, inputs: Iterable[object] = (), kind: Kind = "folder") -> Path:
    """The place of an output, with its links followed, dangling ones too.

    Raises CfspError for one that is an input, inside or around one, or around the current
    directory, and for what no result can be put in place of. Of ``inputs`` only paths that exist
    count; hub ids and None are passed over.
    """
    other = "folder" if kind == "folder" else "name"
    real = _followed(out)
    own, around = identity(real), _lineage(real)
    for given in inputs:
        if not isinstance(given, str | Path) or (source := identity(given)) is None:
            continue
        if source == own:
            raise CfspError(f"output {out} is the input; choose another {other}")
        if source in around or (own is not None and own in _inside(given)):
            raise CfspError(f"output {out} is inside the input {given}; choose a place outside")
        if own in _lineage(Path(os.path.realpath(str(given)))):
            raise CfspError(f"output {out} holds the input {given}; choose a place beside it")
    if own is not None and own in _current():
        raise CfspError(f"output {out} is or holds the current directory; choose another {other}")
    if os.path.ismount(real):
        raise CfspError(f"output {out} is a mount point; choose a {other} inside it")
    if real.name.endswith(PARTIAL) or any(is_staging(parent) for parent in real.parents):
        raise CfspError(f"output {out}: {PARTIAL} is for results under way; choose another {other}")
    if own is not None and not (real.is_dir() if kind == "folder" else real.is_file()):
        raise CfspError(f"output {out} exists and is not a {kind}")
    return real


def check_replaceable(
    out: Path, real: Path, overwrite: bool, kind: Kind = "folder", *, resumes: bool = False
) -> None:
    """Refuse an output that exists, unless it is to be replaced and cfsp wrote all of it;
    ``resumes``: the user asked for the rest of a run, and there is none."""
    if not real.exists():
        return
    if kind == "folder" and (other := stranger(real)) is not None:
        raise CfspError(f"output {out} exists and holds {other}; choose another folder")
    if kind == "file" and not _is_ours(real):
        raise CfspError(f"output {out} exists and cfsp did not write it; choose another name")
    if overwrite:
        if kind == "folder" and not os.access(real, os.W_OK):
            raise CfspError(f"cannot write {out}: no permission to replace it")
        return
    if resumes and read_marker(real) is not None:
        raise CfspError(f"output {out} is complete: there is nothing left to resume")
    raise CfspError(f"output {out} exists; `overwrite=True` replaces it")


def identity(path: str | Path) -> Identity | None:
    """What tells a file or folder from all others, by whatever path; None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _inside(folder: str | Path) -> list[Identity | None]:
    """What a folder holds, which may be links to elsewhere."""
    try:
        return [identity(entry.path) for entry in os.scandir(folder)]
    except OSError:  # a file, or not to be read, which is said when it is read
        return []


def _lineage(path: Path) -> set[Identity | None]:
    """A path and every folder that it is in, as far as they exist."""
    return {identity(place) for place in (path, *path.parents)} - {None}


def _current() -> set[Identity | None]:
    try:
        return _lineage(Path.cwd())
    except FileNotFoundError:  # it was removed
        return set()


def _followed(out: Path) -> Path:
    try:
        real = Path(os.path.realpath(out))
        str(real).encode()
        link = os.path.islink(real)
    except ValueError:  # bytes that are no text, or a NUL
        raise CfspError(f"output {str(out)!r}: expected a path in UTF-8") from None
    except OSError as error:
        raise CfspError(f"cannot write {out}: {error}") from None
    if link:
        raise CfspError(f"output {out} is a link that leads back to itself")
    return real


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What a folder says cfsp put there; None where it says nothing of the kind."""
    try:
        descriptor = os.open(folder / MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as stream:
            document = json.loads(stream.read(MAX_MARKER_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    ours = isinstance(document, dict) and document.get("format") in (FOLDER_FORMAT, STAGING_FORMAT)
    return document if ours else None


def is_staging(folder: Path) -> bool:
    """Whether a result is being made here, or was when its run was killed."""
    return (read_marker(folder) or {}).get("format") == STAGING_FORMAT


def contents(folder: Path) -> list[str]:
    """Names of everything in a folder but folders that hold something, sorted."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for root, folders, files in os.walk(folder, onerror=fail):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found += [Path(root, name).relative_to(folder).as_posix() for name in (*files, *links)]
        if root != str(folder) and not files and not folders:
            found.append(Path(root).relative_to(folder).as_posix())
    return sorted(found)


def prints(folder: Path) -> dict[str, str]:
    """What is in a folder, but for the marker, each with what tells whether it has changed."""
    return {name: _print(folder / name) for name in contents(folder) if name != MARKER}


def _print(path: Path) -> str:
    """Of size, begin and end: training changes weights everywhere, and nobody waits for hashes."""
    if path.is_symlink() or not path.is_file():
        return "link" if path.is_symlink() else "folder"
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest = hashlib.sha256(f"{size} ".encode() + stream.read(PRINTED_BYTES))
        stream.seek(max(0, size - PRINTED_BYTES))
        digest.update(stream.read(PRINTED_BYTES))
    return digest.hexdigest()[:32]


def stranger(folder: Path) -> str | None:
    """The first thing in a folder that cfsp did not write as it is, and what is wrong with it; None
    where there is nothing else."""
    marker = read_marker(folder)
    known = (marker or {}).get("files")
    ours = known if isinstance(known, dict) else {}
    for name in contents(folder):
        if name not in ours and (name != MARKER or not isinstance(known, dict)):
            return f"{name}, which cfsp did not write"
        if name != MARKER and ours[name] != _print(folder / name):
            return f"{name}, which has changed since cfsp wrote it"
    return None


def _is_ours(file: Path) -> bool:
    with file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    return not head or OURS.match(head) is not None
