"""All experts of a block in one call: ``pytest benchmarks/ops/test_experts.py``.

Rows lie one expert after the other, as grouped products leave them. "op per expert" calls the
package's op once for each, which the segmented form replaces.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from benchmarks.common.harness import OpBenchmark
from benchmarks.common.shapes import Shape
from benchmarks.common.timing import DEVICE
from benchmarks.ops.test_gram import add_product
from cfsp_kernels import channel_importance, gram, swiglu_statistics

Result = tuple[torch.Tensor, torch.Tensor]


def route(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """The expert of each row, sorted, and offsets [E + 1] int32: some have five times the rows."""
    popularity = torch.linspace(0.4, 2, shape.experts)
    expert = torch.multinomial(popularity, shape.tokens, replacement=True).sort().values
    counts = expert.bincount(minlength=shape.experts)
    offsets = functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return expert.to(DEVICE), offsets.to(DEVICE)


def segments(offsets: torch.Tensor) -> Iterator[slice]:
    """The rows of each expert. Waits for the device, as a loop over experts has to."""
    return (slice(start, end) for start, end in pairwise(offsets.tolist()))


class Rows(NamedTuple):
    """Outputs of gate and up, and the totals that every implementation adds to."""

    gate: torch.Tensor  # [T, F]
    up: torch.Tensor  # [T, F]
    expert: torch.Tensor  # [T]
    offsets: torch.Tensor  # [E + 1]
    totals: torch.Tensor  # [E, 2, F] fp64


def make_rows(shape: Shape) -> Rows:
    """Normal gate and up."""
    gate = torch.randn(shape.tokens, shape.intermediate, dtype=shape.dtype, device=DEVICE)
    totals = torch.zeros(shape.experts, 2, shape.intermediate, dtype=torch.float64, device=DEVICE)
    return Rows(gate, torch.randn_like(gate), *route(shape), totals)


def swiglu(r: Rows, backend: str | None = None) -> Result:
    """The op for all experts at once."""
    product, _ = swiglu_statistics(
        r.gate, r.up, offsets=r.offsets, totals=r.totals, backend=backend
    )
    return product, r.totals


def swiglu_per_expert(r: Rows) -> Result:
    """The op once for each expert."""
    product = torch.empty_like(r.gate)
    for rows, total in zip(segments(r.offsets), r.totals, strict=True):
        product[rows], _ = swiglu_statistics(r.gate[rows], r.up[rows], totals=total)
    return product, r.totals


def swiglu_eager(r: Rows) -> Result:
    """Per expert, the model's own product, then a hook that reads it again in fp32."""
    product = torch.empty_like(r.gate)
    for rows, total in zip(segments(r.offsets), r.totals, strict=True):
        product[rows] = functional.silu(r.gate[rows]) * r.up[rows]
        total[1] += torch.norm(product[rows].t().float(), p=2, dim=1) ** 2
    return product, r.totals


def swiglu_torch(r: Rows) -> Result:
    """Whole tensors, and sums by the expert of each row."""
    product = functional.silu(r.gate) * r.up
    wide = product.float()
    for position, values in enumerate((wide, wide * wide)):
        sums = torch.zeros(r.totals.shape[0], wide.shape[1], device=wide.device)
        r.totals[:, position] += sums.index_add(0, r.expert, values)
    return product, r.totals


class Moments(NamedTuple):
    """Activations and the running totals that every implementation adds to."""

    x: torch.Tensor  # [T, F]
    offsets: torch.Tensor  # [E + 1]
    out: torch.Tensor  # [E, F, F] fp32


def make_moments(shape: Shape) -> Moments:
    """Normal activations."""
    x = torch.randn(shape.gram_tokens, shape.intermediate, dtype=shape.dtype, device=DEVICE)
    out = torch.zeros(shape.experts, shape.intermediate, shape.intermediate, device=DEVICE)
    return Moments(x, route(shape)[1], out)


def gram_all(m: Moments, backend: str | None = None) -> torch.Tensor:
    """The op for all experts at once."""
    return gram(m.x, offsets=m.offsets, out=m.out, backend=backend)


def gram_per_expert(m: Moments) -> torch.Tensor:
    """The op once for each expert."""
    for rows, total in zip(segments(m.offsets), m.out, strict=True):
        gram(m.x[rows], out=total)
    return m.out


def gram_eager(m: Moments) -> torch.Tensor:
    """Per expert, an fp32 copy, the full product, a sum."""
    for rows, total in zip(segments(m.offsets), m.out, strict=True):
        wide = m.x[rows].t().float()
        total += wide.matmul(wide.t())
    return m.out


def gram_torch(m: Moments) -> torch.Tensor:
    """Per expert, the full product added in one call."""
    for rows, total in zip(segments(m.offsets), m.out, strict=True):
        add_product(m.x[rows], total)
    return m.out


class Weights(NamedTuple):
    """The experts of a block and their statistics."""

    gate: torch.Tensor  # [E, F, D]
    up: torch.Tensor  # [E, F, D]
    down: torch.Tensor  # [E, D, F]
    norms: torch.Tensor  # [E, F]


def make_weights(shape: Shape) -> Weights:
    """Random weights, positive norms."""

    def matrices(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(shape.experts, rows, columns, dtype=shape.dtype, device=DEVICE)

    return Weights(
        matrices(shape.intermediate, shape.hidden),
        matrices(shape.intermediate, shape.hidden),
        matrices(shape.hidden, shape.intermediate),
        torch.rand(shape.experts, shape.intermediate, device=DEVICE) + 0.5,
    )


def wanda(w: Weights, backend: str | None = None) -> torch.Tensor:
    """The op for all experts at once."""
    return channel_importance("wanda", **w._asdict(), backend=backend)


def wanda_per_expert(w: Weights) -> torch.Tensor:
    """The op once for each expert."""
    experts = (Weights(*matrices) for matrices in zip(*w, strict=True))
    return torch.stack([channel_importance("wanda", **one._asdict()) for one in experts])


def wanda_eager(w: Weights) -> torch.Tensor:
    """Per expert, the metric of every weight of each matrix, then its mean."""
    scores = []
    for gate, up, down, norms in zip(*w, strict=True):
        score = (torch.abs(down) * norms.reshape(1, -1)).mean(dim=0)
        for matrix in (gate, up):
            score = score + (torch.abs(matrix) * norms.reshape(-1, 1)).mean(dim=1)
        scores.append(score)
    return torch.stack(scores)


def wanda_torch(w: Weights) -> torch.Tensor:
    """Reductions of whole batches without a temporary: the norm leaves the sum."""
    norm = torch.linalg.vector_norm
    total = norm(w.down, 1, 1, dtype=torch.float32)
    for matrix in (w.gate, w.up):
        total = total + norm(matrix, 1, 2, dtype=torch.float32)
    return total / w.gate.shape[2] * w.norms


def wanda_compiled(w: Weights) -> torch.Tensor:
    """In fp32, for a compiler to fuse."""
    means = [w.down.float().abs().mean(1)]
    means += [matrix.float().abs().mean(2) for matrix in (w.gate, w.up)]
    return (means[0] + means[1] + means[2]) * w.norms


BENCHMARKS = [
    OpBenchmark(
        op="swiglu_statistics[experts]",
        experts=True,
        make_inputs=make_rows,
        tokens=lambda shape: shape.tokens,
        reset=lambda r: r.totals.zero_(),
        bytes_moved=lambda r: 3 * r.gate.nbytes,
        implementations={
            "cfsp": swiglu,
            "op per expert": swiglu_per_expert,
            "eager": swiglu_eager,
            "torch op": swiglu_torch,
        },
        compiled=swiglu_torch,
        reference=lambda r: swiglu(r, backend="torch"),
        digest=lambda result: result[1][:, 1],
    ),
    OpBenchmark(
        op="gram[experts]",
        experts=True,
        make_inputs=make_moments,
        tokens=lambda shape: shape.gram_tokens,
        reset=lambda m: m.out.zero_(),
        bytes_moved=lambda m: m.x.nbytes + m.out.nbytes,
        implementations={
            "cfsp": gram_all,
            "op per expert": gram_per_expert,
            "eager": gram_eager,
            "torch op": gram_torch,
        },
        compiled=None,  # the compiler cannot slice by what lies on the device
        reference=lambda m: gram_all(m, backend="torch"),
        digest=lambda out: out.tril()[:, :: max(1, out.shape[1] // 16)],
        multiply_adds=lambda m: m.x.numel() * (m.x.shape[1] + 1) // 2,
    ),
    OpBenchmark(
        op="channel_importance[wanda, experts]",
        experts=True,
        make_inputs=make_weights,
        bytes_moved=lambda w: w.gate.nbytes + w.up.nbytes + w.down.nbytes,
        implementations={
            "cfsp": wanda,
            "op per expert": wanda_per_expert,
            "eager": wanda_eager,
            "torch op": wanda_torch,
        },
        compiled=wanda_compiled,
        reference=lambda w: wanda(w, backend="torch"),
        digest=lambda score: score,
    ),
]


def test_experts(measure: Any, spec: Any, shape: Shape, implementation: str) -> None:
    """One launch for all experts, where a loop launches for each and waits for their sizes."""
    measure(spec, shape, implementation)
