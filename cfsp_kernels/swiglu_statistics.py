"""act(gate) * up and, in the same pass, the channel statistics of the product.

Bytes moved: gate and up read, the product written, ``3 * T * F * itemsize``. The statistics
cost no further bytes.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

from ._dispatch import use_triton
from ._validation import as_rows, check_same
from .channel_statistics import ROWS_PER_PARTIAL, ChannelStatistics

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: functional.relu(x).square(),
}


def swiglu_statistics_reference(
    gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, ChannelStatistics]:
    """``[T, F], [T, F] -> [T, F]`` in the input dtype, and the statistics of that product."""
    act = ACTIVATIONS[activation]
    product = torch.empty_like(gate, memory_format=torch.contiguous_format)
    total = torch.zeros(gate.shape[1], dtype=torch.float64, device=gate.device)
    squares = torch.zeros_like(total)
    for start in range(0, gate.shape[0], ROWS_PER_PARTIAL):
        rows = slice(start, start + ROWS_PER_PARTIAL)
        product[rows] = act(gate[rows]) * up[rows]
        part = product[rows].float()
        total += part.sum(0)
        squares += (part * part).sum(0)
    return product, ChannelStatistics(gate.shape[0], total, squares)


def swiglu_statistics(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str = "silu",
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, ChannelStatistics]:
    """The gated product of an FFN and its channel statistics, in one pass.

    Args:
        gate, up: [..., F] fp16, bf16 or fp32, unit stride along F, of one shape and dtype.
        activation: "silu", "gelu" (exact), "gelu_tanh" or "relu2".
        backend: "torch", "triton" or None: ``$CFSP_BACKEND``, then the device of ``gate``.

    Returns:
        (act(gate) * up with the shape and dtype of ``gate``, ChannelStatistics of it with
        fp64 sums [F]).

    Raises:
        TypeError, ValueError: dtype, shape, strides or activation that the op does not take.
        RuntimeError: backend "triton" where it cannot run.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    gate_rows, up_rows = as_rows("gate", gate), as_rows("up", up)
    check_same("gate", gate, "up", up)
    use_triton("swiglu_statistics", gate, backend)
    product, statistics = swiglu_statistics_reference(gate_rows, up_rows, activation)
    return product.view(gate.shape), statistics
