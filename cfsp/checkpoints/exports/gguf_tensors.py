"""Tensors of a GGUF file: their types, their bytes, and the comparison after reading them back."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...errors import CfspError

GGUF_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}
"""Type of a file's matrices -> its number in ``general.file_type``."""
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROUNDING = {"F32": (0.0, 0.0), "F16": (2**-11, 2**-25), "BF16": (2**-8, 2**-134)}
"""Half a unit in the last place: relative to a value, and of the smallest ones."""
Q8_0_VALUES = 32  # of one scale
ROWS_AT_A_TIME = 4096  # so that no fp32 copy of a whole tensor is made


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to write, its shape as in torch."""

    source: str
    """Its name in the model."""
    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    type: str

    @classmethod
    def planned(cls, source: str, name: str, shape: tuple[int, ...], chosen: str) -> "GgufTensor":
        """Vectors are F32, as llama.cpp wants them; a matrix that Q8_0 cannot hold is F16."""
        if len(shape) == 1:
            chosen = "F32"
        elif chosen == "Q8_0" and shape[-1] % Q8_0_VALUES:
            chosen = "F16"
        return cls(source, name, shape, chosen)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

        kind = GGMLQuantizationType[self.type]
        return math.prod(quant_shape_to_byte_shape(self.shape, kind))


def gguf_bytes(tensor: GgufTensor, values: torch.Tensor) -> np.ndarray:
    """[nbytes] uint8, as they lie in the file; CfspError for a value that F16 cannot hold."""
    parts = [_encoded(part, tensor.type).reshape(-1) for part in values.split(ROWS_AT_A_TIME)]
    if tensor.type == "F16" and any(np.isinf(part.view(np.float16)).any() for part in parts):
        raise CfspError(f"{tensor.source} has values above 65504, too large for F16; use BF16")
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _encoded(values: torch.Tensor, kind: str) -> np.ndarray:
    if kind in STORED:
        return values.to(STORED[kind]).contiguous().view(torch.uint8).numpy()
    from gguf import GGMLQuantizationType, quants

    return quants.quantize(values.float().contiguous().numpy(), GGMLQuantizationType[kind])


def check_gguf_tensor(tensor: GgufTensor, found: Any, values: torch.Tensor) -> None:
    """RuntimeError where a tensor that was read back has another shape or type than the model's, or
    a value that is off by more than the type's precision."""
    from gguf import quants

    shape = tuple(int(size) for size in reversed(found.shape))
    if shape != tensor.shape or found.tensor_type.name != tensor.type:
        raise RuntimeError(f"{tensor.name} is {shape} {found.tensor_type.name} in the file")
    for first in range(0, len(values), ROWS_AT_A_TIME):
        rows = slice(first, first + ROWS_AT_A_TIME)
        decoded = torch.tensor(quants.dequantize(found.data[rows], found.tensor_type))
        expected = values[rows].float()
        if not bool(((decoded - expected).abs() <= _error(expected, tensor.type)).all()):
            raise RuntimeError(f"{tensor.name} differs from {tensor.source} after reading it back")


def _error(values: torch.Tensor, kind: str) -> torch.Tensor:
    """The largest error that rounding to a type makes."""
    if kind in ROUNDING:
        relative, least = ROUNDING[kind]
        return (values.abs() * relative).clamp(min=least)
    # Half a step of the block's scale, and 127 steps times the rounding of the scale to F16.
    largest = values.unflatten(-1, (-1, Q8_0_VALUES)).abs().amax(-1, keepdim=True)
    error = largest * (1 / 254 + 2**-11) * 1.01 + 127 * 2**-25
    return error.expand(*error.shape[:-1], Q8_0_VALUES).flatten(-2)
