"""Device clocks, cold caches and medians, shared by the benchmarks and the tuner."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .environment import device_type

DEVICE = device_type()
ON_GPU = DEVICE == "cuda"
FLUSH_BYTES = 1 << 30


class _Event:
    """A point on the GPU's clock; a later one minus an earlier one is seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "_Event") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) * 1e-3


def timer() -> Any:
    """A reading of the device's clock: CUDA events on a GPU, ``perf_counter`` on a CPU."""
    return _Event() if ON_GPU else time.perf_counter()


class ColdCache:
    """Pushes everything out of a GPU's L2 when called; does nothing on a CPU.

    It reads a buffer, since an L2 full of written lines would be written back during the call that
    is timed, 50 MB that are not its own. Copies of the inputs, taken in turn, would do too, but
    running totals must stay one. A gibibyte is many times any L2; while it is read, a third of a
    millisecond at 3 TB/s, the host launches the call, so that short kernels are timed and not the
    launching of them.

    Returns None, since ``benchmark.pedantic`` reads a value of its setup as arguments.
    """

    def __init__(self) -> None:
        self.buffer: torch.Tensor | None = None

    def __call__(self) -> None:
        if ON_GPU:
            if self.buffer is None:
                self.buffer = torch.zeros(FLUSH_BYTES // 4, device=DEVICE)
            self.buffer.sum()


def seconds_of(call: Callable[[], Any], cold_cache: ColdCache) -> float:
    """Device seconds of one cold call."""
    cold_cache()
    start = timer()
    call()
    return timer() - start


def median_seconds(call: Callable[[], Any], cold_cache: ColdCache, rounds: int) -> float:
    """Median device seconds of ``rounds`` cold calls."""
    return statistics.median(seconds_of(call, cold_cache) for _ in range(rounds))
