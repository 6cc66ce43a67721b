"""The process around a command: SIGTERM, what other libraries print, and how it ends."""

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, current_thread, main_thread
from types import FrameType
from typing import Any

from ..distributed import Ranks, launched
from ..errors import CfspError, RankLost, Stopped, printable
from .flags import with_flags

PACKAGE = Path(__file__).resolve().parents[1]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt; the second is at most 32 MiB."""


@contextmanager
def sigterm() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come. The first lets a run end in order, a second ends the process: not
    under ``torchrun``, which hands on what each may have received already and kills after 30 s."""
    came = Event()
    if current_thread() is not main_thread():
        yield came.is_set
        return

    def handle(number: int, frame: FrameType | None) -> None:
        came.set()
        if not launched():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Warnings of cfsp are one line each, without the source; other libraries' stay as they are."""
    told = warnings.showwarning

    def show(message: Any, category: Any, filename: str, *more: Any, **options: Any) -> None:
        if Path(filename).is_relative_to(PACKAGE):
            print(f"cfsp: warning: {printable(with_flags(str(message)))}", file=sys.stderr)
        else:
            told(message, category, filename, *more, **options)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def quiet(ranks: Ranks, asked: bool) -> Iterator[None]:
    """Other libraries show no bars where that is asked, and nothing on ranks beside the first."""
    if ranks.first and not asked:
        yield
        return
    from huggingface_hub.utils import disable_progress_bars

    from ..models.loading import quiet_loading

    with quiet_loading(), warnings.catch_warnings():
        if not ranks.first:
            warnings.simplefilter("ignore")
            os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # not imported yet
            disable_progress_bars()
        yield


def keep_memory() -> None:
    """Have glibc keep what a forward call frees for the next one: fewer page faults on a CPU. Only
    a process of our own may decide that."""
    with suppress(OSError, AttributeError):  # another system, another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((M_TRIM_THRESHOLD, 2**31 - 1), (M_MMAP_THRESHOLD, 32 << 20)):
            mallopt(option, value)


def ended(run: Callable[[], None]) -> tuple[int, str]:
    """(exit code, what to tell the user) of a command."""
    try:
        run()
    except CfspError as error:
        return 2, f"cfsp: error: {printable(with_flags(' '.join(str(error).split())))}"
    except RankLost as error:
        return 1, f"cfsp: another rank has ended ({error}); prune continues with --resume"
    except Stopped:
        return 128 + signal.SIGTERM, "cfsp: stopped; the same command with --resume continues"
    except KeyboardInterrupt:
        return 130, "cfsp: interrupted; nothing was written"
    return 0, ""
