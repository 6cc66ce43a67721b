"""Memory that is taken once and used for one block after another.

New memory costs several times what reading a file into old memory does: the system hands it out
page by page and clears each page first.
"""

import math
import mmap
from contextlib import suppress

import torch

ALIGNMENT = 64  # bytes, as torch's own allocator on a CPU


def mapped_bytes(nbytes: int) -> torch.Tensor:
    """[nbytes] uint8 in a mapping of its own, which goes back to the system with the tensor."""
    memory = mmap.mmap(-1, max(nbytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]


def aligned(nbytes: int) -> int:
    """The room that a tensor takes in an arena."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Arena:
    """A stretch of memory that tensors are carved from, one behind the other."""

    def __init__(self, nbytes: int, device: torch.device, *, pinned: bool = False) -> None:
        """``nbytes``: the sum of :func:`aligned` over the tensors. ``pinned``: for a GPU."""
        if device.type == "cpu" and not pinned:
            self.memory = mapped_bytes(nbytes)
        else:
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)
        self.taken = 0

    def clear(self) -> None:
        """Begin again; what was carved before is overwritten by what comes."""
        self.taken = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with whatever values lie there."""
        nbytes = math.prod(shape) * dtype.itemsize
        start, self.taken = self.taken, self.taken + aligned(nbytes)
        if self.taken > len(self.memory):
            raise RuntimeError(f"an arena of {len(self.memory)} bytes has no {nbytes} left")
        return self.memory[start : start + nbytes].view(dtype).view(shape)
