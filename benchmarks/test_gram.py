"""Second moments of channels: ``pytest benchmarks/test_gram.py``.

Bound by arithmetic: beside the bandwidth (of x read once, and the triangle of the total read and
written) stands the rate of the multiply-adds of a lower triangle, for every implementation.
"""

from typing import Any

import torch

from benchmarks.harness import OpBenchmark
from benchmarks.shapes import Shape
from benchmarks.timing import DEVICE, ON_GPU
from cfsp_kernels import gram

Inputs = tuple[torch.Tensor, torch.Tensor]


def make_inputs(shape: Shape) -> Inputs:
    """A micro-batch [T, F] and the running total [F, F] fp32."""
    x = torch.randn(shape.gram_tokens, shape.intermediate, dtype=shape.dtype, device=DEVICE)
    return x, torch.zeros(shape.intermediate, shape.intermediate, device=DEVICE)


def ours(inputs: Inputs, backend: str | None = None) -> torch.Tensor:
    """The op, into the running total."""
    return gram(inputs[0], out=inputs[1].zero_(), backend=backend)


def eager(inputs: Inputs) -> torch.Tensor:
    """As published Hessian-based pruners accumulate it: an fp32 copy, the full product, a sum."""
    wide = inputs[0].t().float()
    total = inputs[1].zero_()
    total += wide.matmul(wide.t())
    return total


def torch_op(inputs: Inputs) -> torch.Tensor:
    """The full product in the input's dtype with an fp32 result, where torch has one."""
    x, total = inputs
    if ON_GPU and hasattr(torch.ops.aten.mm, "dtype_out") and x.dtype != torch.float32:
        return torch.mm(x.t(), x, torch.float32, out=total)
    wide = x.float()
    return torch.addmm(total.zero_(), wide.t(), wide, out=total)


def sampled_rows(result: torch.Tensor) -> torch.Tensor:
    """Some rows, lower triangle only: the part that every implementation fills."""
    rows = torch.arange(0, result.shape[0], max(1, result.shape[0] // 64), device=result.device)
    columns = torch.arange(result.shape[1], device=result.device)
    return result[rows] * (columns[None, :] <= rows[:, None])


BENCHMARKS = [
    OpBenchmark(
        op="gram",
        make_inputs=make_inputs,
        bytes_moved=lambda inputs: inputs[0].nbytes + inputs[1].nbytes,
        implementations={"cfsp": ours, "eager": eager, "torch op": torch_op},
        compiled=eager,
        reference=lambda inputs: ours(inputs, backend="torch"),
        digest=sampled_rows,
        multiply_adds=lambda inputs: inputs[0].numel() * (inputs[0].shape[1] + 1) // 2,
    )
]


def test_gram(measure: Any, spec: Any, shape: Shape, implementation: str) -> None:
    """A triangle is half of the work of a full product; each zeroes its total first."""
    measure(spec, shape, implementation)
