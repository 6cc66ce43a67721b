"""The problem sizes that are measured."""

from dataclasses import dataclass

import torch

WINDOW = 1024
"""Tokens per calibration window: published pruning code sees one window per call."""

WIDTH_MULTIPLE = 128


@dataclass(frozen=True)
class Shape:
    """One FFN, or the experts of a block, and the tokens that pass through it in one call."""

    name: str
    tokens: int
    """With experts, the rows of all of them: each token once for every expert that it goes to."""
    hidden: int
    intermediate: int
    dtype: torch.dtype
    gram_tokens: int
    """Tokens of one call of gram; fewer on a CPU, where its arithmetic takes longest."""
    experts: int = 0
    """0: one dense FFN."""

    def kept(self, fraction: float = 0.65) -> int:
        """A kept width of about ``fraction``, rounded to the multiple that real plans use."""
        multiple = min(WIDTH_MULTIPLE, self.intermediate // 4)
        return max(multiple, round(self.intermediate * fraction / multiple) * multiple)


def _llama(model: str, hidden: int, intermediate: int, tokens: int) -> Shape:
    return Shape(f"{model}-{tokens}", tokens, hidden, intermediate, torch.bfloat16, tokens)


TOKENS = (8192, 1024, 16384, 131072)
"""Of a micro-batch of calibration, a hook's window, a chunk of a Gram matrix, and the limit."""

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("tiny", 64, 64, 128, torch.float32, 64),
        Shape("tiny-experts", 90, 32, 64, torch.float32, 90, experts=5),
        Shape("tinyllama-1.1b-fp32", 2048, 2048, 5632, torch.float32, 128),
        Shape("tinyllama-1.1b-bf16", 2048, 2048, 5632, torch.bfloat16, 128),
        Shape("granite-1b-a400m-fp32", 8192, 1024, 512, torch.float32, 8192, experts=32),
        *(_llama("llama-3-8b", 4096, 14336, tokens) for tokens in TOKENS),
        *(_llama("llama-3-70b", 8192, 28672, tokens) for tokens in TOKENS),
        # 8192 tokens, 8 of 128 experts each
        Shape("qwen3-30b-a3b-8192", 65536, 2048, 768, torch.bfloat16, 65536, experts=128),
    )
}

DEFAULT_SHAPES = {
    "cpu": ("tinyllama-1.1b-fp32", "tinyllama-1.1b-bf16", "granite-1b-a400m-fp32"),
    "cuda": ("llama-3-8b-8192", "llama-3-70b-8192", "qwen3-30b-a3b-8192"),
}
