"""Importance of every FFN channel from its weights and activations.

Bytes moved: each given matrix once, ``F * D * itemsize``; balanced gate and up, and the rows of
down that eq8 and balanced normalise, are walked twice.
"""

from collections.abc import Callable

import torch

from ._dispatch import use_triton
from ._validation import check_matrix, row_chunks

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
    given = {name: m for name, m in (("gate", gate), ("up", up), ("down", down)) if m is not None}
    if not given:
        raise ValueError("channel_importance needs at least one of gate, up, down")
    for name, matrix in given.items():
        check_matrix(name, matrix)
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
        statistic = given_statistic
        if tuple(statistic.shape) != (channels,) or statistic.device != first.device:
            raise ValueError(
                f"{needed} must be ({channels},) on {first.device}, "
                f"got {tuple(statistic.shape)} on {statistic.device}"
            )
        if not statistic.dtype.is_floating_point:
            raise TypeError(f"{needed} must be floating point, got {statistic.dtype}")
    use_triton("channel_importance", first, backend)
    return channel_importance_reference(score, gate, up, down, statistic).float()
