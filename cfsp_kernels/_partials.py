"""fp32 partial sums of 256 rows, folded into fp64 totals in order.

Kernels that sum over many rows store one fp32 partial per 256 of them. A second kernel adds the
partials one after another, so a total's bits depend neither on the GPU's size nor on how the rows
were divided into calls, as long as calls are divided at whole partials.

Rows may be in segments (of one expert each), with a total for each. Partials do not cross segments:
that of rows ``[k * 256, (k + 1) * 256)`` of segment s, which starts at row ``offsets[s]``, has the
number ``offsets[s] // 256 + s + k``. Some numbers stand for no rows, but nobody has to count the
rows of segments first, which would wait for the device.

Bytes moved: partials read once, ``4 * N * G * C``; totals read and written, ``16 * S * G * C``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import no_type_check

import torch

from ._configs import launch_config
from ._triton import Kernel, ceil_div, next_power_of_2, tl

ROWS_PER_PARTIAL = 256
"""Rows summed in fp32 before they join the fp64 total."""


@Kernel
@no_type_check
def rows_of_partial(
    partial,
    offsets_ptr,  # [segments + 1] int32 or int64
    segments,
    tokens,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,  # a power of two above segments; 0: all rows are one segment
):
    """The first row of a partial, and the row that it ends before. Rows after the last segment are
    one more segment."""
    end = tl.cast(tokens, tl.int64)
    if SEGMENTS == 0:
        first = partial * ROWS
    else:
        number = tl.arange(0, SEGMENTS)
        inside = (number > 0) & (number <= segments)
        offset = tl.load(offsets_ptr + number, mask=inside, other=0)
        begun = inside & (offset // ROWS + number <= partial.to(tl.int32))
        segment = tl.sum(begun.to(tl.int32), 0)
        start = tl.load(offsets_ptr + segment).to(tl.int64)
        if segment < segments:
            end = tl.load(offsets_ptr + segment + 1).to(tl.int64)
        first = start + (partial - start // ROWS - segment) * ROWS
    return first, end


@Kernel
@no_type_check
def fold_kernel(
    partials_ptr,  # [N, groups, C] fp32, contiguous
    total_ptr,  # [segments, groups, C] fp64, unit stride along C; fp32 if RECIPROCAL
    offsets_ptr,  # [segments + 1] int32 or int64, read if SEGMENTED
    partials,
    groups,
    channels,
    segment_stride,
    group_stride,
    SEGMENTED: tl.constexpr,
    FRESH: tl.constexpr,  # start from 0, not from what total_ptr holds
    RECIPROCAL: tl.constexpr,  # 1 / sum, finite where it is 0
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, BLOCK_C)
    channel = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = program // blocks % groups
    segment = program // blocks // groups
    inside = channel < channels
    pointer = partials_ptr + group * channels + channel
    if SEGMENTED:
        start = tl.load(offsets_ptr + segment).to(tl.int64)
        end = tl.load(offsets_ptr + segment + 1).to(tl.int64)
        pointer += (start // ROWS + segment) * groups * channels
        partials = tl.cdiv(end - start, ROWS).to(tl.int32)
    total_ptr += segment * segment_stride + group * group_stride + channel
    total = tl.zeros([BLOCK_C], tl.float64)
    if not FRESH:
        total = tl.load(total_ptr, mask=inside, other=0.0)
    for _ in tl.range(0, partials, loop_unroll_factor=UNROLL):
        total += tl.load(pointer, mask=inside, other=0.0).to(tl.float64)
        pointer += groups * channels
    if RECIPROCAL:
        total = 1 / tl.where(total < 1e-30, 1e-30, total).to(tl.float32)
    tl.store(total_ptr, total, mask=inside)


def segments_of(
    tokens: int, totals: torch.Tensor, offsets: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """For references: the rows of each segment and its part of ``totals [S, ...]``; None for those
    after the last segment. Without offsets all rows, and ``totals`` as they are."""
    if offsets is None:
        yield slice(0, tokens), totals
    else:
        bounds = [*offsets.tolist(), tokens]
        for (start, end), total in zip(pairwise(bounds), [*totals, None], strict=True):
            yield slice(start, end), total


def new_partials(x: torch.Tensor, groups: int, offsets: torch.Tensor | None) -> torch.Tensor:
    """Room for the partials [N, groups, C] fp32 of the rows of ``x [T, C]``."""
    tokens, channels = x.shape
    count = (
        ceil_div(tokens, ROWS_PER_PARTIAL)
        if offsets is None
        else tokens // ROWS_PER_PARTIAL + offsets.shape[0]
    )
    return torch.empty(count, groups, channels, dtype=torch.float32, device=x.device)


def segment_options(x: torch.Tensor, offsets: torch.Tensor | None) -> tuple[torch.Tensor, int, int]:
    """(offsets, segments, SEGMENTS) as kernels take them."""
    if offsets is None:
        return x, 1, 0  # any pointer will do: it is not read
    return offsets, offsets.shape[0] - 1, next_power_of_2(offsets.shape[0])


def fold_partials(
    partials: torch.Tensor,
    totals: torch.Tensor,
    offsets: torch.Tensor | None = None,
    *,
    fresh: bool = False,
    reciprocal: bool = False,
) -> None:
    """Add partials to totals, first to last.

    Args:
        partials: [N, G, C] fp32, contiguous.
        totals: [G, C] fp64, with offsets [S, G, C]; unit stride along C. The current device must be
            theirs.
        offsets: [S + 1] rows at which segments start; None: one segment of all partials.
        fresh: set the totals to the sums.
        reciprocal: set the totals, fp32 then, to 1 / sum, finite where a sum is 0.
    """
    config = launch_config("fold_partials", totals.device)
    count, groups, channels = partials.shape
    segments = 1 if offsets is None else totals.shape[0]
    grid = (segments * groups * ceil_div(channels, config["BLOCK_C"]),)
    fold_kernel[grid](
        partials,
        totals,
        partials if offsets is None else offsets,
        count,
        groups,
        channels,
        totals.stride(0),
        totals.stride(-2),
        SEGMENTED=offsets is not None,
        FRESH=fresh or reciprocal,
        RECIPROCAL=reciprocal,
        ROWS=ROWS_PER_PARTIAL,
        **config,
    )
