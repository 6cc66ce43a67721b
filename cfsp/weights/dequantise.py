"""Quantised weights as the numbers they stand for.

Every format that is read stores codes, and one scale for each block of rows and columns::

    weight[r, c] = (number(code[r, c]) - zero[r // R, c // C]) * scale[r // R, c // C]

A block of R x C is the whole matrix (per tensor), one row (per channel), part of a row (groups) or
a tile. The last blocks of rows and of columns may be partial: 576 rows are 4.5 blocks of 128.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from ..errors import CfspError

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the codes 0 to 7 of FP4 stand for; 8 to 15 are their negatives (OCP Microscaling Formats,
version 1.0, table 5)."""
SLAB = 1 << 22
"""Values that are in fp32 at a time: 16 MiB, however large the weight."""


def numbers(codes: torch.Tensor) -> torch.Tensor:
    """[n, C] codes that are numbers themselves, FP8 or int8, in fp32."""
    if codes.device.type != "cpu":
        return codes.float()
    # Three times as fast as a CPU's conversion of FP8.
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    return table.index_select(0, codes.view(torch.uint8).int().flatten()).view(codes.shape)


def _pairs(device: torch.device) -> torch.Tensor:
    """[256, 2]: the two FP4 numbers of each byte, that of its low half first."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([table[byte & 15], table[byte >> 4]], dim=1)


def fp4_numbers(codes: torch.Tensor) -> torch.Tensor:
    """[n, C / 2] uint8, two FP4 numbers a byte -> [n, C] fp32."""
    return torch.nn.functional.embedding(codes.int(), _pairs(codes.device)).flatten(1)


def packed_numbers(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[n, W] int32, each with 32 / bits numbers, the first in the lowest bits and all shifted by
    2^(bits - 1) to be 0 or more -> [n, W * 32 / bits] fp32; the end of a row may be padding."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=codes.device)
    unsigned = (codes[..., None] >> shifts) & ((1 << bits) - 1)
    return (unsigned - (1 << (bits - 1))).flatten(1).float()


CODES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "numbers": numbers,
    "fp4": fp4_numbers,
    "int4": partial(packed_numbers, bits=4),
    "int8": partial(packed_numbers, bits=8),
}
"""How a matrix of codes is stored -> the function that makes fp32 numbers of some of its rows."""


def scale_numbers(scales: torch.Tensor) -> torch.Tensor:
    """Scales in fp32; bytes are exponents: 2^(byte - 127), 255 is NaN (E8M0)."""
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()


@dataclass(frozen=True)
class Decoding:
    """How the parts of one weight become its values."""

    tensor: str
    """What an error calls it: "folder: name"."""
    codes: str
    """A name of :data:`CODES`."""
    shape: tuple[int, ...]
    """[R, C], or [E, R, C] of E experts, as the codes lie."""
    block: tuple[int, int]
    """Rows and columns that share a scale."""
    transposed: bool = False
    """The weight is [E, C, R]."""
    divided: bool = False
    """The scale of all is divided by, not multiplied with."""

    @property
    def result(self) -> tuple[int, ...]:
        """Shape of the weight."""
        *experts, rows, columns = self.shape
        return (*experts, columns, rows) if self.transposed else self.shape

    def __call__(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The weight, contiguous, of ``values`` with their ``scales``, maybe ``zeros`` and a
        ``global`` scale, on any device: computed in fp32, rounded once. Raises CfspError for a
        scale that is no number of 0 or more."""
        *experts, rows, columns = self.shape
        count = math.prod(experts)
        scales = self._scales(parts)
        zeros = self._zeros(parts)
        codes = parts["values"].reshape(count, rows, -1)
        weight = torch.empty(self.result, dtype=dtype, device=codes.device)
        by_rows = weight.view(count, *self.result[-2:])
        by_rows = by_rows.mT if self.transposed else by_rows
        step = max(1, SLAB // max(columns, 1))
        for expert in range(count):
            for start in range(0, rows, step):
                slab = slice(start, min(start + step, rows))
                found = CODES[self.codes](codes[expert, slab])[:, :columns]
                if zeros is not None:
                    found = found - self._spread(zeros[expert], slab)
                by_rows[expert, slab] = found.mul_(self._spread(scales[expert], slab))
        return weight

    @property
    def _grid(self) -> tuple[int, int, int]:
        """Experts, blocks of rows and blocks of columns."""
        *experts, rows, columns = self.shape
        return math.prod(experts), -(-rows // self.block[0]), -(-columns // self.block[1])

    def _on_grid(self, values: torch.Tensor) -> torch.Tensor:
        """One value a block: as stored, or the same for all or for an expert."""
        one = values.numel() != math.prod(self._grid)
        return (values.reshape(-1, 1, 1) if one else values.reshape(self._grid)).expand(self._grid)

    def _scales(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scales = self._on_grid(scale_numbers(parts["scales"]))
        sound = (scales >= 0).all()
        if "global" in parts:
            whole = parts["global"].float().reshape(-1, 1, 1)
            sound = sound & (whole >= 0).all()
            scales = scales / whole if self.divided else scales * whole
        if not bool(sound & scales.isfinite().all()):
            raise CfspError(f"{self.tensor}: its scales hold NaN, infinity or less than 0")
        return scales

    def _zeros(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Zero points; packed ones are packed by columns."""
        zeros = parts.get("zeros")
        if zeros is None:
            return None
        if zeros.dtype == torch.int32:
            zeros = CODES[self.codes](zeros.T.contiguous())[:, : self.shape[-2]].T
        return self._on_grid(zeros.float())

    def _spread(self, grid: torch.Tensor, slab: slice) -> torch.Tensor:
        """[blocks of rows, blocks of columns] -> the values of these rows, [n, C] or [n, 1]."""
        rows = torch.arange(slab.start, slab.stop, device=grid.device) // self.block[0]
        own = grid[rows]
        if grid.shape[1] == 1:
            return own
        return own.repeat_interleave(self.block[1], dim=1)[:, : self.shape[-1]]
