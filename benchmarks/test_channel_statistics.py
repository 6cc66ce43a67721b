"""Sum and sum of squares of every channel: ``pytest benchmarks/test_channel_statistics.py``."""

from typing import Any

import torch

from benchmarks.harness import OpBenchmark
from benchmarks.shapes import WINDOW, Shape
from benchmarks.timing import DEVICE
from cfsp_kernels import ChannelStatistics, channel_statistics


def make_inputs(shape: Shape) -> torch.Tensor:
    """Down-projection inputs [T, F]."""
    return torch.randn(shape.tokens, shape.intermediate, dtype=shape.dtype, device=DEVICE)


def wanda_norms(x: torch.Tensor) -> torch.Tensor:
    """Wanda: per window, the squared norm of every channel of the transposed fp32 input."""
    squares = torch.zeros(x.shape[1], device=x.device)
    for window in x.split(WINDOW):
        transposed = window.t().float()
        squares += torch.norm(transposed, p=2, dim=1) ** 2
    return squares


def flap_variance(x: torch.Tensor) -> torch.Tensor:
    """FLAP: per window, a running mean and the product of deviations from the old and new one."""
    mean = torch.zeros(x.shape[1], device=x.device)
    scatter = torch.zeros_like(mean)
    seen = 0
    for window in x.split(WINDOW):
        transposed = window.t().float()
        count = transposed.shape[1]
        old = mean
        mean = (old * seen + transposed.sum(dim=1)) / (seen + count)
        deviation = transposed - mean.unsqueeze(1)
        scatter = scatter + (deviation * (transposed - old.unsqueeze(1))).sum(dim=1)
        seen += count
    # back to what the op returns, so that results can be compared
    return scatter + seen * mean**2


def torch_op(x: torch.Tensor) -> torch.Tensor:
    """The two reductions that torch offers without a temporary; each reads x once."""
    x.sum(0, dtype=torch.float32)
    return torch.linalg.vector_norm(x, 2, 0, dtype=torch.float32) ** 2


def for_compiler(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a compiler could fuse into one read."""
    x = x.float()
    return x.sum(0), (x * x).sum(0)


def squares(result: Any) -> torch.Tensor:
    """Every implementation's sums of squares."""
    if isinstance(result, ChannelStatistics):
        return result.sum_of_squares
    return result[1] if isinstance(result, tuple) else result


BENCHMARKS = [
    OpBenchmark(
        op="channel_statistics",
        make_inputs=make_inputs,
        bytes_moved=lambda x: x.nbytes,
        implementations={
            "cfsp": channel_statistics,
            "eager": wanda_norms,
            "eager FLAP": flap_variance,
            "torch op": torch_op,
        },
        compiled=for_compiler,
        reference=lambda x: channel_statistics(x, backend="torch"),
        digest=squares,
    )
]


def test_channel_statistics(measure: Any, spec: Any, shape: Shape, implementation: str) -> None:
    """Wanda computes squares only, FLAP a variance; cfsp gives both sums in one read."""
    measure(spec, shape, implementation)
