"""How much a decoder block changes its hidden states: four metrics in one read.

Bytes moved: hidden_in and hidden_out read once, ``2 * T * D * itemsize``.
"""

import math
from typing import NamedTuple

import torch

from ._dispatch import use_triton
from ._validation import as_rows, check_same, row_chunks


class BlockInfluence(NamedTuple):
    """Sums over tokens of four distances between a block's input x and output y.

    A row of zeros has no direction: where x and y are both zero the block changed nothing and
    every metric is 0; where one of them is, cosine counts 1 and angular 0.5 (a right angle).
    """

    tokens: int
    """Number of tokens."""
    angular: torch.Tensor
    """fp64 scalar, sum of arccos(cos(x, y)) / pi, each in [0, 1]."""
    cosine: torch.Tensor
    """fp64 scalar, sum of 1 - cos(x, y), each in [0, 2]."""
    mse: torch.Tensor
    """fp64 scalar, sum of the mean over D of (y - x)^2."""
    mae: torch.Tensor
    """fp64 scalar, sum of the mean over D of |y - x|."""


def block_influence_reference(hidden_in: torch.Tensor, hidden_out: torch.Tensor) -> BlockInfluence:
    """``[T, D], [T, D]`` -> sums, in fp64.

    arccos of a cosine loses half of its digits near 0, where blocks of a language model live
    (and is NaN where rounding takes the cosine past 1). Instead, with d = sum (y - x)^2,
    1 - cos = (d - (|x| - |y|)^2) / (2 |x| |y|) and angle = 2 asin(sqrt((1 - cos) / 2)).
    """
    tokens, width = hidden_in.shape
    sums = torch.zeros(4, dtype=torch.float64, device=hidden_in.device)
    for rows in row_chunks(tokens, width):
        x, y = hidden_in[rows].double(), hidden_out[rows].double()
        difference = y - x
        x_norm = torch.linalg.vector_norm(x, dim=-1)
        y_norm = torch.linalg.vector_norm(y, dim=-1)
        square = torch.linalg.vecdot(difference, difference)
        product = 2 * x_norm * y_norm
        cosine = ((square - (x_norm - y_norm) ** 2) / product).clamp(0, 2)
        cosine = torch.where(product > 0, cosine, (square > 0).double())
        cosine = torch.where(square.isnan(), square, cosine)
        angle = 2 / math.pi * torch.asin((cosine / 2).sqrt())
        absolute = torch.linalg.vector_norm(difference, 1, dim=-1)
        sums += torch.stack([angle.sum(), cosine.sum(), square.sum(), absolute.sum()])
    mean_over_width = 1 / max(1, width)
    return BlockInfluence(
        tokens, sums[0], sums[1], sums[2] * mean_over_width, sums[3] * mean_over_width
    )


def block_influence(
    hidden_in: torch.Tensor, hidden_out: torch.Tensor, *, backend: str | None = None
) -> BlockInfluence:
    """Angular, cosine, mse and mae influence of a block, summed over tokens.

    Args:
        hidden_in, hidden_out: [..., D] fp16, bf16 or fp32, unit stride along D, of one shape
            and dtype: the block's input and output hidden states.
        backend: "torch", "triton" or None: ``$CFSP_BACKEND``, then the device of hidden_in.

    Returns:
        BlockInfluence with fp64 scalars on the device; NaN or infinite states give NaN.

    Raises:
        TypeError, ValueError: dtype, shape or strides that the op does not read.
        RuntimeError: backend "triton" where it cannot run.

    Source: CFSP, arXiv 2409.13199, coarse importance (the angular metric).
    """
    x, y = as_rows("hidden_in", hidden_in), as_rows("hidden_out", hidden_out)
    check_same("hidden_in", hidden_in, "hidden_out", hidden_out)
    use_triton("block_influence", hidden_in, backend)
    return block_influence_reference(x, y)
