"""Argument checks shared by the ops. Each raises at the door and names the offending value.

Tensors are detached there too: no op has a gradient, and weights of a model require one.
"""

from collections.abc import Iterator

import torch

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_float(name: str, x: torch.Tensor) -> None:
    """``x`` is a tensor of a dtype that the kernels read."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
        raise TypeError(f"{name} must be one of {names}, got {str(x.dtype).removeprefix('torch.')}")


def as_rows(name: str, x: torch.Tensor) -> torch.Tensor:
    """View ``x [..., C]`` as ``[T, C]`` without a copy: unit stride along C, one row stride."""
    check_float(name, x)
    if x.ndim < 2:
        raise ValueError(f"{name} must be [..., channels] of 2 or more dimensions, got {x.ndim}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name} must have unit stride along channels, got strides {x.stride()}")
    x = x.detach()
    try:
        return x.view(-1, x.shape[-1]) if x.shape[-1] else x.reshape(0, 0)
    except RuntimeError:
        raise ValueError(
            f"{name} {tuple(x.shape)} with strides {x.stride()} has no single row stride; "
            "call .contiguous() first"
        ) from None


def as_matrix(name: str, x: torch.Tensor) -> torch.Tensor:
    """``x``, a float matrix with unit stride along its last dimension."""
    check_float(name, x)
    if x.ndim != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(x.shape)}")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"{name} must have unit stride along columns, got strides {x.stride()}")
    return x.detach()


def check_same(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """``x`` and ``other`` have the same shape, dtype and device."""
    for what in ("shape", "dtype", "device"):
        mine, theirs = getattr(x, what), getattr(other, what)
        if mine != theirs:
            raise ValueError(f"{name} and {other_name} differ in {what}: {mine} and {theirs}")


def check_index(index: torch.Tensor, size: int, weight: torch.Tensor) -> None:
    """``index`` is a vector of positions into a dimension of ``size``.

    The range is checked on the CPU only, and not in a compiled graph: on a device the check would
    wait for the stream, and in a graph it would break it.
    """
    if index.ndim != 1:
        raise ValueError(f"index must have 1 dimension, got shape {tuple(index.shape)}")
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"index must be int64 or int32, got {index.dtype}")
    if index.device != weight.device:
        raise ValueError(f"index is on {index.device}, weight on {weight.device}")
    if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
        low, high = index.aminmax()
        if low < 0 or high >= size:
            raise IndexError(f"index spans [{low}, {high}], outside a dimension of {size}")


def check_out(out: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> None:
    """``out`` can take a result of ``shape`` with the dtype and device of ``like``."""
    if tuple(out.shape) != shape or out.dtype != like.dtype or out.device != like.device:
        raise ValueError(
            f"out must be {shape} {like.dtype} on {like.device}, "
            f"got {tuple(out.shape)} {out.dtype} on {out.device}"
        )
    if out.ndim and out.shape[-1] > 1 and out.stride(-1) != 1:
        raise ValueError(f"out must have unit stride along columns, got strides {out.stride()}")


def row_chunks(rows: int, columns: int, elements: int = 1 << 18) -> Iterator[slice]:
    """Slices over ``rows`` of about ``elements`` elements each: bounds every temporary."""
    step = max(1, elements // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
