"""Sum and sum of squares of every channel over tokens.

Bytes moved: one read of x, ``T * C * itemsize``, and one fp32 pair per channel and 256 tokens
written and read back, ``T * C / 16``: 3 % of x in bf16. The results are ``16 * C``.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch

from ._configs import launch_config
from ._dispatch import kernel_op, use_triton
from ._partials import (
    ROWS_PER_PARTIAL,
    fold_partials,
    new_partials,
    rows_of_partial,
    segment_options,
    segments_of,
)
from ._triton import Kernel, ceil_div, tl
from ._validation import as_rows, check_offsets, check_out


class ChannelStatistics(NamedTuple):
    """Sums over tokens; two of them over disjoint tokens add up to that of their union."""

    tokens: int | torch.Tensor
    """Number of tokens; with segments [E] int32 or int64, of each."""
    sum: torch.Tensor
    """[C] fp64, sum of x over tokens; with segments [E, C]."""
    sum_of_squares: torch.Tensor
    """[C] fp64, sum of x squared over tokens; with segments [E, C]."""


@kernel_op("channel_statistics_reference", mutates_args=("totals",))
def channel_statistics_reference(
    x: torch.Tensor, totals: torch.Tensor, offsets: torch.Tensor | None
) -> None:
    """Add the statistics of ``x [T, C]`` to ``totals``, [2, C] or with offsets [S, 2, C].

    They are summed in fp32 over a few tokens, then in fp64: the error is that of 256 fp32 terms at
    most, whatever T is.
    """
    for rows, total in segments_of(x.shape[0], totals, offsets):
        if total is not None:
            add_rows(x[rows], total)


def add_rows(x: torch.Tensor, totals: torch.Tensor) -> None:
    """Add the statistics of ``x [T, C]`` to ``totals [2, C]``, a few rows at a time."""
    tokens, channels = x.shape
    step = rows_per_step(channels)
    # One buffer, since fresh pages may cost more than the arithmetic.
    buffer = torch.empty(min(tokens, step), channels, dtype=torch.float32, device=x.device)
    total, squares = totals
    for rows in x.split(step):
        wide = buffer[: len(rows)].copy_(rows)
        total += wide.sum(0)
        squares += wide.square_().sum(0)


def rows_per_step(channels: int) -> int:
    """Tokens that a reference takes at a time: a power of two up to 256, at most 4 MiB in fp32."""
    rows = max(1, (1 << 20) // max(1, channels))
    return min(ROWS_PER_PARTIAL, 1 << (rows.bit_length() - 1))


@Kernel
@no_type_check
def channel_statistics_kernel(
    x_ptr,  # [T, C] fp16, bf16 or fp32, unit stride along C
    partials_ptr,  # [N, 2, C] fp32
    offsets_ptr,  # [segments + 1] int32 or int64, read if SEGMENTS
    tokens,
    channels,
    segments,
    x_stride,
    SEGMENTS: tl.constexpr,
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
    first, end = rows_of_partial(partial, offsets_ptr, segments, tokens, ROWS, SEGMENTS)
    token = first + tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for _ in range(0, ROWS, BLOCK_T):
        mask = (token < end)[:, None] & inside[None, :]
        pointers = x_ptr + token[:, None] * x_stride + channel[None, :]
        x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        total += x
        squares += x * x
        token += BLOCK_T
    out = partials_ptr + partial * 2 * channels + channel
    tl.store(out, tl.sum(total, 0), mask=inside)
    tl.store(out + channels, tl.sum(squares, 0), mask=inside)


@kernel_op("channel_statistics", mutates_args=("totals",))
def channel_statistics_op(
    x: torch.Tensor, totals: torch.Tensor, offsets: torch.Tensor | None
) -> None:
    """Add the statistics of ``x [T, C]`` to fp64 totals, partial after partial.

    ``totals``: [2, C], with offsets [S, 2, C].
    """
    tokens, channels = x.shape
    if not x.numel():
        return
    config = launch_config("channel_statistics", x.device)
    partials = new_partials(x, 2, offsets)
    places, segments, block = segment_options(x, offsets)
    grid = (ceil_div(channels, config["BLOCK_C"]) * partials.shape[0],)
    with torch.cuda.device_of(x):  # Triton launches on the current device, not on that of x
        channel_statistics_kernel[grid](
            x,
            partials,
            places,
            tokens,
            channels,
            segments,
            x.stride(0),
            SEGMENTS=block,
            ROWS=ROWS_PER_PARTIAL,
            **config,
        )
        fold_partials(partials, totals, offsets)


def accumulate(
    rows: torch.Tensor, totals: torch.Tensor, offsets: torch.Tensor | None, triton: bool
) -> None:
    """:func:`channel_statistics_op` on either backend."""
    (channel_statistics_op if triton else channel_statistics_reference)(rows, totals, offsets)


def totals_for(
    rows: torch.Tensor,
    totals: torch.Tensor | None,
    offsets: torch.Tensor | None,
    *others: torch.Tensor,
) -> torch.Tensor:
    """The totals to add statistics of ``rows`` to: the caller's, checked, or zeros.

    ``others`` are further inputs, whose memory the totals must not share.
    """
    shape: tuple[int, ...] = (2, rows.shape[1])
    if offsets is not None:
        check_offsets(offsets, rows)
        shape = (offsets.shape[0] - 1, *shape)
    if totals is None:
        totals = torch.zeros(shape, dtype=torch.float64, device=rows.device)
    else:
        check_out("totals", totals, shape, torch.float64, rows, *others, offsets)
        totals = totals.detach()
    return totals


def as_statistics(
    rows: torch.Tensor, totals: torch.Tensor, offsets: torch.Tensor | None
) -> ChannelStatistics:
    """What a public function returns of ``totals [2, C]``, with offsets ``[S, 2, C]``."""
    tokens = rows.shape[0] if offsets is None else offsets.diff()
    return ChannelStatistics(tokens, *totals.unbind(-2))


def channel_statistics(
    x: torch.Tensor,
    *,
    offsets: torch.Tensor | None = None,
    totals: torch.Tensor | None = None,
    backend: str | None = None,
) -> ChannelStatistics:
    """Sum and sum of squares of each channel of ``x``.

    Args:
        x: [..., C] fp16, bf16 or fp32; unit stride along C. All other dimensions are tokens.
        offsets: [E + 1] int32 or int64, rising from 0: segment e is tokens ``offsets[e]`` to
            ``offsets[e + 1]``, those of one expert for instance. Tokens after the last are in none.
            Values are checked on the CPU; on a device they are the caller's.
        totals: [2, C] fp64, with offsets [E, 2, C], to add the sums to; None: new ones. Unit stride
            along C.
        backend: "torch", "triton" or None: ``$CFSP_BACKEND``, then the device of ``x``.

    Returns:
        ChannelStatistics with the tokens of this call and fp64 sums [C] on the device of ``x``,
        which are views of ``totals``. No token: zeros. With offsets, tokens [E] and sums [E, C],
        bit for bit those of the segments one by one.
        Over n tokens either sum errs by at most 256 * 2^-24 of the sum of its absolute terms.

    Raises:
        TypeError, ValueError: dtype, shape, strides or memory that the op does not take.
        RuntimeError: backend "triton" where it cannot run.
    """
    rows = as_rows("x", x)
    sums = totals_for(rows, totals, offsets)
    accumulate(rows, sums, offsets, use_triton("channel_statistics", x, backend))
    return as_statistics(rows, sums, offsets)
