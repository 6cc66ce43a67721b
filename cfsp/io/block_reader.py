"""Blocks from disk to the device, one ahead of the one at work.

Two host buffers, and on a GPU two device buffers, take the blocks in turn. On a GPU the host's are
pinned and a stream of their own carries them over, in one copy a block; what waits for what is told
to the GPU by events, so that neither the reading thread nor the main one waits for the other.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from .memory import mapped_bytes
from .safetensors import Readable, read_tensors, will_need

LARGE_BLOCK_BYTES = 4 << 30
"""Of a larger block there is no second one in memory while it is at work: what is read ahead of
those lies in the system's cache of files."""
ALIGNMENT = 64  # bytes, as torch's own allocator on a CPU


def aligned(nbytes: int) -> int:
    """The room that a tensor takes in an arena."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Arena:
    """Memory that is taken once and that tensors are carved from, one behind the other: new memory
    costs several times what reading a file into old does, as the system clears its pages."""

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


def buffer_count(largest: int) -> int:
    """How many blocks are in memory as they are stored, where the largest has so many bytes."""
    return 1 if largest > LARGE_BLOCK_BYTES else 2


class _Buffer:
    """Where every second block goes, or, of large ones, each."""

    def __init__(self, nbytes: int, device: torch.device, stream: Any, *, carries: bool) -> None:
        self.stream = stream
        """CUDA stream that carries blocks to the device; None on a CPU."""
        self.host = Arena(nbytes, torch.device("cpu"), pinned=stream is not None)
        self.device = Arena(nbytes, device) if stream is not None and carries else None
        self.arrived: Any = None
        """CUDA event: nothing is left to be copied from host memory, which is free again."""
        self.left: Any = None
        """CUDA event: the block's work is done, and device memory is free again."""

    def fill(self, stored: Mapping[str, Readable]) -> dict[str, torch.Tensor]:
        """Read a block; on a GPU the copy is only ordered when this returns."""
        if self.arrived is not None:
            self.arrived.synchronize()
        self.host.clear()
        tensors = read_tensors(stored, self.host.take)
        if self.device is None:
            return tensors
        with torch.cuda.stream(self.stream):
            if self.left is not None:
                self.stream.wait_event(self.left)
            filled = self.host.taken
            self.device.memory[:filled].copy_(self.host.memory[:filled], non_blocking=True)
            self.arrived = self.stream.record_event()
        self.device.clear()  # what is carved anew in the same order lies where the host's does
        return {name: self.device.take(x.shape, x.dtype) for name, x in stored.items()}


@contextmanager
def read_ahead(
    blocks: Sequence[Mapping[str, Readable]], device: torch.device, *, carries: bool = True
) -> Iterator[Iterator[dict[str, torch.Tensor]]]:
    """The weights of block after block as they are stored, on ``device``, or where nothing
    ``carries`` them there in pinned memory of the host; each is valid until the next is asked for.
    Reading begins at once, and what fails is raised at the turn of its block."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    nbytes = max((sum(aligned(x.nbytes) for x in block.values()) for block in blocks), default=0)
    count = buffer_count(nbytes)
    buffers = [_Buffer(nbytes, device, stream, carries=carries) for _ in blocks[:count]]
    pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def begin(position: int) -> Future[dict[str, torch.Tensor]]:
        return pool.submit(buffers[position % count].fill, blocks[position])

    coming = {position: begin(position) for position in range(len(buffers))}

    def weights() -> Iterator[dict[str, torch.Tensor]]:
        for position in range(len(blocks)):
            buffer, tensors = buffers[position % count], coming.pop(position).result()
            if buffer.device is not None:
                torch.cuda.current_stream(device).wait_event(buffer.arrived)
            if count == 1 and position + 1 < len(blocks):
                pool.submit(will_need, blocks[position + 1].values())
            yield tensors
            del tensors
            if stream is not None:
                buffer.left = torch.cuda.current_stream(device).record_event()
                if buffer.device is None:
                    buffer.arrived = buffer.left
            if position + count < len(blocks):
                coming[position + count] = begin(position + count)

    try:
        yield weights()
    finally:
        pool.shutdown(cancel_futures=True)
        if stream is not None:
            stream.synchronize()
