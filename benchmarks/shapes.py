"""The problem sizes that are measured."""

from dataclasses import dataclass

import torch

WINDOW = 1024
"""Tokens per calibration window: published pruning code sees one window per call."""

WIDTH_MULTIPLE = 128


@dataclass(frozen=True)
class Shape:
    """One FFN and the calibration tokens that pass through it."""

    name: str
    tokens: int
    hidden: int
    intermediate: int
    dtype: torch.dtype
    gram_tokens: int
    """Tokens of one call of gram, which accumulates over micro-batches."""

    def kept(self, fraction: float = 0.65) -> int:
        """A kept width of about ``fraction``, rounded to the multiple that real plans use."""
        multiple = min(WIDTH_MULTIPLE, self.intermediate // 4)
        return max(multiple, round(self.intermediate * fraction / multiple) * multiple)


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("tiny", 64, 64, 128, torch.float32, 64),
        Shape("tinyllama-1.1b-fp32", 2048, 2048, 5632, torch.float32, 128),
        Shape("tinyllama-1.1b-bf16", 2048, 2048, 5632, torch.bfloat16, 128),
        Shape("llama-3-8b", 131072, 4096, 14336, torch.bfloat16, 16384),
        Shape("llama-3-70b", 131072, 8192, 28672, torch.bfloat16, 16384),
    )
}

DEFAULT_SHAPES = {
    "cpu": ("tinyllama-1.1b-fp32", "tinyllama-1.1b-bf16"),
    "cuda": ("llama-3-8b", "llama-3-70b"),
}
