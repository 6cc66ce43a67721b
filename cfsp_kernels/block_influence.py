"""How much a decoder block changes its hidden states: four metrics in one read.

Bytes moved: hidden_in and hidden_out read once, ``2 * T * D * itemsize``; 16 bytes per token
written and read back.
"""

from __future__ import annotations

import math
from typing import NamedTuple, no_type_check

import torch

from ._configs import launch_config
from ._dispatch import use_triton
from ._triton import Kernel, next_power_of_2, tl
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


def block_influence_reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``[T, D], [T, D]`` -> fp64 [4]: angular, cosine, mse, mae, summed over T.

    arccos of a cosine loses half of its digits near 0, where blocks of a language model live
    (and is NaN where rounding takes the cosine past 1). Instead, with d = sum (y - x)^2,
    1 - cos = (d - (|y| - |x|)^2) / (2 |x| |y|) and angle = 2 asin(sqrt((1 - cos) / 2)).
    """
    tokens, width = x.shape
    sums = torch.zeros(4, dtype=torch.float64, device=x.device)
    for rows in row_chunks(tokens, width, 1 << 17):  # 1 MiB in fp64
        before, after = x[rows].double(), y[rows].double()
        x_norm = torch.linalg.vector_norm(before, dim=-1)
        y_norm = torch.linalg.vector_norm(after, dim=-1)
        difference = after.sub_(before)
        square = torch.linalg.vecdot(difference, difference)
        product = 2 * x_norm * y_norm
        cosine = ((square - (x_norm - y_norm) ** 2) / product).clamp(0, 2)
        cosine = torch.where(product == 0, (square > 0).double(), cosine)
        angle = 2 / math.pi * torch.asin((cosine / 2).sqrt())
        absolute = torch.linalg.vector_norm(difference, 1, dim=-1)
        sums += torch.stack([angle.sum(), cosine.sum(), square.sum(), absolute.sum()])
    sums[2:] /= max(1, width)
    return sums


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


@torch.library.custom_op("cfsp::block_influence", mutates_args=())
def block_influence_op(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``[T, D], [T, D]`` -> fp64 [4]: angular, cosine, mse, mae, summed over T."""
    tokens, width = x.shape
    if not x.numel():
        return torch.zeros(4, dtype=torch.float64, device=x.device)
    config = launch_config("block_influence", x.device)
    config["BLOCK_D"] = min(config["BLOCK_D"], next_power_of_2(width))
    metrics = torch.empty(tokens, 4, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        block_influence_kernel[(tokens,)](x, y, metrics, width, x.stride(0), y.stride(0), **config)
    return metrics.sum(0, dtype=torch.float64)


@block_influence_op.register_fake
def _(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x.new_empty(4, dtype=torch.float64)


def block_influence(
    hidden_in: torch.Tensor, hidden_out: torch.Tensor, *, backend: str | None = None
) -> BlockInfluence:
    """Angular, cosine, mse and mae influence of a block, summed over tokens.

    Args:
        hidden_in, hidden_out: [..., D] fp16, bf16 or fp32, unit stride along D, of one shape
            and dtype: the block's input and output hidden states.
        backend: "torch", "triton" or None: ``$CFSP_BACKEND``, then the device of hidden_in.

    Returns:
        BlockInfluence with fp64 scalars on the device. NaN states make every sum NaN, infinite
        ones make angular and cosine NaN. The triton kernel sums squares in fp32: it takes a row
        whose norm is below 1e-19 for zeros, and one above 1e19 for infinite.

    Raises:
        TypeError, ValueError: dtype, shape or strides that the op does not read.
        RuntimeError: backend "triton" where it cannot run.

    Source: CFSP, arXiv 2409.13199, coarse importance (the angular metric).
    """
    x, y = as_rows("hidden_in", hidden_in), as_rows("hidden_out", hidden_out)
    check_same("hidden_in", hidden_in, "hidden_out", hidden_out)
    compute = (
        block_influence_op
        if use_triton("block_influence", hidden_in, backend)
        else block_influence_reference
    )
    angular, cosine, mse, mae = compute(x, y).unbind()
    return BlockInfluence(x.shape[0], angular, cosine, mse, mae)
