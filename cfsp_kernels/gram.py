"""X^T X over tokens, lower triangle, accumulated in fp32 over micro-batches.

Work: ``T * C^2`` multiply-adds for the triangle, half of a full product.
"""

import torch

from ._dispatch import use_triton
from ._validation import as_rows, check_out

BLOCK = 512  # columns per block row of the triangle


def gram_reference(x: torch.Tensor, out: torch.Tensor) -> None:
    """Add the lower triangle of ``x^T x`` to ``out [C, C]`` fp32, block row by block row."""
    channels = x.shape[1]
    for start in range(0, channels, BLOCK):
        stop = min(start + BLOCK, channels)
        block = x[:, start:stop].float().T @ x[:, :stop].float()
        block[:, start:].tril_()
        out[start:stop, :stop] += block


def gram(
    x: torch.Tensor, *, out: torch.Tensor | None = None, backend: str | None = None
) -> torch.Tensor:
    """Lower triangle of ``x^T x``.

    Args:
        x: [..., C] fp16, bf16 or fp32, unit stride along C. All other dimensions are tokens.
        out: [C, C] fp32 that the triangle is added to, for streaming over micro-batches.
        backend: "torch", "triton" or None: ``$CFSP_BACKEND``, then the device of ``x``.

    Returns:
        ``out``, or a new [C, C] fp32. Entries above the diagonal are not touched (0 when new).

    Raises:
        TypeError, ValueError: dtype, shape or strides that the op does not read.
        RuntimeError: backend "triton" where it cannot run.
    """
    rows = as_rows("x", x)
    shape = (x.shape[-1], x.shape[-1])
    like = torch.empty(0, dtype=torch.float32, device=x.device)
    if out is None:
        out = torch.zeros(shape, dtype=torch.float32, device=x.device)
    else:
        check_out(out, shape, like)
    use_triton("gram", x, backend)
    gram_reference(rows, out)
    return out
