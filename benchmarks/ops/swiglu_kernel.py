"""silu(gate) * up as a Triton kernel without statistics: a rival, not a part of the package."""

from typing import no_type_check

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
@no_type_check
def _swiglu_kernel(
    gate_ptr,  # [n]
    up_ptr,  # [n]
    product_ptr,  # [n]
    n,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    gate = tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(product_ptr + offsets, product.to(product_ptr.dtype.element_ty), mask=mask)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for contiguous tensors of one shape and dtype."""
    if not (gate.is_contiguous() and up.is_contiguous()) or gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must be contiguous")
    product = torch.empty_like(gate)
    grid = (triton.cdiv(gate.numel(), BLOCK),)
    with torch.cuda.device_of(gate):
        _swiglu_kernel[grid](gate, up, product, gate.numel(), BLOCK=BLOCK, num_warps=8)
    return product
