"""Whether the parts of a quantised weight fit together, by their types and shapes alone."""

from collections.abc import Mapping

import torch

from ..errors import CfspError
from ..io.safetensors import TensorInfo
from .dequantise import Decoding

Parts = Mapping[str, TensorInfo]
"""Role -> what is stored: ``values`` and ``scales``, maybe ``zeros`` and a ``global`` scale;
``shape`` is what the weight is said to be."""
FLOAT8 = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
SCALES = (torch.float32, torch.bfloat16, torch.float16)
EXPONENTS = (torch.float8_e8m0fnu, torch.uint8)
"""Scales that are powers of two, a byte each."""
Block = tuple[int, int]


def kind_of(tensor: TensorInfo) -> str:
    """A dtype in the words of an error."""
    return str(tensor.dtype).removeprefix("torch.")


def float8(what: str, parts: Parts, blocks: tuple[Block | None, ...]) -> Decoding:
    """FP8 of a matrix or of the experts of a block, by the first of ``blocks`` that fits. None: one
    scale for all, for an expert, for each half of its fused gate and up, or for a row. A row of
    experts that lie together is not read: some store these transposed."""
    return _numbers(what, parts, FLOAT8, (*SCALES, *EXPONENTS), blocks)


def integers(what: str, parts: Parts, block: Block | None, zeros: bool) -> Decoding:
    """int8, with zero points where it is not symmetric."""
    decoding = _numbers(what, parts, (torch.int8,), SCALES, (block,), zeros=zeros)
    if "zeros" in parts:
        _check(what, parts, "zeros", (torch.int8,), parts["scales"].shape)
    return decoding


def packed(what: str, parts: Parts, bits: int, block: Block | None, zeros: bool) -> Decoding:
    """Integers of 4 or 8 bits in int32; zero points are packed by columns."""
    needed = ("zeros",) if zeros else ()
    _check_roles(what, parts, "scales", "shape", *needed, optional=("zeros",))
    shape, each = parts["shape"].shape, 32 // bits
    rows, columns = shape
    _check(what, parts, "values", (torch.int32,), (rows, -(-columns // each)))
    _check(what, parts, "scales", SCALES)
    decoding = Decoding(what, f"int{bits}", shape, _fitting(what, shape, parts["scales"], (block,)))
    if "zeros" in parts:
        groups = -(-columns // decoding.block[1])
        _check(what, parts, "zeros", (torch.int32,), (-(-rows // each), groups))
    return decoding


def nvfp4(what: str, parts: Parts, group: int, divided: bool = False) -> Decoding:
    """FP4, two a byte, with an FP8 scale for each group of a row and one for all, which ModelOpt
    multiplies with and compressed-tensors divides by."""
    _check_roles(what, parts, "scales", "global")
    _check(what, parts, "values", (torch.uint8,))
    *rows, half = parts["values"].shape
    shape = (*rows, 2 * half)
    _check(what, parts, "scales", (torch.float8_e4m3fn,))
    _check(what, parts, "global", (torch.float32,))
    whole = parts["global"].shape
    if whole not in ((), (1,), shape[:-2]):
        raise _unfit(what, shape, f"a global scale of {list(whole)}")
    return Decoding(
        what,
        "fp4",
        shape,
        _fitting(what, shape, parts["scales"], ((1, group),), one=False),
        divided=divided,
    )


def mxfp4(what: str, parts: Parts) -> Decoding:
    """The experts of gpt-oss, [E, R, C / 32, 16] bytes with a scale each 32 columns; its plain
    checkpoints have them transposed."""
    _check_roles(what, parts, "scales")
    _check(what, parts, "values", (torch.uint8,))
    stored = parts["values"].shape
    if len(stored) != 4 or stored[-1] != 16:
        raise CfspError(f"{what}: expected blocks of [E, R, C / 32, 16], got {list(stored)}")
    _check(what, parts, "scales", (torch.uint8,), stored[:-1])
    shape = (*stored[:2], 32 * stored[2])
    return Decoding(what, "fp4", shape, (1, 32), transposed=True)


def _numbers(
    what: str,
    parts: Parts,
    values: tuple[torch.dtype, ...],
    scales: tuple[torch.dtype, ...],
    blocks: tuple[Block | None, ...],
    zeros: bool | None = None,
) -> Decoding:
    """``zeros``: whether there must be zero points; None: there may be none."""
    needed = ("scales", "zeros") if zeros else ("scales",)
    _check_roles(what, parts, *needed, optional=() if zeros is None else ("zeros",))
    _check(what, parts, "values", values)
    _check(what, parts, "scales", scales)
    shape = parts["values"].shape
    return Decoding(what, "numbers", shape, _fitting(what, shape, parts["scales"], blocks))


def _check_roles(what: str, parts: Parts, *needed: str, optional: tuple[str, ...] = ()) -> None:
    for role in needed:
        if role not in parts:
            raise CfspError(f"{what} is stored as {kind_of(parts['values'])} without its {role}")
    for role in sorted(parts.keys() - {"values", *needed, *optional}):
        raise CfspError(f"{what} has an unexpected part, its {role}")


def _check(
    what: str,
    parts: Parts,
    role: str,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...] | None = None,
) -> None:
    part = parts[role]
    if part.dtype not in dtypes:
        raise CfspError(f"{what} has {role} in {kind_of(part)}, which its format has not")
    if shape is not None and part.shape != shape:
        raise _unfit(what, shape, f"{role} of {list(part.shape)}")


def _unfit(what: str, shape: tuple[int, ...], got: str) -> CfspError:
    return CfspError(f"{what}: {got} do not fit {list(shape)}")


def _fitting(
    what: str,
    shape: tuple[int, ...],
    scales: TensorInfo,
    blocks: tuple[Block | None, ...],
    one: bool = True,
) -> Block:
    """The block that gives a weight just these scales; ``one``: or there may be one for all."""
    if len(shape) in (2, 3):
        for block in blocks:
            found = _block(shape, scales.shape, block, one)
            if found is not None:
                return found
    tiles = [f"{block[0]} x {block[1]}" for block in blocks if block is not None]
    by = f" in blocks of {tiles[0]}" if tiles else ""
    raise CfspError(f"{what}: scales of {list(scales.shape)} do not fit {list(shape)}{by}")


def _block(
    shape: tuple[int, ...], scales: tuple[int, ...], block: Block | None, one: bool
) -> Block | None:
    experts, rows, columns = shape[:-2], *shape[-2:]
    if block is not None:
        down, along = -(-rows // block[0]), -(-columns // block[1])
        if scales in ((*experts, down, along), (*experts, down, 1, along, 1)):  # ModelOpt's
            return block
    elif not experts and scales in ((rows, 1), (rows,)):
        return 1, columns
    elif experts and scales == (*experts, 2, 1) and rows % 2 == 0:  # gate and up have their own
        return rows // 2, columns
    of_all = ((), (1,), experts) if block is not None else ((), (1,), experts, (*experts, 1, 1))
    return (rows, columns) if one and scales in of_all else None
