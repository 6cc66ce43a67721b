"""Second moments of channels: ``pytest benchmarks/ops/test_gram.py``.

Bound by arithmetic: beside the bandwidth (of x read once, and the triangle of the total read and
written) stands the rate of the multiply-adds of a lower triangle, for every implementation. On a
GPU each form of the op is measured by itself; "cfsp" is the one that the op takes.
"""

from functools import partial
from typing import Any

import torch

from benchmarks.common.harness import OpBenchmark
from benchmarks.common.shapes import Shape
from benchmarks.common.timing import DEVICE, ON_GPU
from benchmarks.ops.forms import forms
from cfsp_kernels import gram
from cfsp_kernels.gram import FORMS

Inputs = tuple[torch.Tensor, torch.Tensor]


def make_inputs(shape: Shape) -> Inputs:
    """A micro-batch [T, F] and the running total [F, F] fp32 that every implementation adds to."""
    x = torch.randn(shape.gram_tokens, shape.intermediate, dtype=shape.dtype, device=DEVICE)
    return x, torch.zeros(shape.intermediate, shape.intermediate, device=DEVICE)


def ours(inputs: Inputs, backend: str | None = None) -> torch.Tensor:
    """The op, in the form that it picks."""
    return gram(inputs[0], out=inputs[1], backend=backend)


def in_form(form: str, inputs: Inputs) -> torch.Tensor:
    """One of the op's forms."""
    FORMS[form](*inputs)
    return inputs[1]


def eager(inputs: Inputs) -> torch.Tensor:
    """As published Hessian-based pruners accumulate it: an fp32 copy, the full product, a sum."""
    x, total = inputs
    wide = x.t().float()
    total += wide.matmul(wide.t())
    return total


def add_product(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Add the full product in the input's dtype with fp32 sums, where torch can, else in fp32."""
    if x.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out") and x.dtype != torch.float32:
        return torch.addmm(total, x.t(), x, out_dtype=torch.float32, out=total)
    wide = x.float()
    return torch.addmm(total, wide.t(), wide, out=total)


RUNNING = forms(torch.bfloat16 if ON_GPU else torch.float32)


def sampled_rows(result: torch.Tensor) -> torch.Tensor:
    """Some rows, lower triangle only: the part that every implementation fills."""
    rows = torch.arange(0, result.shape[0], max(1, result.shape[0] // 64), device=result.device)
    columns = torch.arange(result.shape[1], device=result.device)
    return result[rows] * (columns[None, :] <= rows[:, None])


BENCHMARKS = [
    OpBenchmark(
        op="gram",
        make_inputs=make_inputs,
        tokens=lambda shape: shape.gram_tokens,
        reset=lambda inputs: inputs[1].zero_(),
        bytes_moved=lambda inputs: inputs[0].nbytes + inputs[1].nbytes,
        implementations={"cfsp": ours, "eager": eager, "torch op": lambda i: add_product(*i)},
        gpu_implementations={f"form {name}": partial(in_form, name) for name in RUNNING},
        compiled=eager,
        reference=lambda inputs: ours(inputs, backend="torch"),
        digest=sampled_rows,
        multiply_adds=lambda inputs: inputs[0].numel() * (inputs[0].shape[1] + 1) // 2,
    )
]


def test_gram(measure: Any, spec: Any, shape: Shape, implementation: str) -> None:
    """A triangle is half of the work of a full product."""
    measure(spec, shape, implementation)
