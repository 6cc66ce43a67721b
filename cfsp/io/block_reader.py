"""Blocks from disk to the device, one ahead of the one at work.

Two host buffers, and on a GPU two device buffers, take the blocks in turn. On a GPU the host's are
pinned and a stream of their own carries them over, in one copy a block; what waits for what is told
to the GPU by events, so that neither the reading thread nor the main one waits for the other.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch

from .safetensors import StoredTensor, mapped_bytes, read_tensors

BUFFERS = 2
ALIGNMENT = 64  # bytes, as torch's own allocator on a CPU


def aligned(nbytes: int) -> int:
    """The room that a tensor takes in an arena."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Arena:
    """Memory that is taken once and that tensors are carved from, one behind the other.

    New memory costs several times what reading a file into old memory does: the system hands it
    out page by page and clears each page first.
    """

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


class _Buffer:
    """Where every second block goes."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.host = Arena(nbytes, torch.device("cpu"), pinned=self.on_gpu)
        self.device = torch.empty(nbytes, dtype=torch.uint8, device=device) if self.on_gpu else None
        self.arrived: Any = None
        """CUDA event: the block is in device memory, and host memory is free again."""
        self.left: Any = None
        """CUDA event: the block's work is done, and device memory is free again."""

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """The place in device memory of a tensor carved from host memory."""
        if self.device is None:
            return tensor
        start = tensor.data_ptr() - self.host.memory.data_ptr()
        part = self.device[start : start + tensor.nbytes]
        return part.view(tensor.dtype).view(tensor.shape)


class BlockReader:
    """Hands out the weights of block after block; see the module. A context manager."""

    def __init__(
        self, blocks: Sequence[Mapping[str, StoredTensor]], dtype: torch.dtype, device: torch.device
    ) -> None:
        """``blocks``: where each block's tensors lie; handed out in ``dtype`` on ``device``."""
        self.blocks = blocks
        self.dtype = dtype
        self.device = device
        sizes = [sum(aligned(stored.nbytes) for stored in block.values()) for block in blocks]
        largest = max(sizes, default=0)
        self.buffers = [_Buffer(largest, device) for _ in range(min(BUFFERS, len(blocks)))]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self.coming: Future[dict[str, torch.Tensor]] | None = None
        self._begin(0)

    def __enter__(self) -> "BlockReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.pool.shutdown(cancel_futures=True)
        if self.stream is not None:
            self.stream.synchronize()

    def _begin(self, position: int) -> None:
        """Read a block, if there is one at this position."""
        if position < len(self.blocks):
            self.coming = self.pool.submit(self._read, position)

    def _buffer(self, position: int) -> _Buffer:
        return self.buffers[position % len(self.buffers)]

    def _read(self, position: int) -> dict[str, torch.Tensor]:
        """Fill a buffer; on a GPU the copy is only ordered when this returns."""
        buffer = self._buffer(position)
        if buffer.arrived is not None:
            buffer.arrived.synchronize()
        buffer.host.clear()
        tensors = read_tensors(self.blocks[position], buffer.host.take)
        if buffer.device is not None and self.stream is not None:
            with torch.cuda.stream(self.stream):
                if buffer.left is not None:
                    self.stream.wait_event(buffer.left)
                filled = buffer.host.taken
                buffer.device[:filled].copy_(buffer.host.memory[:filled], non_blocking=True)
                buffer.arrived = self.stream.record_event()
        return {name: buffer.on_device(tensor) for name, tensor in tensors.items()}

    def weights(self, position: int) -> dict[str, torch.Tensor]:
        """The weights of the next block, which are valid until its :meth:`release`.

        Raises:
            CfspError: its shard cannot be read.
        """
        if self.coming is None:
            raise IndexError(position)
        tensors = self.coming.result()
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._buffer(position).arrived)
        self._begin(position + 1)
        return {name: tensor.to(self.dtype) for name, tensor in tensors.items()}

    def release(self, position: int) -> None:
        """Let the buffer of a block be filled anew, once the device has done what it was told."""
        if self.stream is not None:
            self._buffer(position).left = torch.cuda.current_stream(self.device).record_event()
