"""Four distances between a block's input and output.

``pytest benchmarks/ops/test_block_influence.py``

The digest is the cosine distance, which every implementation can give.
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional

from benchmarks.common.harness import OpBenchmark
from benchmarks.common.shapes import WINDOW, Shape
from benchmarks.common.timing import DEVICE
from cfsp_kernels import block_influence


class Inputs(NamedTuple):
    """Hidden states before and after a block, and where every implementation writes its sums."""

    x: torch.Tensor  # [T, D]
    y: torch.Tensor  # [T, D]
    out: torch.Tensor  # [4] fp64: angular, cosine, mse, mae


def make_inputs(shape: Shape) -> Inputs:
    """Normal states, and the same plus a residual of a tenth of their size."""
    x = torch.randn(shape.tokens, shape.hidden, dtype=shape.dtype, device=DEVICE)
    y = x + torch.randn_like(x).mul_(0.1)
    return Inputs(x, y, torch.zeros(4, dtype=torch.float64, device=DEVICE))


def ours(i: Inputs, backend: str | None = None) -> torch.Tensor:
    """The op."""
    block_influence(i.x, i.y, out=i.out, backend=backend)
    return i.out


def released(i: Inputs) -> torch.Tensor:
    """As released with CFSP: per window all S x S products in fp32, and their diagonal."""
    i.out.zero_()
    for x, y in zip(i.x.split(WINDOW), i.y.split(WINDOW), strict=True):
        x, y = x.float(), y.float()
        norms = x.norm(dim=-1, keepdim=True) @ y.norm(dim=-1, keepdim=True).T
        cosine = ((x @ y.T) / norms).diagonal()
        i.out[0] += (torch.arccos(cosine) / torch.pi).sum()
        i.out[1] += (1 - cosine).sum()
    return i.out


def torch_op(i: Inputs) -> torch.Tensor:
    """Per window, row-wise torch calls for the same four metrics."""
    i.out.zero_()
    for x, y in zip(i.x.split(WINDOW), i.y.split(WINDOW), strict=True):
        x, y = x.float(), y.float()
        cosine = functional.cosine_similarity(x, y, dim=-1).clamp(-1, 1)
        metrics = [
            (torch.arccos(cosine) / torch.pi).sum(),
            (1 - cosine).sum(),
            functional.mse_loss(y, x, reduction="sum") / x.shape[1],
            functional.l1_loss(y, x, reduction="sum") / x.shape[1],
        ]
        i.out.add_(torch.stack(metrics))
    return i.out


def for_compiler(i: Inputs) -> torch.Tensor:
    """The stable formulas on whole tensors, for a compiler to fuse into one read."""
    x, y = i.x.float(), i.y.float()
    difference = y - x
    square = (difference * difference).sum(-1)
    x_norm, y_norm = (x * x).sum(-1).sqrt(), (y * y).sum(-1).sqrt()
    cosine = ((square - (x_norm - y_norm) ** 2) / (2 * x_norm * y_norm)).clamp(0, 2)
    angle = 2 / torch.pi * torch.asin((cosine / 2).sqrt())
    mse, mae = square.sum() / x.shape[1], difference.abs().mean(-1).sum()
    return i.out.copy_(torch.stack([angle.sum(), cosine.sum(), mse, mae]))


BENCHMARKS = [
    OpBenchmark(
        op="block_influence",
        make_inputs=make_inputs,
        tokens=lambda shape: shape.tokens,
        bytes_moved=lambda i: 2 * i.x.nbytes,
        implementations={"cfsp": ours, "eager": released, "torch op": torch_op},
        compiled=for_compiler,
        reference=lambda i: ours(i, backend="torch"),
        digest=lambda out: out[1:2],
    )
]


def test_block_influence(measure: Any, spec: Any, shape: Shape, implementation: str) -> None:
    """One read of both tensors gives all four metrics."""
    measure(spec, shape, implementation)
