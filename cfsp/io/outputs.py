"""A result is made beside its place and takes it when it is whole: one run at a time, in one step.

``OUT.partial`` is a folder that only cfsp makes and that says so. It holds the new result, what the
run keeps to go on after an interruption, and at the end, for a moment, the old result. So whatever
is removed is in there, and a run that was killed leaves nothing else.
"""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from ..errors import CfspError, Stopped
from .files import json_text, sync, write_json
from .places import (
    FOLDER_FORMAT,
    MARKER,
    STAGING_FORMAT,
    Kind,
    check_place,
    check_replaceable,
    identity,
    is_staging,
    partial_path,
    prints,
)

RESULT, OLD = "result", "old"
STATE_FOLDER = ".cfsp-run"
MANIFEST = f"{STATE_FOLDER}/manifest.json"
AT_CURRENT_FOLDER, NO_REPLACE, EXCHANGE = -100, 1, 2  # of renameat2
NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
"""A kernel or a file system that has no such call."""


def can_resume(partial: Path) -> bool:
    """Whether a folder holds a run that was begun."""
    return os.path.isfile(partial / MANIFEST)


def staged(out: Path) -> Path:
    """Where :func:`new_folder` or :func:`new_file` has the result of ``out`` made."""
    return partial_path(Path(os.path.realpath(out))) / RESULT


@contextmanager
def new_folder(
    out: Path, overwrite: bool, resume: bool = False, inputs: Iterable[object] = ()
) -> Iterator[Path]:
    """A folder to fill that becomes ``out`` when all went well, and vanishes otherwise.

    Entered before any work, so that a place that cannot be is found then, and another run of the
    same ``out``. A run that can be resumed stays if it was stopped or the disk failed; one with
    ``resume``, after any error.
    """
    with _output(out, "folder", overwrite, resume, inputs) as folder:
        if folder.is_symlink():  # ours is never a link: somebody wants another folder written
            folder.unlink()
        folder.mkdir(exist_ok=True)
        yield folder


def new_file(
    out: Path, overwrite: bool, inputs: Iterable[object] = ()
) -> AbstractContextManager[Path]:
    """A file to write that becomes ``out`` when all went well, and vanishes otherwise."""
    return _output(out, "file", overwrite, False, inputs)


@contextmanager
def write_errors(out: Path) -> Iterator[None]:
    """An OSError while ``out`` is made is one line; not one about a file that is elsewhere."""
    try:
        yield
    except OSError as error:
        real = os.path.realpath(out)
        where = str(error.filename or real)
        if error.errno is None or not (where.startswith(real) or real.startswith(where)):
            raise
        begun = can_resume(partial_path(Path(real)))
        hint = "; `resume=True` continues this run" if begun else ""
        raise CfspError(f"cannot write {out}: {error}{hint}") from error


@contextmanager
def _output(
    out: Path, kind: Kind, overwrite: bool, resume: bool, inputs: Iterable[object]
) -> Iterator[Path]:
    with write_errors(out):
        real = check_place(out, inputs, kind)
        with _claimed(out, real) as partial:
            # One that was killed once its result was in place has nothing left to do.
            keep = begun = can_resume(partial) and (partial / RESULT).exists()
            try:
                _put_back(partial, real)
                check_replaceable(out, real, overwrite, kind, resumes=resume and not begun)
                if begun and not (resume or overwrite):
                    raise CfspError(
                        f"{partial_path(out)} is an interrupted run: `resume=True` continues it, "
                        "`overwrite=True` begins anew"
                    )
                if not (begun and resume):
                    _clear(partial)
                keep = resume
                yield partial / RESULT
                keep = True
                if kind == "folder":
                    marker = {"format": FOLDER_FORMAT, "files": prints(partial / RESULT)}
                    write_json(partial / RESULT / MARKER, marker)
                for path in (partial / RESULT, *(partial / RESULT).rglob("*")):
                    sync(path)
                check_replaceable(out, real, overwrite, kind)
                _publish(partial / RESULT, real, partial / OLD)
                keep = False
            except (OSError, Stopped):
                keep = True
                raise
            finally:
                if not (keep and can_resume(partial)):
                    with suppress(OSError):
                        _put_back(partial, real)
                        _clear(partial)
                        (partial / MARKER).unlink()
                        partial.rmdir()


@contextmanager
def _claimed(out: Path, real: Path) -> Iterator[Path]:
    """The staging folder, this run's alone. Folders above that were made for it and hold nothing
    vanish."""
    partial, made = partial_path(real), [p for p in real.parents if not p.exists()]
    real.parent.mkdir(parents=True, exist_ok=True)
    descriptor = None
    try:
        descriptor = _locked(out, partial)
        names = os.listdir(partial)
        if not names or (names == [MARKER] and (partial / MARKER).lstat().st_size == 0):
            # Not under another name first: what a kill would leave of it is not ours by any marker.
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            with open(os.open(partial / MARKER, flags, 0o666), "w") as stream:
                stream.write(json_text({"format": STAGING_FORMAT}))
        strange = set(os.listdir(partial)) - {MARKER, RESULT, OLD, STATE_FOLDER}
        if strange or not is_staging(partial):
            raise _in_the_way(out, partial)
        yield partial
    finally:
        if descriptor is not None:
            os.close(descriptor)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def _in_the_way(out: Path, partial: Path) -> CfspError:
    return CfspError(
        f"{partial} is in the way: {out} is made there, and cfsp did not make what is there now"
    )


def _locked(out: Path, partial: Path) -> int:
    """A descriptor of the staging folder, made if need be; as long as it is open no other run gets
    one, where the file system has locks."""
    while True:
        with suppress(FileExistsError):
            partial.mkdir()
        try:
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # another run has just ended
            continue
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):  # a file or a link
                raise _in_the_way(out, partial) from None
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise CfspError(f"another run is writing {out}") from None
        except OSError:  # this file system has no locks
            pass
        status = os.fstat(descriptor)
        if identity(partial) == (status.st_dev, status.st_ino):
            return descriptor
        os.close(descriptor)  # locked after another run had removed it


def _clear(partial: Path) -> None:
    """Empty a staging folder but for its marker, first of what a run could be continued from."""
    for entry in sorted(os.scandir(partial), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != MARKER:
            os.unlink(entry.path)


def _publish(result: Path, out: Path, old: Path) -> None:
    """Put a result in its place, in one step where the system can: an old one is absent at no time
    and is then beside ``old`` or there; a file replaces the old one."""
    if not out.exists():
        if not _renamed(result, out, NO_REPLACE):
            os.rename(result, out)
    elif result.is_file():
        os.replace(result, out)
    elif not _renamed(result, out, EXCHANGE):
        os.rename(out, old)
        try:
            os.rename(result, out)
        except BaseException:
            os.rename(old, out)
            raise
    sync(out.parent)


def _put_back(partial: Path, out: Path) -> None:
    """Undo what a run was killed in the middle of, where the system could not do it in one step."""
    if not out.exists() and (partial / OLD).exists():
        os.rename(partial / OLD, out)


def _renamed(source: Path, goal: Path, how: int) -> bool:
    """Whether Linux renamed a file or folder without replacing another, or exchanged the two."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    names = os.fsencode(source), os.fsencode(goal)
    if renameat2(AT_CURRENT_FOLDER, names[0], AT_CURRENT_FOLDER, names[1], how) == 0:
        return True
    number = ctypes.get_errno()
    if number in NOT_HERE:
        return False
    raise OSError(number, os.strerror(number), str(goal))
