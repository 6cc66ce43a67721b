"""Scores of channels from weights: ``pytest benchmarks/ops/test_channel_importance.py``.

Bytes are those of the matrices that a score reads, once each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.common.harness import OpBenchmark
from benchmarks.common.shapes import Shape
from benchmarks.common.timing import DEVICE
from cfsp_kernels import channel_importance


class Weights(NamedTuple):
    """One FFN and its statistics."""

    gate: torch.Tensor  # [F, D]
    up: torch.Tensor  # [F, D]
    down: torch.Tensor  # [D, F]
    norms: torch.Tensor  # [F]
    variance: torch.Tensor  # [F]


def make_inputs(shape: Shape) -> Weights:
    """Random weights, positive statistics."""

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, dtype=shape.dtype, device=DEVICE)

    return Weights(
        matrix(shape.intermediate, shape.hidden),
        matrix(shape.intermediate, shape.hidden),
        matrix(shape.hidden, shape.intermediate),
        torch.rand(shape.intermediate, device=DEVICE) + 0.5,
        torch.rand(shape.intermediate, device=DEVICE) + 0.5,
    )


def ours(score: str, backend: str | None = None) -> Callable[[Weights], torch.Tensor]:
    """The op with the matrices that the published score reads."""

    def call(w: Weights) -> torch.Tensor:
        if score == "magnitude":
            return channel_importance(score, gate=w.gate, up=w.up, down=w.down, backend=backend)
        if score == "flap":
            return channel_importance(score, down=w.down, variance=w.variance, backend=backend)
        if score in ("wanda", "eq8"):
            return channel_importance(score, down=w.down, norms=w.norms, backend=backend)
        return channel_importance(
            score, gate=w.gate, up=w.up, down=w.down, norms=w.norms, backend=backend
        )

    return call


def magnitude(w: Weights) -> torch.Tensor:
    """Magnitude-sp with all three matrices: fp32 squares of each, summed per channel."""
    score = torch.sum(torch.pow(w.down.float(), 2), dim=0)
    for matrix in (w.gate, w.up):
        score = score + torch.sum(torch.pow(matrix.float(), 2), dim=1)
    return score.sqrt()


def magnitude_op(w: Weights) -> torch.Tensor:
    """Norms without a temporary."""
    norms = [torch.linalg.vector_norm(w.down, 2, 0, dtype=torch.float32)]
    norms += [torch.linalg.vector_norm(m, 2, 1, dtype=torch.float32) for m in (w.gate, w.up)]
    return torch.linalg.vector_norm(torch.stack(norms), 2, 0)


def wanda(w: Weights) -> torch.Tensor:
    """Wanda-sp: the metric of every weight, then its mean over rows."""
    return (torch.abs(w.down) * w.norms.reshape(1, -1)).mean(dim=0)


def flap(w: Weights) -> torch.Tensor:
    """FLAP: variance times the squared column norm, in the dtype of the weights."""
    return w.variance * torch.sum(torch.pow(w.down, 2), dim=0)


def eq8(w: Weights) -> torch.Tensor:
    """Each row of down shares out one, weighted by the relative norm."""
    magnitude = w.down.float().abs()
    share = magnitude / magnitude.sum(dim=1, keepdim=True)
    return (share * (w.norms / w.norms.norm())).sum(dim=0)


def balanced(w: Weights) -> torch.Tensor:
    """Three normalised matrices, each a temporary of its own."""
    weighted = w.down.float().abs() * w.norms
    score = (weighted / weighted.sum(dim=1, keepdim=True)).sum(dim=0)
    relative = w.norms / w.norms.mean()
    for matrix in (w.gate, w.up):
        magnitude = matrix.float().abs()
        score = score + relative * (magnitude / magnitude.sum(dim=0)).sum(dim=1)
    return score


def wanda_op(w: Weights) -> torch.Tensor:
    """A column reduction without a temporary: the norm leaves the sum."""
    return torch.linalg.vector_norm(w.down, 1, 0, dtype=torch.float32) / w.down.shape[0] * w.norms


def flap_op(w: Weights) -> torch.Tensor:
    """Likewise for squares."""
    return torch.linalg.vector_norm(w.down, 2, 0, dtype=torch.float32) ** 2 * w.variance


def eq8_op(w: Weights) -> torch.Tensor:
    """The weighted column sum as a product of a vector and the magnitudes."""
    totals = torch.linalg.vector_norm(w.down, 1, 1, dtype=torch.float32)
    column_sums = (1 / totals).to(w.down.dtype) @ w.down.abs()
    return column_sums.float() * (w.norms / w.norms.norm())


def balanced_op(w: Weights) -> torch.Tensor:
    """Vector products throughout; the magnitudes are the one kind of temporary left."""
    magnitude, norms = w.down.abs(), w.norms.to(w.down.dtype)
    score = ((1 / (magnitude @ norms)) @ magnitude).float() * w.norms
    relative = w.norms / w.norms.mean()
    for matrix in (w.gate, w.up):
        magnitude = matrix.abs()
        totals = torch.linalg.vector_norm(matrix, 1, 0, dtype=torch.float32)
        score = score + relative * (magnitude @ (1 / totals).to(matrix.dtype)).float()
    return score


def wanda_compiled(w: Weights) -> torch.Tensor:
    """In fp32, for a compiler to fuse."""
    return (w.down.float().abs() * w.norms).mean(0)


def flap_compiled(w: Weights) -> torch.Tensor:
    """In fp32, for a compiler to fuse."""
    return w.down.float().square().sum(0) * w.variance


RIVALS: dict[str, tuple[Any, Any, Any]] = {
    "magnitude": (magnitude, magnitude_op, magnitude),
    "wanda": (wanda, wanda_op, wanda_compiled),
    "flap": (flap, flap_op, flap_compiled),
    "eq8": (eq8, eq8_op, eq8),
    "balanced": (balanced, balanced_op, balanced),
}


def _bytes(score: str) -> Callable[[Weights], int]:
    if score in ("magnitude", "balanced"):
        return lambda w: w.gate.nbytes + w.up.nbytes + w.down.nbytes
    return lambda w: w.down.nbytes


BENCHMARKS = [
    OpBenchmark(
        op=f"channel_importance[{score}]",
        make_inputs=make_inputs,
        bytes_moved=_bytes(score),
        implementations={"cfsp": ours(score), "eager": eager, "torch op": torch_op},
        compiled=compiled,
        reference=ours(score, backend="torch"),
        digest=lambda score: score,
    )
    for score, (eager, torch_op, compiled) in RIVALS.items()
]


def test_channel_importance(measure: Any, spec: Any, shape: Shape, implementation: str) -> None:
    """Published code makes elementwise temporaries of whole matrices."""
    measure(spec, shape, implementation)
