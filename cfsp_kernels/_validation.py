"""Argument checks shared by the ops. Each raises at the door and names the offending value.

Tensors are detached there too: no op has a gradient, and weights of a model require one.
"""

from collections.abc import Iterator

import torch

from ._dispatch import is_concrete

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INDEX_DTYPES = (torch.int64, torch.int32)


def check_tensor(name: str, x: torch.Tensor) -> None:
    """``x`` is a tensor."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def check_float(name: str, x: torch.Tensor) -> None:
    """``x`` is a tensor of a dtype that the kernels read."""
    check_tensor(name, x)
    if x.dtype not in FLOAT_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
        raise TypeError(f"{name} must be one of {names}, got {str(x.dtype).removeprefix('torch.')}")


def as_rows(name: str, x: torch.Tensor) -> torch.Tensor:
    """View ``x [..., C]`` as ``[T, C]`` without a copy: unit stride along C, one row stride."""
    check_float(name, x)
    if x.ndim < 2:
        raise ValueError(f"{name} must be [..., channels] of 2 or more dimensions, got {x.ndim}")
    shape = x.shape
    if shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name} must have unit stride along channels, got strides {x.stride()}")
    x = x.detach() if x.requires_grad else x
    if len(shape) == 2:
        return x
    try:
        return x.view(-1 if shape[-1] else shape[:-1].numel(), shape[-1])
    except RuntimeError:
        raise ValueError(
            f"{name} {tuple(shape)} with strides {x.stride()} has no single row stride; "
            "call .contiguous() first"
        ) from None


def as_matrix(name: str, x: torch.Tensor, dimensions: int = 2) -> torch.Tensor:
    """``x``, a float matrix, or a batch of them, with unit stride along its last dimension."""
    check_float(name, x)
    if x.ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimensions, got shape {tuple(x.shape)}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name} must have unit stride along columns, got strides {x.stride()}")
    return x.detach() if x.requires_grad else x


def check_same(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """``x`` and ``other`` have the same shape, dtype and device."""
    for what in ("shape", "dtype", "device"):
        mine, theirs = getattr(x, what), getattr(other, what)
        if mine != theirs:
            raise ValueError(f"{name} and {other_name} differ in {what}: {mine} and {theirs}")


def check_vector(name: str, vector: torch.Tensor, device: torch.device) -> None:
    """``vector`` holds positions, on ``device``."""
    check_tensor(name, vector)
    if vector.ndim != 1:
        raise ValueError(f"{name} must have 1 dimension, got shape {tuple(vector.shape)}")
    if vector.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be int64 or int32, got {vector.dtype}")
    if vector.device != device:
        raise ValueError(f"{name} must be on {device}, got one on {vector.device}")


def check_index(index: torch.Tensor, size: int, weight: torch.Tensor) -> None:
    """``index`` is a vector of positions into a dimension of ``size``.

    The range is checked on the CPU only, and not in a compiled graph: on a device the check would
    wait for the stream, and in a graph it would break it.
    """
    check_vector("index", index, weight.device)
    if index.device.type == "cpu" and index.numel() and is_concrete(index):
        low, high = (int(value) for value in index.aminmax())
        if low < 0 or high >= size:
            raise IndexError(f"index spans [{low}, {high}], outside a dimension of {size}")


def check_offsets(offsets: torch.Tensor, rows: torch.Tensor) -> None:
    """``offsets`` are where segments of ``rows`` start, and where the last one ends.

    Their values are checked on the CPU only, as those of an index.
    """
    check_vector("offsets", offsets, rows.device)
    if not offsets.numel():
        raise ValueError("offsets must have a value more than there are segments, got none")
    if not offsets.is_contiguous():
        raise ValueError(f"offsets must be contiguous, got stride {offsets.stride(0)}")
    if offsets.device.type == "cpu" and is_concrete(offsets):
        first, last = int(offsets[0]), int(offsets[-1])
        if first != 0 or last > rows.shape[0] or (offsets.diff() < 0).any():
            raise ValueError(
                f"offsets must begin at 0, never fall and end at {rows.shape[0]} rows at most, "
                f"got {offsets.tolist() if len(offsets) < 9 else f'{first} to {last}'}"
            )


def check_out(
    name: str,
    out: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *inputs: torch.Tensor | None,
) -> None:
    """``out`` can take a result of ``shape`` on the device of the first input.

    No two of its elements share memory, and none with an input: a kernel's programs write in no
    order.
    """
    check_tensor(name, out)
    device = next(x.device for x in inputs if x is not None)
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != device:
        raise ValueError(
            f"{name} must be {shape} {dtype} on {device}, "
            f"got {tuple(out.shape)} {out.dtype} on {out.device}"
        )
    if out.ndim and out.shape[-1] > 1 and out.stride(-1) != 1:
        raise ValueError(f"{name} must have unit stride along columns, got strides {out.stride()}")
    if not out.is_contiguous() and _overlaps_itself(out):
        raise ValueError(f"{name} overlaps itself: strides {out.stride()}")
    check_apart(name, out, *inputs)


def check_apart(name: str, out: torch.Tensor, *others: torch.Tensor | None) -> None:
    """``out`` shares no memory with others. Unknown, and not an error, in a compiled graph."""
    if is_concrete(out) and any(x is not None and _overlap(out, x) for x in others):
        raise ValueError(f"{name} shares memory with another argument")


def _overlaps_itself(x: torch.Tensor) -> bool:
    """Whether a dimension of ``x`` steps within what the ones of shorter steps span."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors share memory. Windows of columns of one matrix do not; of what else is
    woven into one another, any is taken to."""
    start_a, start_b = a.data_ptr(), b.data_ptr()
    if start_b >= start_a + _extent(a) or start_a >= start_b + _extent(b):
        return False
    size, other = a.element_size(), b.element_size()
    pitch = a.stride(0) * size
    if a.ndim != 2 or b.ndim != 2 or not pitch or pitch != b.stride(0) * other:
        return True
    ahead = (start_b - start_a) % pitch
    return ahead < a.shape[1] * size or ahead + b.shape[1] * other > pitch


def _extent(x: torch.Tensor) -> int:
    """Bytes from the first element of ``x`` to the end of the last."""
    if not x.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


def chunk_elements(device: torch.device) -> int:
    """Elements of a reference's temporaries: 1 MiB of fp32 on a CPU, which its cache holds, and
    64 MiB on a GPU, which one launch should not be too short for."""
    return 1 << 18 if device.type == "cpu" else 1 << 24


def row_chunks(rows: int, columns: int, elements: int) -> Iterator[slice]:
    """Slices over ``rows`` of about ``elements`` elements each: bounds every temporary."""
    step = max(1, elements // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
