"""Sum and sum of squares of every channel over tokens.

Bytes moved: one read of x, ``T * C * itemsize``; the results are ``16 * C``.
"""

from typing import NamedTuple

import torch

from ._dispatch import use_triton
from ._validation import as_rows

ROWS_PER_PARTIAL = 256  # tokens summed in fp32 before they join the fp64 total


class ChannelStatistics(NamedTuple):
    """Sums over tokens; two of them over disjoint tokens add up to that of their union."""

    tokens: int
    """Number of tokens."""
    sum: torch.Tensor
    """[C] fp64, sum of x over tokens."""
    sum_of_squares: torch.Tensor
    """[C] fp64, sum of x squared over tokens."""


def channel_statistics_reference(x: torch.Tensor) -> ChannelStatistics:
    """``[T, C] -> `` statistics: fp32 within 256 tokens, fp64 across them.

    The error of a sum is that of 256 fp32 terms, whatever T is.
    """
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    squares = torch.zeros_like(total)
    for rows in x.split(ROWS_PER_PARTIAL):
        rows = rows.float()
        total += rows.sum(0)
        squares += (rows * rows).sum(0)
    return ChannelStatistics(x.shape[0], total, squares)


def channel_statistics(x: torch.Tensor, *, backend: str | None = None) -> ChannelStatistics:
    """Sum and sum of squares of each channel of ``x``.

    Args:
        x: [..., C] fp16, bf16 or fp32; unit stride along C. All other dimensions are tokens.
        backend: "torch", "triton" or None: ``$CFSP_BACKEND``, then the device of ``x``.

    Returns:
        ChannelStatistics with fp64 sums [C] on the device of ``x``. No token: zeros.

    Raises:
        TypeError, ValueError: dtype, shape or strides that the op does not read.
        RuntimeError: backend "triton" where it cannot run.
    """
    rows = as_rows("x", x)
    use_triton("channel_statistics", x, backend)
    return channel_statistics_reference(rows)
