"""Importance of every FFN channel from its weights and activations.

Every score is made of three reductions of matrices, which either backend has; the scores are
written once on top of them.

Bytes moved: each given matrix once, ``F * D * itemsize``, for magnitude, wanda and flap. A share
of a total needs the total first, so two walks: of down for eq8 and of every matrix for balanced.
Both come from DRAM, unless the matrix fits in L2. (gate and up could not do better: their totals
run over the whole matrix. Keeping a panel of a few rows of down in L2 between its two walks would
save one read of it, and cost as much in partial sums of F columns per panel.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple, no_type_check

import torch

from ._configs import launch_config
from ._dispatch import kernel_op, use_triton
from ._partials import ROWS_PER_PARTIAL, fold_partials
from ._triton import Kernel, ceil_div, tl
from ._validation import as_matrix, check_tensor, chunk_elements, row_chunks

Matrices = Sequence[torch.Tensor]


class Reductions(NamedTuple):
    """Sums over the entries of every channel, of one FFN or each of E: [F] or [E, F] fp64."""

    sums: Callable[[Matrices, torch.Tensor | None, bool], torch.Tensor]
    """(gate and up as given, down or None, square): of absolute values, or squares. Channels are
    rows of gate and up, and columns of down."""
    input_shares: Callable[[Matrices], torch.Tensor]
    """(gate, up or both): sum_j |W[i, j]| / sum_i' |W[i', j]|. Every column shares out one."""
    output_shares: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    """(down, fp32 norms n or None for 1): sum_j |W[j, i]| / sum_i' |W[j, i']| n_i'. With n_i, every
    row shares out one."""


def importance(
    reductions: Reductions,
    score: str,
    inputs: Matrices,
    down: torch.Tensor | None,
    statistic: torch.Tensor,
) -> torch.Tensor:
    """The specification of every score; see :func:`channel_importance`.

    Args:
        reductions: a backend's.
        score: a name of :data:`SCORES`.
        inputs: of gate and up those that are given, [F, D] or [E, F, D].
        down: [D, F] or [E, D, F], or None.
        statistic: [F] or [E, F] fp32 or fp64, what :data:`SCORES` names; magnitude ignores it.

    Returns:
        [F] or [E, F] fp64.
    """
    match score:
        case "magnitude":
            return reductions.sums(inputs, down, True).sqrt()
        case "wanda":
            width = inputs[0].shape[-1] if down is None else down.shape[-2]
            return reductions.sums(inputs, down, False) * statistic / width
        case "flap":
            return reductions.sums(inputs, down, True) * statistic
        case "eq8":
            if down is None:
                return torch.full_like(statistic, len(inputs), dtype=torch.float64)
            norm = torch.linalg.vector_norm(statistic, dim=-1, keepdim=True, dtype=torch.float64)
            shares = reductions.output_shares(down, None)
            return shares * statistic / norm.clamp_min(1e-30) + len(inputs)
        case _:  # balanced
            terms = []
            if inputs:
                mean = statistic.mean(dim=-1, keepdim=True, dtype=torch.float64)
                terms.append(reductions.input_shares(inputs) / mean.clamp_min(1e-30))
            if down is not None:
                norms = statistic.float().contiguous()
                terms.append(reductions.output_shares(down, norms))
            return sum(terms[1:], terms[0]) * statistic


def _chunks(matrix: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Some rows of ``matrix`` after another: which, their values in fp32, and as much memory to put
    results in, which may be where the values are."""
    height, width = matrix.shape
    chunks = list(row_chunks(height, width, chunk_elements(matrix.device)))
    step = chunks[0].stop if chunks else 0
    buffer = torch.empty(step, width, dtype=torch.float32, device=matrix.device)
    for rows in chunks:
        values, room = matrix[rows], buffer[: rows.stop - rows.start]
        yield rows, values if values.dtype == torch.float32 else room.copy_(values), room


def _row_sums(matrix: torch.Tensor, square: bool, weight: torch.Tensor | None) -> torch.Tensor:
    """``[R, C] -> [R]`` fp64 of absolute values weighted by ``[C]`` fp32, or of squares."""
    sums = torch.zeros(matrix.shape[0], dtype=torch.float64, device=matrix.device)
    for rows, values, room in _chunks(matrix):
        if square:
            sums[rows] = torch.linalg.vector_norm(values, dim=1).double().square()
        else:
            part = torch.abs(values, out=room)
            sums[rows] = part.sum(1) if weight is None else part @ weight
    return sums


def _column_sums(matrix: torch.Tensor, square: bool = False) -> torch.Tensor:
    """``[R, C] -> [C]`` fp64."""
    total = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for _, values, room in _chunks(matrix):
        total += (torch.square if square else torch.abs)(values, out=room).sum(0)
    return total


def _reciprocal(total: torch.Tensor) -> torch.Tensor:
    """1 / total in fp32, finite for a total of 0, whose terms are 0."""
    return total.clamp_min(1e-30).reciprocal().float()


def torch_sums(inputs: Matrices, down: torch.Tensor | None, square: bool) -> torch.Tensor:
    """:attr:`Reductions.sums`: fp32 over a few rows, fp64 over all."""
    first = inputs[0] if down is None else down
    if first.ndim == 3:
        downs = [None] * len(first) if down is None else down
        experts = zip(*inputs, downs, strict=True)
        return torch.stack([torch_sums(gate_up, d, square) for *gate_up, d in experts])
    parts = [_row_sums(matrix, square, None) for matrix in inputs]
    parts += [] if down is None else [_column_sums(down, square)]
    return torch.stack(parts).sum(0)


def torch_input_shares(matrices: Matrices) -> torch.Tensor:
    """:attr:`Reductions.input_shares`, in two walks over each matrix."""
    if matrices[0].ndim == 3:
        return torch.stack([torch_input_shares(e) for e in zip(*matrices, strict=True)])
    parts = [_row_sums(m, False, _reciprocal(_column_sums(m))) for m in matrices]
    return torch.stack(parts).sum(0)


def torch_output_shares(down: torch.Tensor, norms: torch.Tensor | None) -> torch.Tensor:
    """:attr:`Reductions.output_shares`, in one walk: a few rows are complete."""
    if down.ndim == 3:
        weights = [None] * len(down) if norms is None else norms
        return torch.stack([torch_output_shares(*e) for e in zip(down, weights, strict=True)])
    total = torch.zeros(down.shape[1], dtype=torch.float64, device=down.device)
    for _, values, room in _chunks(down):
        part = torch.abs(values, out=room)
        of_rows = part.sum(1) if norms is None else part @ norms
        total += _reciprocal(of_rows) @ part
    return total


TORCH = Reductions(torch_sums, torch_input_shares, torch_output_shares)


@Kernel
@no_type_check
def row_sums_kernel(
    matrix_ptr,  # [E, R, C] fp16, bf16 or fp32, unit stride along C
    weight_ptr,  # [E, C] fp32, contiguous, read if WEIGHTED
    out_ptr,  # [E, R] fp32: sum_c f(matrix[e, r, c]) * weight[e, c]
    rows,
    columns,
    matrix_stride,
    row_stride,
    SQUARE: tl.constexpr,  # f is the square, else the absolute value
    WEIGHTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(rows, BLOCK_R)
    expert = program // blocks
    row = (program % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    matrix_ptr += expert * matrix_stride
    weight_ptr += expert * columns
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, columns, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = column < columns
        mask = (row < rows)[:, None] & inside[None, :]
        pointers = matrix_ptr + row[:, None] * row_stride + column[None, :]
        x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        if SQUARE:
            x *= x
        else:
            x = tl.abs(x)
        if WEIGHTED:
            x *= tl.load(weight_ptr + column, mask=inside, other=0.0)[None, :]
        total += x
    tl.store(out_ptr + expert * rows + row, tl.sum(total, 1), mask=row < rows)


@Kernel
@no_type_check
def column_sums_kernel(
    matrix_ptr,  # [E, R, C] fp16, bf16 or fp32, unit stride along C
    weight_ptr,  # [E, R] fp32, contiguous, read if WEIGHTED
    partials_ptr,  # [N, E, C] fp32: sum over ROWS rows of f(matrix[e, r, c]) * weight[e, r]
    rows,
    columns,
    experts,
    matrix_stride,
    row_stride,
    SQUARE: tl.constexpr,  # f is the square, else the absolute value
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(columns, BLOCK_C)
    column = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    expert = program // blocks % experts
    partial = program // blocks // experts
    inside = column < columns
    row = partial * ROWS + tl.arange(0, BLOCK_R)
    matrix_ptr += expert * matrix_stride
    weight_ptr += expert * rows
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for _ in range(0, ROWS, BLOCK_R):
        mask = (row < rows)[:, None] & inside[None, :]
        pointers = matrix_ptr + row[:, None] * row_stride + column[None, :]
        x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        if SQUARE:
            x *= x
        else:
            x = tl.abs(x)
        if WEIGHTED:
            x *= tl.load(weight_ptr + row, mask=row < rows, other=0.0)[:, None]
        total += x
        row += BLOCK_R
    out = partials_ptr + (partial * experts + expert) * columns + column
    tl.store(out, tl.sum(total, 0), mask=inside)


Weighted = tuple[torch.Tensor, torch.Tensor | None]
"""A matrix and fp32 weights of the entries of its rows or columns, or None for 1."""


def _launch(
    by_row: Sequence[Weighted],
    by_column: Weighted | None,
    square: bool = False,
    reciprocal: bool = False,
) -> torch.Tensor:
    """Weighted sums for channels that are rows of some matrices, and columns of one.

    A launch for each of the matrices, and one that adds up. With ``reciprocal``, 1 / sum in fp32,
    finite for a sum of 0.
    """
    first = by_row[0][0] if by_column is None else by_column[0]
    device = first.device
    *batch, height, width = first.shape
    channels = height if by_column is None else width
    experts = batch[0] if batch else 1
    splits = 0 if by_column is None else ceil_div(height, ROWS_PER_PARTIAL)
    shape = (len(by_row) + splits, experts, channels)
    partials = torch.empty(shape, dtype=torch.float32, device=device)
    for part, (matrix, weight) in enumerate(by_row):
        config = launch_config("row_sums", device)
        row_sums_kernel[(experts * ceil_div(channels, config["BLOCK_R"]),)](
            matrix,
            matrix if weight is None else weight,
            partials[part],
            channels,
            matrix.shape[-1],
            matrix.stride(0),
            matrix.stride(-2),
            SQUARE=square,
            WEIGHTED=weight is not None,
            **config,
        )
    if by_column is not None:
        matrix, weight = by_column
        config = launch_config("column_sums", device)
        column_sums_kernel[(splits * experts * ceil_div(channels, config["BLOCK_C"]),)](
            matrix,
            matrix if weight is None else weight,
            partials[len(by_row) :],
            height,
            channels,
            experts,
            matrix.stride(0),
            matrix.stride(-2),
            SQUARE=square,
            WEIGHTED=weight is not None,
            ROWS=ROWS_PER_PARTIAL,
            **config,
        )
    dtype = torch.float32 if reciprocal else torch.float64
    total = torch.empty(*batch, channels, dtype=dtype, device=device)
    fold_partials(partials, total.view(experts, channels), fresh=True, reciprocal=reciprocal)
    return total


def triton_sums(inputs: Matrices, down: torch.Tensor | None, square: bool) -> torch.Tensor:
    """:attr:`Reductions.sums`."""
    return _launch([(m, None) for m in inputs], None if down is None else (down, None), square)


def triton_input_shares(matrices: Matrices) -> torch.Tensor:
    """:attr:`Reductions.input_shares`."""
    return _launch([(m, _launch([], (m, None), reciprocal=True)) for m in matrices], None)


def triton_output_shares(down: torch.Tensor, norms: torch.Tensor | None) -> torch.Tensor:
    """:attr:`Reductions.output_shares`."""
    return _launch([], (down, _launch([(down, norms)], None, reciprocal=True)))


TRITON = Reductions(triton_sums, triton_input_shares, triton_output_shares)


@kernel_op("channel_importance")
def channel_importance_op(
    statistic: torch.Tensor,
    score: str,
    gate: torch.Tensor | None,
    up: torch.Tensor | None,
    down: torch.Tensor | None,
) -> torch.Tensor:
    """The kernels' :func:`importance`; fp64."""
    with torch.cuda.device_of(statistic):
        inputs = [matrix for matrix in (gate, up) if matrix is not None]
        return importance(TRITON, score, inputs, down, statistic)


@channel_importance_op.register_fake
def _(
    statistic: torch.Tensor,
    score: str,
    gate: torch.Tensor | None,
    up: torch.Tensor | None,
    down: torch.Tensor | None,
) -> torch.Tensor:
    return torch.empty_like(statistic, dtype=torch.float64)


SCORES: dict[str, str | None] = {
    "magnitude": None,
    "wanda": "norms",
    "flap": "variance",
    "eq8": "norms",
    "balanced": "norms",
}
"""Score -> the per-channel statistic that it needs beside the weights."""


def channel_importance(
    score: str,
    *,
    gate: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    norms: torch.Tensor | None = None,
    variance: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Importance of the F channels of one FFN, summed over whichever matrices are given.

    Channel i is row i of gate and up and column i of down; n is ``norms``.

    ==========  ===================================  =======================================
    score       term of down                         term of gate or up
    ==========  ===================================  =======================================
    magnitude   sum_j W[j,i]^2 (root of the sum)     sum_j W[i,j]^2 (root of the sum)
    wanda       n_i mean_j |W[j,i]|                  n_i mean_j |W[i,j]|
    flap        variance_i sum_j W[j,i]^2            variance_i sum_j W[i,j]^2
    eq8         sum_j |W[j,i]| n_i /                 1 (constant under the L1 norm)
                (sum_i' |W[j,i']| * norm(n))
    balanced    sum_j |W[j,i]| n_i /                 n_i / mean(n) *
                sum_i' |W[j,i']| n_i'                sum_j |W[i,j]| / sum_i' |W[i',j]|
    ==========  ===================================  =======================================

    Args:
        score: a name of the table.
        gate, up: [F, D] fp16, bf16 or fp32 with unit stride along D, or None.
        down: [D, F] likewise with unit stride along F, or None.
        norms: [F] fp32 or fp64 activation norms; for wanda, eq8 and balanced.
        variance: [F] fp32 or fp64 activation variance; for flap.
            Each of these with one more dimension in front, [E, ...], is of E FFNs, scored apart:
            experts in one tensor, or halves of one, without a copy.
        backend: "torch", "triton" or None: ``$CFSP_BACKEND``, then the device of the matrices.

    Returns:
        [F] fp32 on the device of the matrices; [E, F] for E FFNs, bit for bit as one by one.

    Raises:
        TypeError, ValueError: unknown score, missing statistic, no matrix, shapes that differ.
        RuntimeError: backend "triton" where it cannot run.

    Sources: Wanda, arXiv 2306.11695; FLAP, arXiv 2312.11983; eq8 is Eq. 8 of CFSP,
    arXiv 2409.13199, at second hand; balanced is this project's.
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    named = {"gate": gate, "up": up, "down": down}
    given = {name: matrix for name, matrix in named.items() if matrix is not None}
    if not given:
        raise ValueError("channel_importance needs at least one of gate, up, down")
    name, first = next(iter(given.items()))
    check_tensor(name, first)
    dimensions = 3 if first.ndim == 3 else 2
    given = {name: as_matrix(name, matrix, dimensions) for name, matrix in given.items()}
    *batch, channels, width = first.mT.shape if name == "down" else first.shape
    for other, matrix in given.items():
        expected = (*batch, width, channels) if other == "down" else (*batch, channels, width)
        if tuple(matrix.shape) != expected or matrix.device != first.device:
            raise ValueError(
                f"{other} must be {expected} on {first.device} as {name} has it, "
                f"got {tuple(matrix.shape)} on {matrix.device}"
            )
    statistic = _statistic(score, norms, variance, (*batch, channels), first)
    triton = use_triton("channel_importance", first, backend)
    if not statistic.numel():
        return torch.empty_like(statistic, dtype=torch.float32)
    if triton and first.numel():
        matrices = (given.get("gate"), given.get("up"), given.get("down"))
        result = channel_importance_op(statistic, score, *matrices)
    else:
        inputs = [given[name] for name in ("gate", "up") if name in given]
        # Products of sums keep their digits under autocast, which meta tensors know nothing of.
        with nullcontext() if first.is_meta else torch.autocast(first.device.type, enabled=False):
            result = importance(TORCH, score, inputs, given.get("down"), statistic)
    return result.float()


def _statistic(
    score: str,
    norms: torch.Tensor | None,
    variance: torch.Tensor | None,
    shape: tuple[int, ...],
    like: torch.Tensor,
) -> torch.Tensor:
    """[F] or [E, F]: what ``score`` needs beside the weights, checked; anything where that is
    nothing."""
    needed = SCORES[score]
    if needed is None:
        return torch.empty(shape, dtype=torch.float32, device=like.device)
    statistic = norms if needed == "norms" else variance
    if statistic is None:
        raise ValueError(f"score {score!r} needs {needed}")
    check_tensor(needed, statistic)
    if tuple(statistic.shape) != shape or statistic.device != like.device:
        raise ValueError(
            f"{needed} must be {shape} on {like.device}, "
            f"got {tuple(statistic.shape)} on {statistic.device}"
        )
    if not statistic.dtype.is_floating_point:
        raise TypeError(f"{needed} must be floating point, got {statistic.dtype}")
    return statistic.detach()
