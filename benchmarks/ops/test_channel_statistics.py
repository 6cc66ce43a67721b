"""Sum and sum of squares of every channel: ``pytest benchmarks/ops/test_channel_statistics.py``."""

from typing import Any, NamedTuple

import torch

from benchmarks.common.harness import OpBenchmark
from benchmarks.common.shapes import WINDOW, Shape
from benchmarks.common.timing import DEVICE
from cfsp_kernels import channel_statistics


class Inputs(NamedTuple):
    """Activations and the totals that every implementation adds to."""

    x: torch.Tensor  # [T, F]
    totals: torch.Tensor  # [2, F] fp64


def make_inputs(shape: Shape) -> Inputs:
    """Inputs of a down projection."""
    x = torch.randn(shape.tokens, shape.intermediate, dtype=shape.dtype, device=DEVICE)
    return Inputs(x, torch.zeros(2, shape.intermediate, dtype=torch.float64, device=DEVICE))


def ours(i: Inputs, backend: str | None = None) -> torch.Tensor:
    """The op, into running totals as calibration calls it."""
    channel_statistics(i.x, totals=i.totals, backend=backend)
    return i.totals


def wanda_norms(i: Inputs) -> torch.Tensor:
    """Wanda: per window, the squared norm of every channel of the transposed fp32 input."""
    for window in i.x.split(WINDOW):
        transposed = window.t().float()
        i.totals[1] += torch.norm(transposed, p=2, dim=1) ** 2
    return i.totals


def flap_variance(i: Inputs) -> torch.Tensor:
    """FLAP: per window, a running mean and the product of deviations from the old and new one."""
    mean = torch.zeros(i.x.shape[1], device=i.x.device)
    scatter = torch.zeros_like(mean)
    seen = 0
    for window in i.x.split(WINDOW):
        transposed = window.t().float()
        count = transposed.shape[1]
        old = mean
        mean = (old * seen + transposed.sum(dim=1)) / (seen + count)
        deviation = transposed - mean.unsqueeze(1)
        scatter = scatter + (deviation * (transposed - old.unsqueeze(1))).sum(dim=1)
        seen += count
    # back to what the op returns, so that results can be compared
    i.totals[1] += scatter + seen * mean**2
    return i.totals


def torch_op(i: Inputs) -> torch.Tensor:
    """The two reductions that torch offers without a temporary; each reads x once."""
    i.totals[0] += i.x.sum(0, dtype=torch.float32)
    i.totals[1] += torch.linalg.vector_norm(i.x, 2, 0, dtype=torch.float32) ** 2
    return i.totals


def for_compiler(i: Inputs) -> torch.Tensor:
    """What a compiler could fuse into one read."""
    x = i.x.float()
    i.totals[0] += x.sum(0)
    i.totals[1] += (x * x).sum(0)
    return i.totals


BENCHMARKS = [
    OpBenchmark(
        op="channel_statistics",
        make_inputs=make_inputs,
        tokens=lambda shape: shape.tokens,
        reset=lambda i: i.totals.zero_(),
        bytes_moved=lambda i: i.x.nbytes,
        implementations={
            "cfsp": ours,
            "eager": wanda_norms,
            "eager FLAP": flap_variance,
            "torch op": torch_op,
        },
        compiled=for_compiler,
        reference=lambda i: ours(i, backend="torch"),
        digest=lambda totals: totals[1],
    )
]


def test_channel_statistics(measure: Any, spec: Any, shape: Shape, implementation: str) -> None:
    """Wanda computes squares only, FLAP a variance; cfsp gives both sums in one read."""
    measure(spec, shape, implementation)
