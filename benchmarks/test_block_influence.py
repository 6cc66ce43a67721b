"""Four distances between a block's input and output: ``pytest benchmarks/test_block_influence.py``.

The digest is the cosine distance, which every implementation can give.
"""

from typing import Any

import torch
from torch.nn import functional

from benchmarks.harness import OpBenchmark
from benchmarks.shapes import WINDOW, Shape
from benchmarks.timing import DEVICE
from cfsp_kernels import BlockInfluence, block_influence

Pair = tuple[torch.Tensor, torch.Tensor]


def make_inputs(shape: Shape) -> Pair:
    """Hidden states [T, D] and the same plus a residual of a tenth of their size."""
    hidden = torch.randn(shape.tokens, shape.hidden, dtype=shape.dtype, device=DEVICE)
    return hidden, hidden + torch.randn_like(hidden).mul_(0.1)


def released(pair: Pair) -> torch.Tensor:
    """As released with CFSP: per window all S x S products in fp32, and their diagonal."""
    total = torch.zeros((), device=DEVICE)
    angular = torch.zeros((), device=DEVICE)
    for x, y in zip(pair[0].split(WINDOW), pair[1].split(WINDOW), strict=True):
        x, y = x.float(), y.float()
        norms = x.norm(dim=-1, keepdim=True) @ y.norm(dim=-1, keepdim=True).T
        cosine = ((x @ y.T) / norms).diagonal()
        angular += (torch.arccos(cosine) / torch.pi).sum()
        total += (1 - cosine).sum()
    return total


def torch_op(pair: Pair) -> torch.Tensor:
    """Per window, row-wise torch calls for the same four metrics."""
    sums = torch.zeros(4, device=DEVICE)
    for x, y in zip(pair[0].split(WINDOW), pair[1].split(WINDOW), strict=True):
        x, y = x.float(), y.float()
        cosine = functional.cosine_similarity(x, y, dim=-1).clamp(-1, 1)
        sums += torch.stack(
            [
                (1 - cosine).sum(),
                (torch.arccos(cosine) / torch.pi).sum(),
                functional.mse_loss(y, x, reduction="sum") / x.shape[1],
                functional.l1_loss(y, x, reduction="sum") / x.shape[1],
            ]
        )
    return sums[0]


def for_compiler(pair: Pair) -> tuple[torch.Tensor, ...]:
    """The stable formulas on whole tensors, for a compiler to fuse into one read."""
    x, y = pair[0].float(), pair[1].float()
    difference = y - x
    square = (difference * difference).sum(-1)
    x_norm, y_norm = (x * x).sum(-1).sqrt(), (y * y).sum(-1).sqrt()
    cosine = ((square - (x_norm - y_norm) ** 2) / (2 * x_norm * y_norm)).clamp(0, 2)
    angle = 2 / torch.pi * torch.asin((cosine / 2).sqrt())
    return cosine.sum(), angle.sum(), square.sum() / x.shape[1], difference.abs().mean(-1).sum()


def cosine_distance(result: Any) -> torch.Tensor:
    """Every implementation's sum of 1 - cos."""
    if isinstance(result, BlockInfluence):
        return result.cosine.reshape(1)
    return (result[0] if isinstance(result, tuple) else result).reshape(1)


BENCHMARKS = [
    OpBenchmark(
        op="block_influence",
        make_inputs=make_inputs,
        bytes_moved=lambda pair: 2 * pair[0].nbytes,
        implementations={
            "cfsp": lambda pair: block_influence(*pair),
            "eager": released,
            "torch op": torch_op,
        },
        compiled=for_compiler,
        reference=lambda pair: block_influence(*pair, backend="torch"),
        digest=cosine_distance,
    )
]


def test_block_influence(measure: Any, spec: Any, shape: Shape, implementation: str) -> None:
    """One read of both tensors gives all four metrics."""
    measure(spec, shape, implementation)
