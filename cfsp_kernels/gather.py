"""Kept rows or columns of a weight matrix as a compact tensor.

Bytes moved: gather_rows reads and writes the kept rows, ``2 * K * D * itemsize``. gather_columns
reads the whole source, as nearly every 32-byte sector holds a kept column, and writes
``D * K * itemsize``. gather_ffn is two of the former and one of the latter.

gather_rows is torch's ``index_select`` on either backend: it copies contiguous rows, which leaves
a kernel of our own nothing to save. Columns are another matter: ``index_select`` loads an int64
index for every element, the kernel one int32 index for several rows.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch

from ._configs import launch_config
from ._dispatch import kernel_op, use_triton
from ._triton import Kernel, ceil_div, tl
from ._validation import as_matrix, check_apart, check_index, check_out, check_tensor


def gather_rows_reference(weight: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """``out[k] = weight[index[k]]``, bit for bit."""
    torch.index_select(weight, 0, index, out=out)


def gather_columns_reference(weight: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """``out[:, k] = weight[:, index[k]]``, bit for bit."""
    if weight.device.type == "cpu" and weight.element_size() == 2:
        # Twice as fast there; as integers, since gather changes the bits of a NaN.
        index = index.long().expand(weight.shape[0], -1)
        torch.gather(weight.view(torch.int16), 1, index, out=out.view(torch.int16))
    else:
        torch.index_select(weight, 1, index, out=out)


@Kernel
@no_type_check
def gather_columns_kernel(
    weight_ptr,  # [R, C] of any dtype, unit stride along C
    index_ptr,  # [K] int32 or int64
    out_ptr,  # [R, K] of the dtype of weight, unit stride along K
    rows,
    kept,
    weight_stride,
    out_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Neighbouring programs share rows, so that the sectors at their border are read once.
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(kept, BLOCK_K)
    k = (program % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = (program // blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.load(index_ptr + k, mask=k < kept, other=0)
    mask = (row < rows)[:, None] & (k < kept)[None, :]
    values = tl.load(weight_ptr + row[:, None] * weight_stride + column[None, :], mask=mask)
    tl.store(out_ptr + row[:, None] * out_stride + k[None, :], values, mask=mask)


@kernel_op("gather_columns", mutates_args=("out",))
def gather_columns_op(weight: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """``out[:, k] = weight[:, index[k]]``, bit for bit."""
    rows, kept = out.shape
    if not out.numel():
        return
    config = launch_config("gather_columns", weight.device)
    if weight.shape[1] < 2**31:
        index = index.to(torch.int32)
    grid = (ceil_div(kept, config["BLOCK_K"]) * ceil_div(rows, config["BLOCK_R"]),)
    with torch.cuda.device_of(weight):
        gather_columns_kernel[grid](
            weight, index.contiguous(), out, rows, kept, weight.stride(0), out.stride(0), **config
        )


def _new_or_checked(
    out: torch.Tensor | None, shape: tuple[int, int], weight: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """``out`` if it fits, or a new tensor."""
    if out is None:
        return weight.new_empty(shape)
    check_out("out", out, shape, weight.dtype, weight, index)
    return out


def gather_rows(
    weight: torch.Tensor,
    index: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Rows ``index`` of ``weight``, in that order.

    Args:
        weight: [R, C] fp16, bf16 or fp32 with unit stride along C.
        index: [K] int64 or int32 in [0, R). Checked on the CPU; on a device it is the caller's.
        out: [K, C] to write to, or None for a new tensor.
        backend: "torch", "triton" or None, checked as in every op. All of them run torch's
            ``index_select``: there is no Triton kernel for rows.

    Returns:
        [K, C] with the dtype of ``weight``, equal to the source bit for bit.

    Raises:
        TypeError, ValueError, IndexError: dtype, shape, strides or range.
        RuntimeError: backend "triton" where it cannot run.
    """
    weight = as_matrix("weight", weight)
    check_index(index, weight.shape[0], weight)
    out = _new_or_checked(out, (index.numel(), weight.shape[1]), weight, index)
    use_triton("gather_rows", weight, backend)
    gather_rows_reference(weight, index, out.detach())
    return out


def gather_columns(
    weight: torch.Tensor,
    index: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Columns ``index`` of ``weight``, in that order.

    Args:
        weight: [R, C] fp16, bf16 or fp32 with unit stride along C.
        index: [K] int64 or int32 in [0, C). Checked on the CPU; on a device it is the caller's.
        out: [R, K] to write to, or None for a new tensor.
        backend: "torch", "triton" or None: ``$CFSP_BACKEND``, then the device of ``weight``.

    Returns:
        [R, K] with the dtype of ``weight``, equal to the source bit for bit.

    Raises:
        TypeError, ValueError, IndexError: dtype, shape, strides or range.
        RuntimeError: backend "triton" where it cannot run.
    """
    weight = as_matrix("weight", weight)
    check_index(index, weight.shape[1], weight)
    out = _new_or_checked(out, (weight.shape[0], index.numel()), weight, index)
    if use_triton("gather_columns", weight, backend):
        gather_columns_op(weight, index, out.detach())
    else:
        gather_columns_reference(weight, index, out.detach())
    return out


class CompactFFN(NamedTuple):
    """The weights of an FFN that keeps K of its channels."""

    gate: torch.Tensor | None
    """[K, D], or None for an FFN without a gate."""
    up: torch.Tensor
    """[K, D]."""
    down: torch.Tensor
    """[D, K]."""


def gather_ffn(
    gate: torch.Tensor | None,
    up: torch.Tensor,
    down: torch.Tensor,
    index: torch.Tensor,
    *,
    out: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor] | None = None,
    backend: str | None = None,
) -> CompactFFN:
    """Channels ``index`` of an FFN: rows of gate and up, columns of down, in that order.

    Args:
        gate: [F, D] fp16, bf16 or fp32 with unit stride along D, or None: an FFN without one.
        up: [F, D] likewise.
        down: [D, F] likewise, with unit stride along F.
        index: [K] int64 or int32 in [0, F). Checked on the CPU; on a device it is the caller's.
        out: (gate [K, D] or None, up [K, D], down [D, K]) to write to, a CompactFFN for
            instance, or None for new tensors. Buffers serve for any number of blocks.
        backend: "torch", "triton" or None: ``$CFSP_BACKEND``, then the device of ``down``.

    Returns:
        CompactFFN, each with the dtype of its source and equal to it bit for bit.

    Raises:
        TypeError, ValueError, IndexError: dtype, shape, strides or range.
        RuntimeError: backend "triton" where it cannot run.
    """
    for name, matrix in (("gate", gate), ("up", up), ("down", down)):
        if matrix is None:
            if name == "gate":
                continue
            raise TypeError(f"{name} must be a tensor, got None")
        as_matrix(name, matrix)
        channels = matrix.shape[1 if name == "down" else 0]
        width = matrix.shape[0 if name == "down" else 1]
        if (channels, width) != tuple(up.shape):
            raise ValueError(
                f"{name} has {channels} channels of width {width}, up has {up.shape[0]} "
                f"of width {up.shape[1]}"
            )
    gate_out, up_out, down_out = outs = (None, None, None) if out is None else out
    if gate is None and gate_out is not None:
        raise ValueError("out has a gate, the FFN has none")
    for place, given in enumerate(outs):
        if given is not None:
            check_tensor("out", given)
            check_apart("out", given, gate, up, down, *outs[:place])
    return CompactFFN(
        None if gate is None else gather_rows(gate, index, out=gate_out, backend=backend),
        gather_rows(up, index, out=up_out, backend=backend),
        gather_columns(down, index, out=down_out, backend=backend),
    )
