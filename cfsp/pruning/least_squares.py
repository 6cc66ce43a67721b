"""Least squares: a down projection that compensates for the removed channels.

W is the down projection [D, F], x [T, F] its input over the fitting tokens, K the kept channels.
With G = x^T x / T (the covariance, where a bias is fitted too), M = diag(G_KK) and W_K the old
columns, the new ones W' minimise

    || x W^T - x_K W'^T ||^2 / T  +  damping || (W' - W_K) M^1/2 ||^2

Solved for is the change W' - W_K = W_R G_RK (G_KK + damping M)^-1 over the removed channels R,
which is nothing where nothing is removed.

The matrix is scaled to a unit diagonal and factorised in fp32: damping bounds its condition number.
Whether that was enough is checked, by the residual of the solution; where not, all is done in fp64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.linalg import solve_triangular

from ..calibration.grams import Gram, HeldOut

ROWS = 1024
"""Rows of the projection that are solved for at a time."""
DAMPING = 0.2
ATTEMPTS = 6
MORE_DAMPING = 10.0
LEAST_DAMPING = 1e-6
"""Damping of the second attempt where the first was without any."""
QUIET = 1e-3
"""Least mean square of a channel, relative to their mean, that damping counts with."""
RESIDUAL = 1e-4
"""Of a solution in fp32, relative to the right side: what is more is solved again in fp64."""


@dataclass(frozen=True)
class Fit:
    """A down projection [D, width] in the dtype of the old, the bias [D] where one was asked for,
    and the damping with which there was a Cholesky factor."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    damping: float


def removed_channels(kept: torch.Tensor, channels: int) -> torch.Tensor:
    """The others of a number of channels, [R] int64, ascending."""
    goes = torch.ones(channels, dtype=torch.bool, device=kept.device)
    goes[kept] = False
    return goes.nonzero().flatten()


def ridge_of(moments: torch.Tensor) -> torch.Tensor:
    """[K], what damping 1 adds to the diagonal of [K, K] moments: each channel's own mean square.

    Correlations then shrink by one factor, whatever the scales of the channels. A nearly silent one
    counts with a part of the mean: nothing is known of what it does elsewhere.
    """
    own = moments.diagonal()
    return own.clamp_min(QUIET * float(own.mean()))


def solve_damped(
    moments: torch.Tensor, across: torch.Tensor, damping: float
) -> tuple[torch.Tensor, float] | None:
    """across (moments + damping ridge)^-1, [D, K] fp32, and the damping that it took: raised
    tenfold, at most 5 times, where there is no Cholesky factor. None where there is none yet, or
    the moments are zero or not finite. ``moments`` [K, K] and ``across`` [D, K], fp32, are scaled
    in place. K^3 / 3 + 2 D K^2 FLOPs; 4 K^2 bytes, three times that where fp64 is called for.
    """
    ridge = ridge_of(moments)
    if not 0 < float(ridge.mean()) < torch.inf:
        return None
    scale = ridge.rsqrt()
    moments.mul_(scale[:, None]).mul_(scale)
    across.mul_(scale)
    diagonal = moments.diagonal().clone()
    moments.diagonal().add_(damping)
    solution = _solution(moments, across)
    if solution is None:
        moments, diagonal = moments.double(), diagonal.double()
        for _ in range(ATTEMPTS):
            moments.diagonal().copy_(diagonal + damping)
            if (solution := _solution(moments, across)) is not None:
                break
            damping = max(damping, LEAST_DAMPING / MORE_DAMPING) * MORE_DAMPING
    return (solution.mul_(scale), damping) if solution is not None else None


def _solution(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    """right matrix^-1, [D, K] fp32, in the dtype of the matrix; None where it has no factor, or
    where in fp32 the residual is large: of one combination of every :data:`ROWS` rows."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed or not bool(factor.diagonal().isfinite().all()):
        return None
    found = torch.empty_like(right)
    for rows, out in zip(right.split(ROWS), found.split(ROWS), strict=True):
        # Unlike cholesky_solve these make no copy of the factor.
        half = solve_triangular(factor.mT, rows.to(matrix.dtype), upper=True, left=False)
        out.copy_(solve_triangular(factor, half, upper=False, left=False))
        if matrix.dtype == torch.float32:
            signs = rows.new_ones(len(rows), dtype=torch.float32)
            signs[1::2] = -1
            wanted = signs @ rows
            lack = wanted - (signs @ out) @ matrix
            if not float(lack.norm()) <= RESIDUAL * float(wanted.norm()):
                return None
    return found


@torch.no_grad()
def fit_down(
    down: torch.Tensor,
    kept: torch.Tensor,
    gram: Gram,
    damping: float = DAMPING,
    *,
    bias: bool = False,
) -> Fit | None:
    """The kept columns [K] int64, ascending, of a down projection [D, F] fp16, bf16 or fp32, fitted
    to the dense output; None where the activations are all zero or not finite.

    Solved on the device of ``down``, see :func:`solve_damped`. 2 D R K + K^3 / 3 + 2 D K^2 FLOPs
    for K kept and R removed channels. ``bias`` removes the means first.
    """
    if not gram.tokens or not bool(gram.product.diagonal().isfinite().all()):
        return None
    removed = removed_channels(kept, down.shape[1])
    across = down[:, removed].float() @ gram.moments(removed, kept, centred=bias)
    solved = solve_damped(gram.moments(kept, kept, centred=bias), across, damping)
    if solved is None:
        return None
    weight = solved[0].add_(down[:, kept]).to(down.dtype)
    added = None
    if bias:
        mean = gram.sum / gram.tokens
        parts = zip(down.split(ROWS), weight.split(ROWS), strict=True)
        lost = [old.double() @ mean - new.double() @ mean[kept] for old, new in parts]
        added = torch.cat(lost).to(down.dtype)
    finite = all(bool(x.isfinite().all()) for x in (weight, added) if x is not None)
    return Fit(weight, added, solved[1]) if finite else None


@torch.no_grad()
def output_errors(
    down: torch.Tensor,
    kept: torch.Tensor,
    candidates: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    held_out: HeldOut,
) -> list[float]:
    """|| x W^T - x_K W'^T - b ||^2 / || x W^T ||^2 over the held-out tokens for each candidate
    (W' [D, K], b [D] or None); 0 where all outputs are zero. 2 T D F FLOPs, and as many for each
    candidate: of what it changes, so that small errors are not differences of large numbers."""
    changes: list[tuple[torch.Tensor, torch.Tensor | None]] = [(down, None)]
    for weight, bias in candidates:
        changes.append((down.index_add(1, kept, weight, alpha=-1), bias))
    dense, *lost = held_out.squares(changes)
    return [change / dense if dense > 0 else (0.0 if change <= 0 else torch.inf) for change in lost]
