"""X^T X over tokens, lower triangle, accumulated in fp32 over micro-batches.

Work: ``T * C^2 / 2`` multiply-adds for the triangle, half of a full product, on tensor cores. Bytes
moved to and from DRAM: x at least once, ``T * C * itemsize``, and the triangle of out read and
written, ``4 * C^2`` in all.

Three forms for 16-bit inputs on a GPU stand here until a card has decided between them; which of
them is fastest has not been measured. The one in use is :func:`form_of`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, no_type_check

import torch

from ._configs import launch_config
from ._dispatch import kernel_op, use_triton
from ._partials import segment_options, segments_of
from ._triton import Kernel, ceil_div, interpreted, tl
from ._validation import as_rows, check_offsets, check_out

BLOCK = 384  # columns per block row of the triangle
ROWS = 2048  # tokens that are held in fp32 at a time


def gram_reference(x: torch.Tensor, out: torch.Tensor) -> None:
    """Add the lower triangle of ``x^T x`` to ``out [C, C]`` fp32, block row by block row.

    A block row is summed from zero before it is added, so that the sum of a call has the same bits
    whatever it is added to.
    """
    for start in range(0, x.shape[1], BLOCK):
        end = min(start + BLOCK, x.shape[1])
        product = torch.zeros(end - start, end, dtype=torch.float32, device=x.device)
        for rows in x.split(ROWS):
            left, right = rows[:, start:end].float().T, rows[:, :end].float()
            torch.addmm(product, left, right, out=product)
        out[start:end, :end] += product.tril_(start)


@kernel_op("gram_segments_reference", mutates_args=("out",))  # slices depend on values
def gram_segments_reference(x: torch.Tensor, out: torch.Tensor, offsets: torch.Tensor) -> None:
    """:func:`gram_reference` of each segment, into ``out [E, C, C]``."""
    for segment, total in segments_of(x.shape[0], out, offsets):
        if total is not None:
            gram_reference(x[segment], total)


@Kernel
@no_type_check
def gram_kernel(
    x_ptr,  # [T, C] fp16, bf16 or fp32, unit stride along C
    out_ptr,  # [segments, C, C] fp32, unit stride along the last dimension
    offsets_ptr,  # [segments + 1] int32 or int64, read if SEGMENTED
    tokens,
    channels,
    x_stride,
    segment_stride,
    out_stride,
    SEGMENTED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter's dot takes the bits of bf16 for integers
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Programs walk GROUP block rows column by column, so that tiles in flight share columns of x
    # in L2. Those wholly above the diagonal leave at once.
    block_rows = tl.cdiv(channels, BLOCK_M)
    block_columns = tl.cdiv(channels, BLOCK_N)
    program = tl.program_id(0)
    if SEGMENTED:
        segment = program // (block_rows * block_columns)
        program = program % (block_rows * block_columns)
    per_group = GROUP * block_columns
    first = program // per_group * GROUP
    group = tl.minimum(block_rows - first, GROUP)
    block_m = first + program % per_group % group
    block_n = program % per_group // group
    if block_n * BLOCK_N >= (block_m + 1) * BLOCK_M:
        return
    stride = tl.cast(x_stride, tl.int64)  # a stride of 1 is a Python int, which has no .to
    if SEGMENTED:
        start = tl.load(offsets_ptr + segment).to(tl.int64)
        tokens = (tl.load(offsets_ptr + segment + 1).to(tl.int64) - start).to(tl.int32)
        x_ptr += start * stride
        out_ptr += segment.to(tl.int64) * segment_stride
    row = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, BLOCK_T)
    left_ptr = x_ptr + row[:, None] + token[None, :] * stride  # transposed as it is read
    right_ptr = x_ptr + token[:, None] * stride + column[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begun in range(0, tokens, BLOCK_T):
        here = token < tokens - begun
        left = tl.load(left_ptr, mask=(row < channels)[:, None] & here[None, :], other=0.0)
        right = tl.load(right_ptr, mask=here[:, None] & (column < channels)[None, :], other=0.0)
        if WIDEN:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        left_ptr += BLOCK_T * stride
        right_ptr += BLOCK_T * stride
    # A part of the tile at a time: all of it, its old values and addresses overflow the registers.
    first_half, second_half = halves(total, BLOCK_M, BLOCK_N)
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


@Kernel
@no_type_check
def halves(x, M: tl.constexpr, N: tl.constexpr):
    """Left and right half of ``x [M, N]``."""
    return tl.split(tl.permute(tl.reshape(x, [M, 2, N // 2]), [0, 2, 1]))


@Kernel
@no_type_check
def tile_of(index, RATIO: tl.constexpr):
    """Block row and block column of a tile of the triangle, BLOCK_N being RATIO * BLOCK_M.

    Tiles are counted by RATIO block rows at a time, as long as each other: k such groups hold
    ``RATIO * k (k + 1) / 2`` tiles.
    """
    pair = index // RATIO
    k = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    k -= (k * (k + 1) // 2 > pair).to(tl.int32)  # a root may round either way
    k += ((k + 1) * (k + 2) // 2 <= pair).to(tl.int32)
    rest = index - RATIO * (k * (k + 1) // 2)
    return k * RATIO + rest % RATIO, rest // RATIO


@Kernel
@no_type_check
def gram_tma_kernel(
    left_desc,  # x [T, C] fp16 or bf16 in boxes [BLOCK_T, BLOCK_M]
    right_desc,  # x in boxes [BLOCK_T, BLOCK_N]
    out_desc,  # [C, C] fp32 in boxes [BLOCK_M, BLOCK_N / 4]
    tokens,
    REDUCE: tl.constexpr,  # add in L2; the interpreter cannot, and has no other program to heed
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # Only the triangle's tiles have programs. Rows and columns past the end are read as zeros and
    # not written. Each element has one program that adds to it: the order of additions is fixed.
    block_m, block_n = tile_of(tl.program_id(0), BLOCK_N // BLOCK_M)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for token in range(0, tokens, BLOCK_T):
        left = left_desc.load([token, block_m * BLOCK_M])
        right = right_desc.load([token, block_n * BLOCK_N])
        if WIDEN:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(left.T, right, total)
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    for i in tl.static_range(2):
        half = halves(total, BLOCK_M, BLOCK_N)[i]
        for j in tl.static_range(2):
            quarter = halves(half, BLOCK_M, BLOCK_N // 2)[j]
            start = block_n * BLOCK_N + (2 * i + j) * (BLOCK_N // 4)
            column = start + tl.arange(0, BLOCK_N // 4)
            quarter = tl.where(column[None, :] <= row[:, None], quarter, 0.0)
            place = [block_m * BLOCK_M, start]
            if REDUCE:
                out_desc.atomic_add(place, quarter)
            else:
                out_desc.store(place, out_desc.load(place) + quarter)


def precision(dtype: torch.dtype, hip: bool) -> str:
    """How tensor cores multiply: only fp32 inputs leave a choice.

    TF32 alone keeps 11 bits of a factor; three products of its parts keep 22, at a third of the
    speed. AMD's matrix cores multiply fp32 as it is.
    """
    return "tf32x3" if dtype == torch.float32 and not hip else "ieee"


def table_entry(x: torch.Tensor) -> str:
    """The tile kernel's name in the table of launch configurations for ``x [T, C]``.

    Rows that don't start at 16-byte addresses are read an element at a time, at an address each:
    large tiles would not fit in the registers then.
    """
    if x.dtype == torch.float32:
        return "gram_fp32"
    return "gram" if _aligned(x) else "gram_ragged"


def _aligned(x: torch.Tensor) -> bool:
    """Whether the rows of ``x`` start at 16-byte addresses and hold whole 16 bytes."""
    return x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0 and x.data_ptr() % 16 == 0


def gram_tiles(x: torch.Tensor, out: torch.Tensor, offsets: torch.Tensor | None = None) -> None:
    """Add to ``out [C, C]``, or to ``[E, C, C]`` with offsets [E + 1], by the tile kernel."""
    tokens, channels = x.shape
    config = launch_config(table_entry(x), x.device)
    places, segments, _ = segment_options(x, offsets)
    tiles = ceil_div(channels, config["BLOCK_M"]) * ceil_div(channels, config["BLOCK_N"])
    with torch.cuda.device_of(x):
        gram_kernel[(segments * tiles,)](
            x,
            out,
            places,
            tokens,
            channels,
            x.stride(0),
            out.stride(0),
            out.stride(-2),
            SEGMENTED=offsets is not None,
            PRECISION=precision(x.dtype, torch.version.hip is not None),
            WIDEN=interpreted(),
            **config,
        )


def gram_tma(x: torch.Tensor, out: torch.Tensor) -> None:
    """Add to ``out [C, C]`` with operands and sums carried by the tensor memory accelerator.

    For aligned 16-bit inputs on sm_90 and later; both addresses and row strides in whole 16 bytes.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    config = launch_config("gram_tma", x.device)
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    groups, ratio = ceil_div(x.shape[1], block_n), block_n // block_m
    with torch.cuda.device_of(x):
        gram_tma_kernel.run(
            ratio * groups * (groups + 1) // 2,
            TensorDescriptor.from_tensor(x, [config["BLOCK_T"], block_m]),
            TensorDescriptor.from_tensor(x, [config["BLOCK_T"], block_n]),
            TensorDescriptor.from_tensor(out, [block_m, block_n // 4]),
            x.shape[0],
            REDUCE=not interpreted(),
            WIDEN=interpreted(),
            **config,
        )


def gram_panels(x: torch.Tensor, out: torch.Tensor) -> None:
    """Add to ``out [C, C]`` by the library's matrix products, a panel of rows at a time.

    A panel of P rows goes past the diagonal by P^2 / 2 products; up to 16 panels of 1024 rows or
    more keep that to 6 % for a wide x, and the library busy. In each panel the square on the
    diagonal is multiplied apart, for what lies above it must not be touched.
    """
    wide: dict[str, Any] = {} if x.dtype == torch.float32 else {"out_dtype": torch.float32}
    channels = x.shape[1]
    panel = ceil_div(channels, max(1, min(16, channels // 1024)))
    for start in range(0, channels, panel):
        rows = slice(start, min(start + panel, channels))
        left = x[:, rows].T
        if start:
            before = out[rows, :start]
            torch.addmm(before, left, x[:, :start], out=before, **wide)
        out[rows, rows] += torch.mm(left, x[:, rows], **wide).tril_()


FORMS: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    "tiles": gram_tiles,
    "tma": gram_tma,
    "panels": gram_panels,
}
"""Ways to add the lower triangle of ``x^T x``, ``x [T, C]``, to ``out [C, C]`` fp32 on a GPU."""


def form_of(x: torch.Tensor) -> str:
    """The form for ``x [T, C]`` in one segment.

    16-bit inputs take the panels: by arithmetic they and the form for TMA are within 5 % of each
    other at 8192 tokens and more, and a tenth or more below the tiles; they know no alignment, and
    AMD's matrix cores, which read the tiles' transposed operand two bytes at a time, have them too.
    fp32 takes the tiles, since the library multiplies fp32 either without tensor cores or with 11
    bits of a factor. So does a CPU, under the interpreter: its library has no fp32 result of 16-bit
    factors.
    """
    return "panels" if x.is_cuda and x.dtype != torch.float32 else "tiles"


@kernel_op("gram", mutates_args=("out",))
def gram_op(x: torch.Tensor, out: torch.Tensor, offsets: torch.Tensor | None) -> None:
    """Add the lower triangle of ``x^T x``, ``x [T, C]``, to ``out [C, C]`` or ``[E, C, C]``."""
    if not x.numel():
        return
    if offsets is None:
        FORMS[form_of(x)](x, out)
    else:
        gram_tiles(x, out, offsets)


def gram(
    x: torch.Tensor,
    *,
    offsets: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Lower triangle of ``x^T x``.

    Args:
        x: [..., C] fp16, bf16 or fp32, unit stride along C. All other dimensions are tokens.
        offsets: [E + 1] segments of the tokens, as :func:`cfsp_kernels.channel_statistics` takes
            them.
        out: [C, C] fp32, with offsets [E, C, C], that the triangles are added to, for streaming
            over micro-batches. The tokens of a call are summed from zero, then added at once.
        backend: "torch", "triton" or None: ``$CFSP_BACKEND``, then the device of ``x``. On a GPU
            "triton" takes the form that :func:`form_of` names, a matrix product of torch's or a
            kernel.

    Returns:
        ``out``, or a new [C, C] or [E, C, C] fp32. Entries above a diagonal are not touched (0 when
        new). Over n tokens in all, an entry errs by at most n * 2^-23 of the sum of the absolute
        products; fp32 products are rounded to 22 bits on NVIDIA tensor cores. Other alignment may
        give other last bits.

    Raises:
        TypeError, ValueError: dtype, shape, strides or memory that the op does not take.
        RuntimeError: backend "triton" where it cannot run.
    """
    rows = as_rows("x", x)
    channels = rows.shape[1]
    shape: tuple[int, ...] = (channels, channels)
    if offsets is not None:
        check_offsets(offsets, rows)
        shape = (offsets.shape[0] - 1, *shape)
    if out is None:
        out = torch.zeros(shape, dtype=torch.float32, device=x.device)
    else:
        check_out("out", out, shape, torch.float32, rows, offsets)
    if use_triton("gram", x, backend):
        gram_op(rows, out.detach(), offsets)
    elif offsets is None:
        gram_reference(rows, out.detach())
    else:
        gram_segments_reference(rows, out.detach(), offsets)
    return out
