"""X^T X over tokens, lower triangle, accumulated in fp32 over micro-batches.

Work: ``T * C^2`` multiply-adds for the triangle, half of a full product, on tensor cores. Bytes
moved to and from DRAM: x at least once, ``T * C * itemsize``, and the triangle of out read and
written, ``4 * C^2``.
"""

from __future__ import annotations

from typing import no_type_check

import torch

from ._configs import launch_config
from ._dispatch import use_triton
from ._triton import Kernel, ceil_div, interpreted, tl
from ._validation import as_rows, check_out

BLOCK = 512  # columns per block row of the triangle
ROWS = 2048  # tokens that are held in fp32 at a time


def gram_reference(x: torch.Tensor, out: torch.Tensor) -> None:
    """Add the lower triangle of ``x^T x`` to ``out [C, C]`` fp32, block row by block row."""
    channels = x.shape[1]
    for rows in x.split(ROWS):
        rows = rows.float()
        for start in range(0, channels, BLOCK):
            left = rows[:, start : start + BLOCK]
            block = out[start : start + BLOCK]
            if start:
                block[:, :start].addmm_(left.T, rows[:, :start])
            block[:, start : start + BLOCK] += (left.T @ left).tril_()


@Kernel
@no_type_check
def gram_kernel(
    x_ptr,  # [T, C] fp16, bf16 or fp32, unit stride along C
    out_ptr,  # [C, C] fp32, unit stride along the last dimension
    tokens,
    channels,
    x_stride,
    out_stride,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter's dot takes the bits of bf16 for integers
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Programs walk GROUP block rows column by column, so that tiles in flight share columns of x
    # in L2. Those wholly above the diagonal leave at once.
    program = tl.program_id(0)
    block_rows = tl.cdiv(channels, BLOCK_M)
    per_group = GROUP * tl.cdiv(channels, BLOCK_N)
    first = program // per_group * GROUP
    group = tl.minimum(block_rows - first, GROUP)
    block_m = first + program % per_group % group
    block_n = program % per_group // group
    if block_n * BLOCK_N >= (block_m + 1) * BLOCK_M:
        return
    row = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, BLOCK_T)
    stride = x_stride.to(tl.int64)
    left_ptr = x_ptr + row[:, None] + token[None, :] * stride  # transposed as it is read
    right_ptr = x_ptr + token[:, None] * stride + column[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, tokens, BLOCK_T):
        here = token < tokens - start
        left = tl.load(left_ptr, mask=(row < channels)[:, None] & here[None, :], other=0.0)
        right = tl.load(right_ptr, mask=here[:, None] & (column < channels)[None, :], other=0.0)
        if WIDEN:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        left_ptr += BLOCK_T * stride
        right_ptr += BLOCK_T * stride
    # A part of the tile at a time: all of it, its old values and addresses overflow the registers.
    parts = tl.reshape(total, [BLOCK_M, 2, BLOCK_N // 2])
    first_half, second_half = tl.split(tl.permute(parts, [0, 2, 1]))
    half = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    out_ptr += row[:, None] * out_stride
    inside = (row < channels)[:, None]
    mask = inside & (half[None, :] <= row[:, None])
    pointers = out_ptr + half[None, :]
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + first_half, mask=mask)
    half += BLOCK_N // 2
    mask = inside & (half[None, :] <= row[:, None])
    pointers += BLOCK_N // 2
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + second_half, mask=mask)


def precision(dtype: torch.dtype, hip: bool) -> str:
    """How tensor cores multiply: only fp32 inputs leave a choice.

    TF32 alone keeps 11 bits of a factor; three products of its parts keep 22, at a third of the
    speed. AMD's matrix cores multiply fp32 as it is.
    """
    return "tf32x3" if dtype == torch.float32 and not hip else "ieee"


def table_entry(x: torch.Tensor) -> str:
    """The op's name in the table of launch configurations for ``x [T, C]``.

    Rows that don't start at 16-byte addresses are read an element at a time, at an address each:
    large tiles would not fit in the registers then.
    """
    if x.dtype == torch.float32:
        return "gram_fp32"
    aligned = x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0 and x.data_ptr() % 16 == 0
    return "gram" if aligned else "gram_ragged"


@torch.library.custom_op("cfsp::gram", mutates_args=("out",))
def gram_op(x: torch.Tensor, out: torch.Tensor) -> None:
    """Add the lower triangle of ``x^T x``, ``x [T, C]``, to ``out [C, C]`` fp32."""
    tokens, channels = x.shape
    if not x.numel():
        return
    config = launch_config(table_entry(x), x.device)
    grid = (ceil_div(channels, config["BLOCK_M"]) * ceil_div(channels, config["BLOCK_N"]),)
    with torch.cuda.device_of(x):
        gram_kernel[grid](
            x,
            out,
            tokens,
            channels,
            x.stride(0),
            out.stride(0),
            PRECISION=precision(x.dtype, torch.version.hip is not None),
            WIDEN=interpreted(),
            **config,
        )


@gram_op.register_fake
def _(x: torch.Tensor, out: torch.Tensor) -> None:
    return None


def gram(
    x: torch.Tensor, *, out: torch.Tensor | None = None, backend: str | None = None
) -> torch.Tensor:
    """Lower triangle of ``x^T x``.

    Args:
        x: [..., C] fp16, bf16 or fp32, unit stride along C. All other dimensions are tokens.
        out: [C, C] fp32 that the triangle is added to, for streaming over micro-batches.
        backend: "torch", "triton" or None: ``$CFSP_BACKEND``, then the device of ``x``.

    Returns:
        ``out``, or a new [C, C] fp32. Entries above the diagonal are not touched (0 when new).
        Over n tokens in all, an entry errs by at most n * 2^-23 of the sum of the absolute
        products; fp32 products are rounded to 22 bits on NVIDIA tensor cores.

    Raises:
        TypeError, ValueError: dtype, shape or strides that the op does not read.
        RuntimeError: backend "triton" where it cannot run.
    """
    rows = as_rows("x", x)
    shape = (x.shape[-1], x.shape[-1])
    like = torch.empty(0, dtype=torch.float32, device=x.device)
    if out is None:
        out = torch.zeros(shape, dtype=torch.float32, device=x.device)
    else:
        check_out(out, shape, like)
    compute = gram_op if use_triton("gram", x, backend) else gram_reference
    compute(rows, out.detach())
    return out
