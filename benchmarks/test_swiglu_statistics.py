"""Gated product and its channel statistics: ``pytest benchmarks/test_swiglu_statistics.py``."""

from typing import Any

import torch
from torch.nn import functional

from benchmarks.harness import OpBenchmark
from benchmarks.shapes import WINDOW, Shape
from benchmarks.timing import DEVICE
from cfsp_kernels import swiglu_statistics

Pair = tuple[torch.Tensor, torch.Tensor]


def make_inputs(shape: Shape) -> Pair:
    """Outputs of gate and up, [T, F] each."""
    gate = torch.randn(shape.tokens, shape.intermediate, dtype=shape.dtype, device=DEVICE)
    return gate, torch.randn_like(gate)


def eager(pair: Pair) -> Pair:
    """Per window, the model's own product, then a hook that reads it again in fp32."""
    gate, up = pair
    product = torch.empty_like(gate)
    squares = torch.zeros(gate.shape[1], device=gate.device)
    for start in range(0, gate.shape[0], WINDOW):
        rows = slice(start, start + WINDOW)
        product[rows] = functional.silu(gate[rows]) * up[rows]
        squares += torch.norm(product[rows].t().float(), p=2, dim=1) ** 2
    return product, squares


def torch_op(pair: Pair) -> Pair:
    """Whole tensors, in place where torch can, and reductions without a temporary."""
    gate, up = pair
    product = functional.silu(gate).mul_(up)
    product.sum(0, dtype=torch.float32)
    return product, torch.linalg.vector_norm(product, 2, 0, dtype=torch.float32) ** 2


def for_compiler(pair: Pair) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a compiler could fuse into one pass."""
    gate, up = pair
    product = functional.silu(gate) * up
    wide = product.float()
    return product, (wide * wide).sum(0), wide.sum(0)


def fused_product(pair: Pair) -> Any:
    """The product alone by a Triton kernel: what the statistics are said to cost nothing beside."""
    from benchmarks.swiglu_kernel import swiglu

    return swiglu(*pair)


def squares(result: Any) -> torch.Tensor:
    """Every implementation's sums of squares of the product."""
    if isinstance(result, torch.Tensor):
        return torch.linalg.vector_norm(result, 2, 0, dtype=torch.float32) ** 2
    second = result[1]
    return second if isinstance(second, torch.Tensor) else second.sum_of_squares


BENCHMARKS = [
    OpBenchmark(
        op="swiglu_statistics",
        make_inputs=make_inputs,
        bytes_moved=lambda pair: 3 * pair[0].nbytes,
        implementations={
            "cfsp": lambda pair: swiglu_statistics(*pair),
            "eager": eager,
            "torch op": torch_op,
        },
        gpu_implementations={"fused product only": fused_product},
        compiled=for_compiler,
        reference=lambda pair: swiglu_statistics(*pair, backend="torch"),
        digest=squares,
    )
]


def test_swiglu_statistics(measure: Any, spec: Any, shape: Shape, implementation: str) -> None:
    """Fused, the statistics should cost no more than the product alone."""
    measure(spec, shape, implementation)
