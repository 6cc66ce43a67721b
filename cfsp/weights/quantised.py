"""Placeholder until the formats come."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..io.safetensors import StoredTensor, TensorInfo


@dataclass(frozen=True)
class QuantisedTensor(TensorInfo):
    """A weight that is stored quantised."""

    parts: dict[str, StoredTensor]
    decode: Callable[[Mapping[str, torch.Tensor], torch.dtype], torch.Tensor]


def plain_tensors(
    where: str | Path, quantization: Mapping[str, Any] | None, tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor | QuantisedTensor]:
    return dict(tensors)
