"""How much a decoder block changes its hidden states: four metrics in one read.

Bytes moved: hidden_in and hidden_out read once, ``2 * T * D * itemsize``; 16 bytes per token
written and read back.
"""

from __future__ import annotations

import math
from typing import NamedTuple, no_type_check

import torch

from ._configs import launch_config
from ._dispatch import kernel_op, use_triton
from ._triton import Kernel, next_power_of_2, tl
from ._validation import as_rows, check_out, check_same, chunk_elements, row_chunks


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


@kernel_op("block_influence_reference", mutates_args=("out",))  # its shapes depend on values
def block_influence_reference(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    """``[T, D], [T, D]`` -> ``out [4]`` fp64: angular, cosine, mse, mae, summed over T.

    arccos of a cosine loses half of its digits near 0, where blocks of a language model live
    (and is NaN where rounding takes the cosine past 1). Instead, with d = sum (y - x)^2,
    1 - cos = (d - (|y| - |x|)^2) / (2 |x| |y|) and angle = 2 asin(sqrt((1 - cos) / 2)). Sums over D
    are fp32, what is made of them fp64.
    """
    tokens, width = x.shape
    sums = torch.empty(5, tokens, dtype=torch.float32, device=x.device)
    chunks = list(row_chunks(tokens, width, chunk_elements(x.device)))
    step = chunks[0].stop if chunks else 0
    buffers = torch.empty(3, step, width, dtype=torch.float32, device=x.device)
    norm = torch.linalg.vector_norm
    for rows in chunks:
        before, after, difference = buffers[:, : rows.stop - rows.start]
        a, b = x[rows], y[rows]
        if x.dtype != torch.float32:
            a, b = before.copy_(a), after.copy_(b)
        norm(a, dim=1, out=sums[0, rows])
        norm(b, dim=1, out=sums[1, rows])
        torch.sub(b, a, out=difference)
        norm(difference, dim=1, out=sums[2, rows])
        torch.sum(torch.mul(a, difference, out=before), 1, out=sums[3, rows])
        torch.sum(difference.abs_(), 1, out=sums[4, rows])
    x_norm, y_norm, distance, along, absolute = sums.double()
    square = distance.square()
    product = 2 * x_norm * y_norm
    # |y| - |x| as (|y|^2 - |x|^2) / (|y| + |x|), with the numerator summed from y - x: the
    # difference of two rounded norms would err by more than a small angle's share of d.
    radial = ((2 * along + square) / (x_norm + y_norm)).square()
    cosine = ((square - radial) / product).clamp(0, 2)
    angle = 2 / math.pi * torch.asin((cosine / 2).sqrt())
    # Past a right angle, which is rare, the half angle from x to -y is the well-conditioned one.
    for rows in (cosine > 1).nonzero()[:, 0].split(max(1, step)):
        opposite = norm(x[rows].double() + y[rows].double(), dim=1).square()
        other = ((opposite - radial[rows]) / product[rows]).clamp(0, 2)
        angle[rows] = 1 - 2 / math.pi * torch.asin((other / 2).sqrt())
    zero = product == 0
    cosine = torch.where(zero, (square > 0).double(), cosine)
    angle = torch.where(zero, cosine / 2, angle)
    torch.sum(torch.stack([angle, cosine, square, absolute]), 1, out=out)
    out[2:] /= max(1, width)


@Kernel
@no_type_check
def arcsine(s):
    """asin(s) for 0 <= s <= sqrt(1/2), in fp32 (Triton has one for NVIDIA and AMD, not both).

    s + s^3 P(s^2) with P of degree 7, fitted by least squares to the relative error of asin:
    2^-28 before the rounding of fp32.
    """
    z = s * s
    p = z * 0.12690731 - 0.141450199
    p = p * z + 0.111448269
    p = p * z - 0.00849319754
    p = p * z + 0.0360839453
    p = p * z + 0.0440712775
    p = p * z + 0.0750273888
    p = p * z + 0.166666221
    return s + s * z * p


@Kernel
@no_type_check
def block_influence_kernel(
    x_ptr,  # [T, D] fp16, bf16 or fp32, unit stride along D
    y_ptr,  # [T, D] of the same dtype, unit stride along D
    out_ptr,  # [T, 4] fp32: angular, cosine, mse, mae
    width,
    x_stride,
    y_stride,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * x_stride
    y_ptr += token * y_stride
    x_square = tl.zeros([BLOCK_D], tl.float32)
    y_square = tl.zeros([BLOCK_D], tl.float32)
    square = tl.zeros([BLOCK_D], tl.float32)
    opposite = tl.zeros([BLOCK_D], tl.float32)
    radial = tl.zeros([BLOCK_D], tl.float32)
    absolute = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < width
        x = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + column, mask=inside, other=0.0).to(tl.float32)
        difference = y - x
        total = y + x
        x_square += x * x
        y_square += y * y
        square += difference * difference
        opposite += total * total
        radial += difference * total
        absolute += tl.abs(difference)
    d = tl.sum(square, 0)
    e = tl.sum(opposite, 0)
    x_norm = tl.sqrt(tl.sum(x_square, 0))
    y_norm = tl.sqrt(tl.sum(y_square, 0))
    # |y| - |x| as (|y|^2 - |x|^2) / (|y| + |x|), with the numerator summed from y - x: the
    # difference of two rounded norms would err by more than a small angle's share of d.
    product = 2 * x_norm * y_norm
    zero = product == 0
    longer = tl.sum(radial, 0) / tl.where(zero, 1.0, x_norm + y_norm)
    divisor = tl.where(zero, 1.0, product)
    cosine = (d - longer * longer) / divisor
    cosine = tl.where(cosine < 0, 0.0, cosine)  # where keeps a NaN, minimum and maximum need not
    cosine = tl.where(cosine > 2, 2.0, cosine)
    cosine = tl.where(zero, tl.where(d > 0, 1.0, 0.0), cosine)
    # Past a right angle the half angle from x to -y is the well-conditioned one.
    acute = (d <= e) | zero
    other = (e - longer * longer) / divisor
    other = tl.where(other < 0, 0.0, other)
    half = arcsine(tl.sqrt(tl.where(acute, cosine, other) / 2)) * 0.6366197723675814  # 2 / pi
    angle = tl.where(acute, half, 1 - half)
    out_ptr += token * 4
    tl.store(out_ptr, angle)
    tl.store(out_ptr + 1, cosine)
    tl.store(out_ptr + 2, d / width)
    tl.store(out_ptr + 3, tl.sum(absolute, 0) / width)


@kernel_op("block_influence", mutates_args=("out",))
def block_influence_op(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    """``[T, D], [T, D]`` -> ``out [4]`` fp64: angular, cosine, mse, mae, summed over T."""
    tokens, width = x.shape
    if not x.numel():
        out.zero_()
        return
    config = launch_config("block_influence", x.device)
    config["BLOCK_D"] = min(config["BLOCK_D"], next_power_of_2(width))
    metrics = torch.empty(tokens, 4, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        block_influence_kernel[(tokens,)](x, y, metrics, width, x.stride(0), y.stride(0), **config)
    torch.sum(metrics, 0, dtype=torch.float64, out=out)


def block_influence(
    hidden_in: torch.Tensor,
    hidden_out: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> BlockInfluence:
    """Angular, cosine, mse and mae influence of a block, summed over tokens.

    Args:
        hidden_in, hidden_out: [..., D] fp16, bf16 or fp32, unit stride along D, of one shape
            and dtype: the block's input and output hidden states.
        out: [4] fp64 to write the sums to, in the order of BlockInfluence, or None.
        backend: "torch", "triton" or None: ``$CFSP_BACKEND``, then the device of hidden_in.

    Returns:
        BlockInfluence with fp64 scalars on the device, views of ``out``. NaN states make every sum
        NaN, infinite ones make angular and cosine NaN. Squares are summed in fp32: a row whose norm
        is below 1e-19 counts as zeros, one above 1e19 as infinite.

    Raises:
        TypeError, ValueError: dtype, shape, strides or memory that the op does not take.
        RuntimeError: backend "triton" where it cannot run.

    Source: CFSP, arXiv 2409.13199, coarse importance (the angular metric).
    """
    x, y = as_rows("hidden_in", hidden_in), as_rows("hidden_out", hidden_out)
    check_same("hidden_in", hidden_in, "hidden_out", hidden_out)
    if out is None:
        out = torch.empty(4, dtype=torch.float64, device=x.device)
    else:
        check_out("out", out, (4,), torch.float64, x, y)
    triton = use_triton("block_influence", hidden_in, backend)
    sums = out.detach()
    (block_influence_op if triton else block_influence_reference)(x, y, sums)
    return BlockInfluence(x.shape[0], *sums.unbind())
