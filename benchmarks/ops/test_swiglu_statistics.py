"""Gated product and its channel statistics: ``pytest benchmarks/ops/test_swiglu_statistics.py``."""

from typing import Any, NamedTuple

import torch
from torch.nn import functional

from benchmarks.common.harness import OpBenchmark
from benchmarks.common.shapes import WINDOW, Shape
from benchmarks.common.timing import DEVICE
from cfsp_kernels import swiglu_statistics

Result = tuple[torch.Tensor, torch.Tensor]
"""The product [T, F] and totals [2, F]."""


class Inputs(NamedTuple):
    """Outputs of gate and up, and the totals that every implementation adds to."""

    gate: torch.Tensor  # [T, F]
    up: torch.Tensor  # [T, F]
    totals: torch.Tensor  # [2, F] fp64


def make_inputs(shape: Shape) -> Inputs:
    """Normal gate and up."""
    gate = torch.randn(shape.tokens, shape.intermediate, dtype=shape.dtype, device=DEVICE)
    totals = torch.zeros(2, shape.intermediate, dtype=torch.float64, device=DEVICE)
    return Inputs(gate, torch.randn_like(gate), totals)


def ours(i: Inputs, backend: str | None = None) -> Result:
    """The op, into running totals as calibration calls it."""
    return swiglu_statistics(i.gate, i.up, totals=i.totals, backend=backend)[0], i.totals


def eager(i: Inputs) -> Result:
    """Per window, the model's own product, then a hook that reads it again in fp32."""
    product = torch.empty_like(i.gate)
    for start in range(0, i.gate.shape[0], WINDOW):
        rows = slice(start, start + WINDOW)
        product[rows] = functional.silu(i.gate[rows]) * i.up[rows]
        i.totals[1] += torch.norm(product[rows].t().float(), p=2, dim=1) ** 2
    return product, i.totals


def torch_op(i: Inputs) -> Result:
    """Whole tensors, in place where torch can, and reductions without a temporary."""
    product = functional.silu(i.gate).mul_(i.up)
    i.totals[0] += product.sum(0, dtype=torch.float32)
    i.totals[1] += torch.linalg.vector_norm(product, 2, 0, dtype=torch.float32) ** 2
    return product, i.totals


def for_compiler(i: Inputs) -> Result:
    """What a compiler could fuse into one pass."""
    product = functional.silu(i.gate) * i.up
    wide = product.float()
    i.totals[0] += wide.sum(0)
    i.totals[1] += (wide * wide).sum(0)
    return product, i.totals


def fused_product(i: Inputs) -> Any:
    """The product alone by a Triton kernel: what the statistics are said to cost nothing beside."""
    from benchmarks.ops.swiglu_kernel import swiglu

    return swiglu(i.gate, i.up)


def squares(result: Any) -> torch.Tensor:
    """Every implementation's sums of squares of the product."""
    if isinstance(result, torch.Tensor):
        return torch.linalg.vector_norm(result, 2, 0, dtype=torch.float32) ** 2
    return result[1][1]


BENCHMARKS = [
    OpBenchmark(
        op="swiglu_statistics",
        make_inputs=make_inputs,
        tokens=lambda shape: shape.tokens,
        reset=lambda i: i.totals.zero_(),
        bytes_moved=lambda i: 3 * i.gate.nbytes,
        implementations={"cfsp": ours, "eager": eager, "torch op": torch_op},
        gpu_implementations={"fused product only": fused_product},
        compiled=for_compiler,
        reference=lambda i: ours(i, backend="torch"),
        digest=squares,
    )
]


def test_swiglu_statistics(measure: Any, spec: Any, shape: Shape, implementation: str) -> None:
    """Fused, the statistics should cost no more than the product alone."""
    measure(spec, shape, implementation)
