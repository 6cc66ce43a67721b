"""Gram matrices on their way to the disk, where a thread of the last rank writes them behind."""

import shutil
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from ..distributed import Ranks
from ..errors import CfspError
from ..io.files import format_bytes
from ..io.shards import ShardWriter
from .grams import WITHOUT, GramFolder, file_bytes, held_out_windows, planned_file

PENDING = 8
"""Tensors that wait to be written: panels, most of them."""


class GramWriter:
    """Takes what the files of a calibration hold; on ranks but the last, for nothing."""

    def __init__(
        self, folder: GramFolder, writer: ShardWriter | None, behind: ThreadPoolExecutor
    ) -> None:
        self.folder = folder
        self._writer = writer
        self._behind = behind
        self._pending: deque[Future[None]] = deque()

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Have a tensor written, on the CPU and left alone from now on.

        Raises:
            CfspError: this one or one before it found no space, or no permission.
        """
        if self._writer is not None:
            self.wait(PENDING - 1)
            self._pending.append(self._behind.submit(self._writer.write, name, tensor))

    def wait(self, left: int = 0) -> None:
        """Until at most so many tensors wait to be written. Raises as :meth:`put` does."""
        while len(self._pending) > left:
            try:
                self._pending.popleft().result()
            except OSError as error:
                raise CfspError(
                    f"cannot write Gram matrices: {self.folder.path}: {error}"
                ) from None


@contextmanager
def gram_writer(
    folder: GramFolder, sizes: Sequence[Sequence[int]], windows: int, ranks: Ranks
) -> Iterator[GramWriter]:
    """What writes the Gram matrices of a calibration; at the end all are on the disk, for every
    rank. After an error, files that are not whole vanish.

    Args:
        folder: where the files go; all ranks see it.
        sizes: channels of every FFN and expert of every block.
        windows: of calibration.
        ranks: which share these.

    Raises:
        CfspError: the folder is not seen by a rank, or its disk has no room.
    """
    _check(folder, sizes, windows, ranks)
    files = [
        planned_file(folder.file(block).name, block, own, windows)
        for block, own in enumerate(sizes)
    ]
    with (
        ShardWriter(folder.path, files if ranks.last else ()) as writer,
        ThreadPoolExecutor(1, thread_name_prefix="write-behind") as behind,
    ):
        found = GramWriter(folder, writer if ranks.last else None, behind)
        yield found
        found.wait()
    ranks.barrier()


def _check(folder: GramFolder, sizes: Sequence[Sequence[int]], windows: int, ranks: Ranks) -> None:
    problem = f"rank {ranks.rank} does not see the folder {folder.path}"
    if folder.path.is_dir():
        need = sum(file_bytes(own, windows) for own in sizes)
        free = shutil.disk_usage(folder.path).free
        few = f"Gram matrices take {format_bytes(need)} of disk, {folder.path} has "
        problem = f"{few}{format_bytes(free)} free: {WITHOUT}" if need > free else ""
    ranks.check(problem or None)
    if not held_out_windows(windows):
        warnings.warn(
            "a single calibration window leaves none to hold out: nothing will tell whether a "
            "compensation lowers the error",
            stacklevel=5,
        )
