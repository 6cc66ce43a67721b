"""Importance of every FFN channel from its weights and activations.

Bytes moved: each given matrix once, ``F * D * itemsize``, for magnitude, wanda and flap. A share
of a total needs the total first, so two walks: of down for eq8 and of every matrix for balanced.
Both come from DRAM, unless the matrix fits in L2. (gate and up could not do better: their totals
run over the whole matrix. Keeping a panel of a few rows of down in L2 between its two walks would
save one read of it, and cost as much in partial sums of F columns per panel.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import no_type_check

import torch

from ._configs import launch_config
from ._dispatch import use_triton
from ._partials import fold_partials
from ._triton import Kernel, ceil_div, tl
from ._validation import as_matrix, row_chunks

Reduction = Callable[[torch.Tensor], torch.Tensor]


def _over_rows(matrix: torch.Tensor, reduce: Reduction) -> torch.Tensor:
    """[F, D] -> [F]: ``reduce`` maps fp32 rows [n, D] to [n]."""
    parts = [reduce(matrix[rows].float()).double() for rows in row_chunks(*matrix.shape)]
    return torch.cat(parts) if parts else matrix.new_zeros(matrix.shape[0], dtype=torch.float64)


def _over_columns(matrix: torch.Tensor, reduce: Reduction) -> torch.Tensor:
    """[D, F] -> [F]: ``reduce`` maps fp32 rows [n, F] to their sum over n, [F]."""
    total = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for rows in row_chunks(*matrix.shape):
        total += reduce(matrix[rows].float())
    return total


def _channel_sum(matrix: torch.Tensor, is_down: bool, reduce: Reduction) -> torch.Tensor:
    """Sum of an elementwise ``reduce`` over the entries of every channel, [F] fp64."""
    if is_down:
        return _over_columns(matrix, lambda rows: reduce(rows).sum(0))
    return _over_rows(matrix, lambda rows: reduce(rows).sum(1))


def _share_of_inputs(down: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """sum_j |down[j, i]| n_i / sum_i' |down[j, i']| n_i': each row of down shares out one."""

    def shares(rows: torch.Tensor) -> torch.Tensor:
        weighted = rows.abs() * norms.float()
        return (weighted / weighted.sum(1, keepdim=True).clamp_min(1e-30)).sum(0)

    return _over_columns(down, shares)


def _share_of_outputs(matrix: torch.Tensor) -> torch.Tensor:
    """sum_j |matrix[i, j]| / sum_i' |matrix[i', j]|: each column of gate or up shares out one."""
    columns = _over_columns(matrix, lambda rows: rows.abs().sum(0)).clamp_min(1e-30).float()
    return _over_rows(matrix, lambda rows: (rows.abs() / columns).sum(1))


def channel_importance_reference(
    score: str,
    gate: torch.Tensor | None,
    up: torch.Tensor | None,
    down: torch.Tensor | None,
    statistic: torch.Tensor,
) -> torch.Tensor:
    """The specification of every score; see :func:`channel_importance`. Returns [F] fp64.

    ``statistic`` is what :data:`SCORES` names for the score; magnitude ignores it.
    """
    matrices = [(m, m is down) for m in (gate, up, down) if m is not None]
    match score:
        case "magnitude":
            squares = [_channel_sum(m, is_down, torch.square) for m, is_down in matrices]
            return torch.stack(squares).sum(0).sqrt()
        case "wanda":
            means = [
                _channel_sum(m, is_down, torch.abs) / m.shape[0 if is_down else 1]
                for m, is_down in matrices
            ]
            return torch.stack(means).sum(0) * statistic.double()
        case "flap":
            squares = [_channel_sum(m, is_down, torch.square) for m, is_down in matrices]
            return torch.stack(squares).sum(0) * statistic.double()
        case "eq8":
            ones = torch.ones_like(statistic)
            relative = statistic.double() / statistic.double().norm().clamp_min(1e-30)
            terms = [
                _share_of_inputs(m, ones) * relative if is_down else ones.double()
                for m, is_down in matrices
            ]
            return torch.stack(terms).sum(0)
        case _:  # balanced
            relative = statistic.double() / statistic.double().mean().clamp_min(1e-30)
            terms = [
                _share_of_inputs(m, statistic) if is_down else _share_of_outputs(m) * relative
                for m, is_down in matrices
            ]
            return torch.stack(terms).sum(0)


ROWS_PER_PARTIAL = 256  # rows of a column sum added in fp32 before they join the fp64 total


@Kernel
@no_type_check
def row_sums_kernel(
    matrix_ptr,  # [R, C] fp16, bf16 or fp32, unit stride along C
    weight_ptr,  # [C] fp32, read if WEIGHTED
    out_ptr,  # [R] fp32: sum_c f(matrix[r, c]) * weight[c]
    rows,
    columns,
    stride,
    SQUARE: tl.constexpr,  # f is the square, else the absolute value
    WEIGHTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, columns, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = column < columns
        mask = (row < rows)[:, None] & inside[None, :]
        pointers = matrix_ptr + row[:, None] * stride + column[None, :]
        x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        if SQUARE:
            x *= x
        else:
            x = tl.abs(x)
        if WEIGHTED:
            x *= tl.load(weight_ptr + column, mask=inside, other=0.0)[None, :]
        total += x
    tl.store(out_ptr + row, tl.sum(total, 1), mask=row < rows)


@Kernel
@no_type_check
def column_sums_kernel(
    matrix_ptr,  # [R, C] fp16, bf16 or fp32, unit stride along C
    weight_ptr,  # [R] fp32, read if WEIGHTED
    partials_ptr,  # [ceil(R / ROWS), C] fp32: sum over ROWS rows of f(matrix[r, c]) * weight[r]
    rows,
    columns,
    stride,
    SQUARE: tl.constexpr,  # f is the square, else the absolute value
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(columns, BLOCK_C)
    partial = program // blocks
    column = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < columns
    row = partial * ROWS + tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for _ in range(0, ROWS, BLOCK_R):
        mask = (row < rows)[:, None] & inside[None, :]
        pointers = matrix_ptr + row[:, None] * stride + column[None, :]
        x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        if SQUARE:
            x *= x
        else:
            x = tl.abs(x)
        if WEIGHTED:
            x *= tl.load(weight_ptr + row, mask=row < rows, other=0.0)[:, None]
        total += x
        row += BLOCK_R
    tl.store(partials_ptr + partial * columns + column, tl.sum(total, 0), mask=inside)


def _launch_row_sums(
    matrix: torch.Tensor, weight: torch.Tensor | None, square: bool, out: torch.Tensor
) -> None:
    """``[R, C] -> out [R]`` fp32: sum of squares or absolute values, weighted by ``[C]`` fp32."""
    rows, columns = matrix.shape
    config = launch_config("row_sums", matrix.device)
    row_sums_kernel[(ceil_div(rows, config["BLOCK_R"]),)](
        matrix,
        matrix if weight is None else weight,
        out,
        rows,
        columns,
        matrix.stride(0),
        SQUARE=square,
        WEIGHTED=weight is not None,
        **config,
    )


def _launch_column_sums(
    matrix: torch.Tensor, weight: torch.Tensor | None, square: bool, partials: torch.Tensor
) -> None:
    """``[R, C] -> partials [ceil(R / 256), C]`` fp32, weighted by ``[R]`` fp32."""
    rows, columns = matrix.shape
    config = launch_config("column_sums", matrix.device)
    column_sums_kernel[(ceil_div(columns, config["BLOCK_C"]) * partials.shape[0],)](
        matrix,
        matrix if weight is None else weight,
        partials,
        rows,
        columns,
        matrix.stride(0),
        SQUARE=square,
        WEIGHTED=weight is not None,
        ROWS=ROWS_PER_PARTIAL,
        **config,
    )


def _channel_sums(
    gate_up: list[torch.Tensor],
    down: torch.Tensor | None,
    square: bool,
    gate_up_weights: list[torch.Tensor] | None = None,
    down_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sums over the entries of every channel, over all matrices, [F] fp64."""
    first = down if down is not None else gate_up[0]
    channels = first.shape[1] if down is not None else first.shape[0]
    splits = 0 if down is None else ceil_div(down.shape[0], ROWS_PER_PARTIAL)
    partials = torch.empty(
        len(gate_up) + splits, channels, dtype=torch.float32, device=first.device
    )
    for i, matrix in enumerate(gate_up):
        weight = gate_up_weights[i] if gate_up_weights is not None else None
        _launch_row_sums(matrix, weight, square, partials[i])
    if down is not None:
        _launch_column_sums(down, down_weight, square, partials[len(gate_up) :])
    total = torch.zeros(channels, dtype=torch.float64, device=first.device)
    fold_partials(partials, total)
    return total


def _reciprocal(total: torch.Tensor) -> torch.Tensor:
    """1 / total in fp32, finite for a total of 0, whose terms are 0."""
    return total.clamp_min(1e-30).reciprocal().float()


def _down_shares(down: torch.Tensor, norms: torch.Tensor | None) -> torch.Tensor:
    """sum_j |down[j, i]| / sum_i' |down[j, i']| n_i', [F] fp64; n is 1 where ``norms`` is None."""
    row_totals = torch.empty(down.shape[0], dtype=torch.float32, device=down.device)
    _launch_row_sums(down, norms, False, row_totals)
    return _channel_sums([], down, False, down_weight=_reciprocal(row_totals))


def _column_totals(matrix: torch.Tensor) -> torch.Tensor:
    """sum_i |matrix[i, j]|, [D] fp64."""
    return _channel_sums([], matrix, False)


@torch.library.custom_op("cfsp::channel_importance", mutates_args=())
def channel_importance_op(
    score: str,
    gate: torch.Tensor | None,
    up: torch.Tensor | None,
    down: torch.Tensor | None,
    statistic: torch.Tensor,
) -> torch.Tensor:
    """The kernels' :func:`channel_importance_reference`; [F] fp64."""
    gate_up = [m for m in (gate, up) if m is not None]
    first = down if down is not None else gate_up[0]
    channels = first.shape[1] if down is not None else first.shape[0]
    width = first.shape[0] if down is not None else first.shape[1]
    if not first.numel():
        return channel_importance_reference(score, gate, up, down, statistic)
    statistic = statistic.double()
    with torch.cuda.device_of(first):
        match score:
            case "magnitude":
                return _channel_sums(gate_up, down, True).sqrt_()
            case "wanda":
                return _channel_sums(gate_up, down, False).mul_(statistic / width)
            case "flap":
                return _channel_sums(gate_up, down, True).mul_(statistic)
            case "eq8":
                total = torch.full_like(statistic, len(gate_up))
                if down is not None:
                    relative = statistic / statistic.norm().clamp_min(1e-30)
                    total += _down_shares(down, None) * relative
                return total
            case _:  # balanced
                total = torch.zeros(channels, dtype=torch.float64, device=first.device)
                if gate_up:
                    weights = [_reciprocal(_column_totals(m)) for m in gate_up]
                    total += _channel_sums(gate_up, None, False, gate_up_weights=weights)
                    total *= statistic / statistic.mean().clamp_min(1e-30)
                if down is not None:
                    total += _down_shares(down, statistic.float()) * statistic
                return total


@channel_importance_op.register_fake
def _(
    score: str,
    gate: torch.Tensor | None,
    up: torch.Tensor | None,
    down: torch.Tensor | None,
    statistic: torch.Tensor,
) -> torch.Tensor:
    if down is not None:
        return down.new_empty(down.shape[1], dtype=torch.float64)
    first = gate if gate is not None else up
    if first is None:
        raise ValueError("channel_importance needs at least one of gate, up, down")
    return first.new_empty(first.shape[0], dtype=torch.float64)


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
        backend: "torch", "triton" or None: ``$CFSP_BACKEND``, then the device of the matrices.

    Returns:
        [F] fp32 on the device of the matrices.

    Raises:
        TypeError, ValueError: unknown score, missing statistic, no matrix, shapes that differ.
        RuntimeError: backend "triton" where it cannot run.

    Sources: Wanda, arXiv 2306.11695; FLAP, arXiv 2312.11983; eq8 is Eq. 8 of CFSP,
    arXiv 2409.13199, at second hand; balanced is this project's.
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    matrices = (("gate", gate), ("up", up), ("down", down))
    given = {name: as_matrix(name, m) for name, m in matrices if m is not None}
    if not given:
        raise ValueError("channel_importance needs at least one of gate, up, down")
    first_name, first = next(iter(given.items()))
    channels = first.shape[1] if first_name == "down" else first.shape[0]
    width = first.shape[0] if first_name == "down" else first.shape[1]
    for name, matrix in given.items():
        expected = (width, channels) if name == "down" else (channels, width)
        if tuple(matrix.shape) != expected or matrix.device != first.device:
            raise ValueError(
                f"{name} must be {expected} on {first.device} as {first_name} has it, "
                f"got {tuple(matrix.shape)} on {matrix.device}"
            )
    needed = SCORES[score]
    if needed is None:
        statistic = first.new_empty(0)
    else:
        given_statistic = norms if needed == "norms" else variance
        if given_statistic is None:
            raise ValueError(f"score {score!r} needs {needed}")
        statistic = given_statistic.detach()
        if tuple(statistic.shape) != (channels,) or statistic.device != first.device:
            raise ValueError(
                f"{needed} must be ({channels},) on {first.device}, "
                f"got {tuple(statistic.shape)} on {statistic.device}"
            )
        if not statistic.dtype.is_floating_point:
            raise TypeError(f"{needed} must be floating point, got {statistic.dtype}")
    compute = (
        channel_importance_op
        if use_triton("channel_importance", first, backend)
        else channel_importance_reference
    )
    return compute(score, given.get("gate"), given.get("up"), given.get("down"), statistic).float()
