"""Host memory: taken in mappings of its own, and seen as bytes."""

import math
import mmap
from collections.abc import Callable
from contextlib import suppress

import torch

MAPPED_BYTES = 1 << 20

Room = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
"""(shape, dtype) -> a tensor to fill."""


def mapped_bytes(nbytes: int) -> torch.Tensor:
    """[nbytes] uint8 in a mapping of its own, which goes back to the system with the tensor."""
    memory = mmap.mmap(-1, max(nbytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]


def new_room(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """New memory; a mapping for a large tensor, since a heap that threads share would keep it."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < MAPPED_BYTES:
        return torch.empty(shape, dtype=dtype)
    return mapped_bytes(nbytes).view(dtype).view(shape)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
