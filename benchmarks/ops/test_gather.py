"""Compaction of weights, bit for bit: ``pytest benchmarks/ops/test_gather.py``."""

from typing import Any, NamedTuple

import torch

from benchmarks.common.harness import OpBenchmark
from benchmarks.common.shapes import Shape
from benchmarks.common.timing import DEVICE
from cfsp_kernels import gather_columns, gather_ffn, gather_rows


class Inputs(NamedTuple):
    """A matrix and what to keep of it, as indices and as a mask."""

    weight: torch.Tensor
    kept: torch.Tensor
    mask: torch.Tensor
    out: torch.Tensor


def _kept(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    kept = torch.randperm(shape.intermediate)[: shape.kept()].sort().values.to(DEVICE)
    mask = torch.zeros(shape.intermediate, dtype=torch.bool, device=DEVICE)
    mask[kept] = True
    return kept, mask


def make_rows(shape: Shape) -> Inputs:
    """[F, D], of which 65 % of the rows stay."""
    weight = torch.randn(shape.intermediate, shape.hidden, dtype=shape.dtype, device=DEVICE)
    index, mask = _kept(shape)
    return Inputs(weight, index, mask, weight.new_empty(index.numel(), shape.hidden))


def make_columns(shape: Shape) -> Inputs:
    """[D, F], of which 65 % of the columns stay."""
    weight = torch.randn(shape.hidden, shape.intermediate, dtype=shape.dtype, device=DEVICE)
    index, mask = _kept(shape)
    return Inputs(weight, index, mask, weight.new_empty(shape.hidden, index.numel()))


def sample(result: torch.Tensor) -> torch.Tensor:
    """A few whole rows and columns of a gathered matrix."""
    result = result.detach()
    return torch.cat([result[:: max(1, result.shape[0] // 16)].flatten(), result[:, 0]]).float()


ROWS = OpBenchmark(
    op="gather_rows",
    make_inputs=make_rows,
    bytes_moved=lambda i: 2 * i.out.nbytes,
    implementations={
        "cfsp": lambda i: gather_rows(i.weight, i.kept, out=i.out),
        "eager": lambda i: i.weight[torch.where(i.mask)[0]],
        "torch op": lambda i: torch.index_select(i.weight, 0, i.kept, out=i.out),
    },
    compiled=lambda i: i.weight[i.kept],
    reference=lambda i: gather_rows(i.weight, i.kept, backend="torch"),
    digest=sample,
)

COLUMNS = OpBenchmark(
    op="gather_columns",
    make_inputs=make_columns,
    bytes_moved=lambda i: i.weight.nbytes + i.out.nbytes,
    implementations={
        "cfsp": lambda i: gather_columns(i.weight, i.kept, out=i.out),
        "eager": lambda i: i.weight[:, torch.where(i.mask)[0]],
        "torch op": lambda i: torch.index_select(i.weight, 1, i.kept, out=i.out),
    },
    compiled=lambda i: i.weight[:, i.kept],
    reference=lambda i: gather_columns(i.weight, i.kept, backend="torch"),
    digest=sample,
)


class Ffn(NamedTuple):
    """Three matrices of one FFN and its kept channels."""

    gate: torch.Tensor  # [F, D]
    up: torch.Tensor  # [F, D]
    down: torch.Tensor  # [D, F]
    kept: torch.Tensor
    mask: torch.Tensor


def make_ffn(shape: Shape) -> Ffn:
    """One FFN, of which 65 % of the channels stay."""
    gate = torch.randn(shape.intermediate, shape.hidden, dtype=shape.dtype, device=DEVICE)
    down = torch.randn(shape.hidden, shape.intermediate, dtype=shape.dtype, device=DEVICE)
    return Ffn(gate, torch.randn_like(gate), down, *_kept(shape))


def eager_ffn(f: Ffn) -> tuple[torch.Tensor, ...]:
    """As published code compacts a layer: one mask, looked up for each matrix."""
    return (
        f.gate[torch.where(f.mask)[0]],
        f.up[torch.where(f.mask)[0]],
        f.down[:, torch.where(f.mask)[0]],
    )


def torch_ffn(f: Ffn) -> tuple[torch.Tensor, ...]:
    """Three index_selects."""
    return (
        torch.index_select(f.gate, 0, f.kept),
        torch.index_select(f.up, 0, f.kept),
        torch.index_select(f.down, 1, f.kept),
    )


def _ffn_bytes(f: Ffn) -> int:
    kept = f.kept.numel() / f.mask.numel()
    return round(kept * (2 * f.gate.nbytes + 2 * f.up.nbytes + f.down.nbytes)) + f.down.nbytes


FFN = OpBenchmark(
    op="gather_ffn",
    make_inputs=make_ffn,
    bytes_moved=_ffn_bytes,
    implementations={
        "cfsp": lambda f: gather_ffn(f.gate, f.up, f.down, f.kept),
        "eager": eager_ffn,
        "torch op": torch_ffn,
    },
    compiled=lambda f: (f.gate[f.kept], f.up[f.kept], f.down[:, f.kept]),
    reference=lambda f: gather_ffn(f.gate, f.up, f.down, f.kept, backend="torch"),
    digest=lambda result: torch.cat([sample(matrix) for matrix in result]),
)

BENCHMARKS = [ROWS, COLUMNS, FFN]


def test_gather(measure: Any, spec: Any, shape: Shape, implementation: str) -> None:
    """Published code keeps a mask and looks its positions up for each matrix."""
    measure(spec, shape, implementation)
