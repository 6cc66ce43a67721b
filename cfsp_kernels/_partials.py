"""Fold fp32 partial sums into fp64 totals, in order.

Kernels that sum over many rows store one fp32 partial per fixed number of rows. This adds the
partials one after another, so a total's bits depend neither on the GPU's size nor on how the
rows were divided into calls, as long as calls are divided at whole partials.

Bytes moved: partials read once, ``4 * N * C``; totals read and written, ``16 * C``.
"""

from __future__ import annotations

from typing import no_type_check

import torch

from ._configs import launch_config
from ._triton import Kernel, ceil_div, tl


@Kernel
@no_type_check
def fold_kernel(
    partials_ptr,  # [N, C] fp32, contiguous
    total_ptr,  # [C] fp64
    partials,
    channels,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    total = tl.load(total_ptr + channel, mask=inside, other=0.0)
    pointer = partials_ptr + channel
    for _ in tl.range(0, partials, loop_unroll_factor=UNROLL):
        total += tl.load(pointer, mask=inside, other=0.0).to(tl.float64)
        pointer += channels
    tl.store(total_ptr + channel, total, mask=inside)


def fold_partials(partials: torch.Tensor, total: torch.Tensor) -> None:
    """Add ``partials [N, ...]`` fp32 to ``total [...]`` fp64, first to last. Contiguous both.

    The current device must be theirs.
    """
    config = launch_config("fold_partials", total.device)
    channels = total.numel()
    grid = (ceil_div(channels, config["BLOCK_C"]),)
    fold_kernel[grid](partials, total, partials.shape[0], channels, **config)
