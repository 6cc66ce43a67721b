"""Sum and sum of squares of every channel over tokens.

Bytes moved: one read of x, ``T * C * itemsize``, and one fp32 pair per channel and 256 tokens
written and read back, ``T * C / 16``: 3 % of x in bf16. The results are ``16 * C``.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch

from ._configs import launch_config
from ._dispatch import use_triton
from ._partials import fold_partials
from ._triton import Kernel, ceil_div, tl
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


def channel_statistics_reference(x: torch.Tensor, totals: torch.Tensor) -> None:
    """Add the statistics of ``x [T, C]`` to ``totals [2, C]``: fp32 in a few tokens, then fp64.

    The error of a sum is that of 256 fp32 terms at most, whatever T is.
    """
    for rows in x.split(rows_per_step(x.shape[1])):
        rows = rows.float()
        totals[0] += rows.sum(0)
        totals[1] += (rows * rows).sum(0)


def rows_per_step(channels: int) -> int:
    """Tokens that the reference takes at a time: a power of two up to 256, about 1 MiB in fp32.

    Temporaries then stay in a cache, and in memory that the allocator has at hand: fresh pages
    cost more than the arithmetic.
    """
    rows = max(1, (1 << 18) // max(1, channels))
    return min(ROWS_PER_PARTIAL, 1 << (rows.bit_length() - 1))


@Kernel
@no_type_check
def channel_statistics_kernel(
    x_ptr,  # [T, C] fp16, bf16 or fp32, unit stride along C
    partials_ptr,  # [ceil(T / ROWS), 2, C] fp32
    tokens,
    channels,
    x_stride,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # int64 before any multiplication: T * C passes 2^31 on real models. One grid axis, as the
    # others end at 65535 programs; neighbours are channels, so that they share DRAM pages.
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, BLOCK_C)
    partial = program // blocks
    channel = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    token = partial * ROWS + tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for _ in range(0, ROWS, BLOCK_T):
        mask = (token < tokens)[:, None] & inside[None, :]
        pointers = x_ptr + token[:, None] * x_stride + channel[None, :]
        x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        total += x
        squares += x * x
        token += BLOCK_T
    out = partials_ptr + partial * 2 * channels + channel
    tl.store(out, tl.sum(total, 0), mask=inside)
    tl.store(out + channels, tl.sum(squares, 0), mask=inside)


@torch.library.custom_op("cfsp::channel_statistics", mutates_args=("totals",))
def channel_statistics_op(x: torch.Tensor, totals: torch.Tensor) -> None:
    """Add the statistics of ``x [T, C]`` to ``totals [2, C]`` fp64, partial after partial."""
    tokens, channels = x.shape
    if not x.numel():
        return
    config = launch_config("channel_statistics", x.device)
    splits = ceil_div(tokens, ROWS_PER_PARTIAL)
    partials = torch.empty(splits, 2, channels, dtype=torch.float32, device=x.device)
    grid = (ceil_div(channels, config["BLOCK_C"]) * splits,)
    with torch.cuda.device_of(x):  # Triton launches on the current device, not on that of x
        channel_statistics_kernel[grid](
            x, partials, tokens, channels, x.stride(0), ROWS=ROWS_PER_PARTIAL, **config
        )
        fold_partials(partials, totals)


@channel_statistics_op.register_fake
def _(x: torch.Tensor, totals: torch.Tensor) -> None:
    return None


def accumulate(x: torch.Tensor, totals: torch.Tensor, triton: bool) -> None:
    """Add the statistics of ``x [T, C]`` to ``totals [2, C]`` fp64 on either backend."""
    if triton:
        channel_statistics_op(x, totals)
    else:
        channel_statistics_reference(x, totals)


def channel_statistics(x: torch.Tensor, *, backend: str | None = None) -> ChannelStatistics:
    """Sum and sum of squares of each channel of ``x``.

    Args:
        x: [..., C] fp16, bf16 or fp32; unit stride along C. All other dimensions are tokens.
        backend: "torch", "triton" or None: ``$CFSP_BACKEND``, then the device of ``x``.

    Returns:
        ChannelStatistics with fp64 sums [C] on the device of ``x``. No token: zeros.
        Over n tokens either sum errs by at most 256 * 2^-24 of the sum of its absolute terms.

    Raises:
        TypeError, ValueError: dtype, shape or strides that the op does not read.
        RuntimeError: backend "triton" where it cannot run.
    """
    rows = as_rows("x", x)
    totals = torch.zeros(2, x.shape[-1], dtype=torch.float64, device=x.device)
    accumulate(rows, totals, use_triton("channel_statistics", x, backend))
    return ChannelStatistics(rows.shape[0], totals[0], totals[1])
