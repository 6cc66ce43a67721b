"""Quantisers in the plainest code, and the bf16 values that each of their results stands for.

They share no code with ``cfsp.weights``: tile by tile, bit by bit.
"""

from collections.abc import Callable

import torch

Stored = dict[str, torch.Tensor]
"""What a quantised weight adds to its name -> what is stored there."""
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP4 = torch.tensor([*E2M1, *(-value for value in E2M1)])


def tiled(
    weight: torch.Tensor,
    block: tuple[int, int],
    largest: float,
    round_: Callable[[torch.Tensor], torch.Tensor],
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[R, C] by tiles of ``block``, those at the ends smaller -> codes, scales, bf16 values."""
    rows, columns = weight.shape
    tops, lefts = range(0, rows, block[0]), range(0, columns, block[1])
    codes = torch.empty(weight.shape)
    values = torch.empty(weight.shape, dtype=torch.bfloat16)
    scales = torch.empty(len(tops), len(lefts), dtype=dtype)
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            tile = slice(top, top + block[0]), slice(left, left + block[1])
            part = weight[tile].float()
            scales[i, j] = max(part.abs().max().item() / largest, 2.0**-100)
            scale = scales[i, j].float().item()
            codes[tile] = round_(part / scale)
            values[tile] = (codes[tile] * scale).bfloat16()
    return codes, scales, values


def round_fp8(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def round_int(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return lambda numbers: numbers.round().clamp(least, most) + 0.0  # integers have no -0


def nearest_fp4(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers -> the codes, 0 to 15, of the nearest FP4 numbers."""
    return (numbers[..., None] - FP4).abs().argmin(-1)


def packed_fp4(codes: torch.Tensor) -> torch.Tensor:
    """[..., C] codes -> [..., C / 2] bytes, the first of two in the low half."""
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)


def packed_ints(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, C] -> [R, ceil(C * bits / 32)] int32, number by number; what is left of a row is 0."""
    each, offset = 32 // bits, 2 ** (bits - 1)
    rows = []
    for row in numbers.long().tolist():
        words = [0] * -(-len(row) // each)
        for n, number in enumerate(row):
            words[n // each] |= (number + offset) << (bits * (n % each))
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def fp8(
    weight: torch.Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[R, C] -> codes in FP8, scales of ``dtype`` by blocks, bf16 values."""
    codes, scales, values = tiled(weight, block, 448, round_fp8, dtype)
    return codes.to(torch.float8_e4m3fn), scales, values


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[E, C, R] -> blocks [E, R, C / 32, 16], scales [E, R, C / 32], bf16 values [E, C, R]."""
    groups = weight.mT.float().unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1).clamp(min=2.0**-100) / 6).log2().ceil()
    codes = nearest_fp4(groups / 2.0 ** exponents[..., None])
    values = (FP4[codes] * 2.0 ** exponents[..., None]).bfloat16().flatten(-2)
    return packed_fp4(codes), (exponents + 127).to(torch.uint8), values.mT.contiguous()


def nvfp4(
    weight: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """[R, C] -> bytes, FP8 scales [R, C / 16], the scale of all or its ``inverse``, bf16 values."""
    groups = weight.float().unflatten(-1, (-1, 16))
    whole = weight.float().abs().max() / (6 * 448)
    stored = 1 / whole if inverse else whole
    scales = (groups.abs().amax(-1) / 6 / whole).clamp(min=2.0**-6).to(torch.float8_e4m3fn)
    each = scales.float() / stored if inverse else scales.float() * stored
    codes = nearest_fp4(groups / each[..., None])
    values = (FP4[codes] * each[..., None]).bfloat16().flatten(-2)
    return packed_fp4(codes.flatten(-2)), scales, stored, values


def integers(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """[R, C] -> numbers, bf16 scales [R, groups], zero points of these or None, bf16 values."""
    if symmetric:
        largest = 2 ** (bits - 1) - 1
        found = tiled(weight, (1, group), largest, round_int(bits), torch.bfloat16)
        return found[0], found[1], None, found[2]
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    numbers, values = torch.empty(weight.shape), torch.empty(weight.shape, dtype=torch.bfloat16)
    count = -(-weight.shape[1] // group)
    scales = torch.empty(weight.shape[0], count, dtype=torch.bfloat16)
    zeros = torch.empty(weight.shape[0], count)
    for row in range(weight.shape[0]):
        for n in range(count):
            own = slice(n * group, (n + 1) * group)
            part = weight[row, own].float()
            low, high = min(part.min().item(), 0.0), max(part.max().item(), 1e-6)
            scales[row, n] = (high - low) / (most - least)
            scale = scales[row, n].float().item()
            zeros[row, n] = round(least - low / scale)
            numbers[row, own] = (part / scale + zeros[row, n]).round().clamp(least, most)
            values[row, own] = ((numbers[row, own] - zeros[row, n]) * scale).bfloat16()
    return numbers, scales, zeros, values
