"""Kept rows or columns of a weight matrix as a compact tensor.

Bytes moved: gather_rows reads and writes the kept rows, ``2 * K * D * itemsize``. gather_columns
reads the whole source, as nearly every 32-byte sector holds a kept column, and writes
``D * K * itemsize``.
"""

import torch

from ._dispatch import use_triton
from ._validation import check_index, check_matrix, check_out


def gather_rows_reference(weight: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """``out[k] = weight[index[k]]``, bit for bit."""
    torch.index_select(weight, 0, index, out=out)


def gather_columns_reference(weight: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """``out[:, k] = weight[:, index[k]]``, bit for bit."""
    torch.index_select(weight, 1, index, out=out)


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
        backend: "torch", "triton" or None: ``$CFSP_BACKEND``, then the device of ``weight``.

    Returns:
        [K, C] with the dtype of ``weight``, equal to the source bit for bit.

    Raises:
        TypeError, ValueError, IndexError: dtype, shape, strides or range.
        RuntimeError: backend "triton" where it cannot run.
    """
    check_matrix("weight", weight)
    check_index(index, weight.shape[0], weight)
    shape = (index.numel(), weight.shape[1])
    if out is None:
        out = weight.new_empty(shape)
    else:
        check_out(out, shape, weight)
    use_triton("gather_rows", weight, backend)
    gather_rows_reference(weight, index, out)
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
    check_matrix("weight", weight)
    check_index(index, weight.shape[1], weight)
    shape = (weight.shape[0], index.numel())
    if out is None:
        out = weight.new_empty(shape)
    else:
        check_out(out, shape, weight)
    use_triton("gather_columns", weight, backend)
    gather_columns_reference(weight, index, out)
    return out
