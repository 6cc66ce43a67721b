"""act(gate) * up and, in the same pass, the channel statistics of the product.

Bytes moved: gate and up read, the product written, ``3 * T * F * itemsize``. The statistics
cost one fp32 pair per channel and 256 tokens, written and read back: 1 % of that in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import no_type_check

import torch
from torch.nn import functional

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
from ._triton import Kernel, ceil_div, interpreted, tl
from ._validation import as_rows, check_same
from .channel_statistics import (
    ChannelStatistics,
    add_rows,
    as_statistics,
    rows_per_step,
    totals_for,
)

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: functional.relu(x).square(),
}


@kernel_op("swiglu_statistics_reference", mutates_args=("totals",))
def swiglu_statistics_reference(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    totals: torch.Tensor,
    offsets: torch.Tensor | None,
) -> torch.Tensor:
    """``[T, F], [T, F] -> [T, F]`` in the input dtype; adds its statistics to the totals.

    Rounds where an unfused model does, after the activation and after the product, so that
    calibrating with this op leaves the model's hidden states as they are.
    """
    act = ACTIVATIONS[activation]
    product = torch.empty_like(gate, memory_format=torch.contiguous_format)
    step = rows_per_step(gate.shape[1])
    for segment, total in segments_of(gate.shape[0], totals, offsets):
        for start in range(segment.start, segment.stop, step):
            rows = slice(start, min(start + step, segment.stop))
            torch.mul(act(gate[rows]), up[rows], out=product[rows])
            if total is not None:
                add_rows(product[rows], total)
    return product


@Kernel
@no_type_check
def nearest_bf16(x):
    """fp32 ``x`` to the nearest bf16, ties to even, still as fp32."""
    bits = x.to(tl.int32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return tl.where(x == x, (bits & -65536).to(tl.float32, bitcast=True), x)


@Kernel
@no_type_check
def swiglu_statistics_kernel(
    gate_ptr,  # [T, F] fp16, bf16 or fp32, unit stride along F
    up_ptr,  # [T, F] of the same dtype, unit stride along F
    product_ptr,  # [T, F] of the same dtype, contiguous
    partials_ptr,  # [N, 2, F] fp32
    offsets_ptr,  # [segments + 1] int32 or int64, read if SEGMENTS
    tokens,
    channels,
    segments,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    ROUND_BF16: tl.constexpr,  # the interpreter's cast to bf16 truncates where a GPU rounds
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, BLOCK_C)
    partial = program // blocks
    channel = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    first, end = rows_of_partial(partial, offsets_ptr, segments, tokens, ROWS, SEGMENTS)
    token = first + tl.arange(0, BLOCK_T)
    dtype = product_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for _ in range(0, ROWS, BLOCK_T):
        mask = (token < end)[:, None] & inside[None, :]
        column = channel[None, :]
        row = token[:, None]
        g = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION == "silu":
            a = g / (1 + tl.exp(-g))
        elif ACTIVATION == "gelu":
            a = 0.5 * g * (1 + tl.erf(g * 0.7071067811865476))
        elif ACTIVATION == "gelu_tanh":
            # (1 + tanh(z)) / 2 is the logistic function of 2 z, which loses no digit at z << 0.
            z = 1.5957691216057308 * (g + 0.044715 * g * g * g)
            a = g / (1 + tl.exp(-z))
        else:
            r = tl.where(g < 0, 0.0, g)  # and not maximum, which may drop a NaN
            a = r * r
        if ROUND_BF16:
            a = nearest_bf16(a)
        product = a.to(dtype).to(tl.float32) * u
        if ROUND_BF16:
            product = nearest_bf16(product)
        product = product.to(dtype)
        tl.store(product_ptr + row * channels + column, product, mask=mask)
        rounded = product.to(tl.float32)
        total += rounded
        squares += rounded * rounded
        token += BLOCK_T
    out = partials_ptr + partial * 2 * channels + channel
    tl.store(out, tl.sum(total, 0), mask=inside)
    tl.store(out + channels, tl.sum(squares, 0), mask=inside)


@kernel_op("swiglu_statistics", mutates_args=("totals",))
def swiglu_statistics_op(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    totals: torch.Tensor,
    offsets: torch.Tensor | None,
) -> torch.Tensor:
    """The product ``[T, F]``; adds its statistics to ``totals [2, F]``, fp64, or ``[S, 2, F]``."""
    tokens, channels = gate.shape
    product = torch.empty(tokens, channels, dtype=gate.dtype, device=gate.device)
    if not product.numel():
        return product
    config = launch_config("swiglu_statistics", gate.device)
    partials = new_partials(gate, 2, offsets)
    places, segments, block = segment_options(gate, offsets)
    grid = (ceil_div(channels, config["BLOCK_C"]) * partials.shape[0],)
    with torch.cuda.device_of(gate):
        swiglu_statistics_kernel[grid](
            gate,
            up,
            product,
            partials,
            places,
            tokens,
            channels,
            segments,
            gate.stride(0),
            up.stride(0),
            ACTIVATION=activation,
            ROUND_BF16=interpreted() and gate.dtype == torch.bfloat16,
            SEGMENTS=block,
            ROWS=ROWS_PER_PARTIAL,
            **config,
        )
        fold_partials(partials, totals, offsets)
    return product


@swiglu_statistics_reference.register_fake
@swiglu_statistics_op.register_fake
def _(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    totals: torch.Tensor,
    offsets: torch.Tensor | None,
) -> torch.Tensor:
    return gate.new_empty(gate.shape)


def swiglu_statistics(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str = "silu",
    *,
    offsets: torch.Tensor | None = None,
    totals: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, ChannelStatistics]:
    """The gated product of an FFN and its channel statistics, in one pass.

    Args:
        gate, up: [..., F] fp16, bf16 or fp32, unit stride along F, of one shape and dtype.
        activation: "silu", "gelu" (exact), "gelu_tanh" or "relu2".
        offsets, totals: see :func:`cfsp_kernels.channel_statistics`. One call serves all experts
            of a block, whose tokens lie one expert after the other.
        backend: "torch", "triton" or None: ``$CFSP_BACKEND``, then the device of ``gate``.

    Returns:
        (act(gate) * up with the shape and dtype of ``gate``, ChannelStatistics of it with
        fp64 sums [F], with offsets [E, F]). act(gate) is rounded to the dtype and so is the
        product, as in a model that computes them one after the other; the statistics are of the
        rounded product.

    Raises:
        TypeError, ValueError: dtype, shape, strides, memory or activation that the op does not
            take.
        RuntimeError: backend "triton" where it cannot run.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    gate_rows, up_rows = as_rows("gate", gate), as_rows("up", up)
    check_same("gate", gate, "up", up)
    sums = totals_for(gate_rows, totals, offsets, up_rows)
    triton = use_triton("swiglu_statistics", gate, backend)
    compute = swiglu_statistics_op if triton else swiglu_statistics_reference
    product = compute(gate_rows, up_rows, activation, sums, offsets)
    return product.view(gate.shape), as_statistics(gate_rows, sums, offsets)
