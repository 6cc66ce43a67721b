"""Least squares: a down projection that compensates for the removed channels.

W is the down projection [D, F], x [T, F] its input over the fitting tokens, K the kept channels.
With G = x^T x / T (the covariance, where a bias is fitted too), M = diag(G_KK) and W_K the old
columns, the new ones W' minimise

    || x W^T - x_K W'^T ||^2 / T  +  damping || (W' - W_K) M^1/2 ||^2

Solved for is the change W' - W_K = W_R G_RK (G_KK + damping M)^-1 over the removed channels R,
which is nothing where nothing is removed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..calibration.grams import Gram

ROWS = 1024
"""Rows of the projection that are held in fp64 at a time."""
COLUMNS = 2048
"""Columns of a Gram matrix that are held in fp64 at a time."""
DAMPING = 0.2
ATTEMPTS = 6
MORE_DAMPING = 10.0
LEAST_DAMPING = 1e-6
"""Damping of the second attempt where the first was without any."""
QUIET = 1e-3
"""Least mean square of a channel, relative to their mean, that damping counts with."""


@dataclass(frozen=True)
class Fit:
    """A down projection [D, width] in the dtype of the old, the bias [D] where one was asked for,
    and the damping with which there was a Cholesky factor."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    damping: float


def _moments(gram: Gram, rows: torch.Tensor, columns: torch.Tensor, centred: bool) -> torch.Tensor:
    """[rows, columns] fp64, of the second moments or the covariance."""
    found = gram.product[rows[:, None], columns].double().div_(gram.tokens)
    if centred:
        mean = gram.sum / gram.tokens
        found -= mean[rows, None] * mean[columns]
    return found


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


def _factor(moments: torch.Tensor, damping: float) -> tuple[torch.Tensor, float] | None:
    """Cholesky factor of the moments, damped in place, and the damping that it took; None where
    there is no factor, or the moments are zero or not finite."""
    ridge, diagonal = ridge_of(moments), moments.diagonal().clone()
    if not 0 < float(ridge.mean()) < torch.inf:
        return None
    for _ in range(ATTEMPTS):
        moments.diagonal().copy_(diagonal + damping * ridge)
        factor, failed = torch.linalg.cholesky_ex(moments)
        if not failed and bool(factor.diagonal().isfinite().all()):
            return factor, damping
        damping = max(damping, LEAST_DAMPING / MORE_DAMPING) * MORE_DAMPING
    return None


def solve_damped(
    moments: torch.Tensor, across: torch.Tensor, damping: float
) -> torch.Tensor | None:
    """across (moments + damping ridge)^-1, [D, K] fp64; None where there is none. ``moments``
    [K, K] fp64, symmetric, are damped in place."""
    found = _factor(moments, damping)
    return torch.cholesky_solve(across.T, found[0]).T if found is not None else None


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

    Solved in fp64 on the device of ``down``. 2 D R K + K^3 / 3 + 2 D K^2 FLOPs for K kept and R
    removed channels; memory beside the arguments: 16 K^2 + 16 D K bytes. ``damping`` is raised
    tenfold, at most 5 times, where there is no Cholesky factor. ``bias`` removes the means first.
    """
    if not gram.tokens or not bool(gram.product.diagonal().isfinite().all()):
        return None
    moments = _moments(gram, kept, kept, bias)
    found = _factor(moments, damping)
    if found is None:
        return None
    factor, used = found
    del moments, found  # as large as the factor
    removed = removed_channels(kept, down.shape[1])
    across = _moments(gram, removed, kept, bias)
    weight = down.new_empty(down.shape[0], len(kept))
    added = down.new_zeros(down.shape[0]) if bias else None
    for start in range(0, len(down), ROWS):
        rows = down[start : start + ROWS].double()
        old = rows[:, kept]
        target = rows[:, removed] @ across
        weight[start : start + ROWS] = old + torch.cholesky_solve(target.T, factor).T
        if added is not None:
            rows[:, kept] -= weight[start : start + ROWS].double()
            added[start : start + ROWS] = rows @ gram.sum / gram.tokens
    finite = all(bool(x.isfinite().all()) for x in (weight, added) if x is not None)
    return Fit(weight, added, used) if finite else None


@torch.no_grad()
def output_errors(
    down: torch.Tensor,
    kept: torch.Tensor,
    candidates: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    gram: Gram,
) -> list[float]:
    """|| x W^T - x_K W'^T - b ||^2 / || x W^T ||^2 over the tokens of ``gram``, in fp64, for each
    candidate (W' [D, K], b [D] or None); 0 where all outputs are zero. 2 D F^2 FLOPs, and 2 D K^2
    for each candidate."""
    dense, changes = 0.0, [0.0] * len(candidates)
    within = gram.product[kept][:, kept]
    for start in range(0, len(down), ROWS):
        rows = down[start : start + ROWS].double()
        product = _times(rows, gram.product)
        whole = float((product * rows).sum())
        dense += whole
        for number, (weight, bias) in enumerate(candidates):
            new = weight[start : start + ROWS].double()
            crossed = float((product[:, kept] * new).sum())
            changes[number] += whole - 2 * crossed + float((_times(new, within) * new).sum())
            if bias is not None:
                own = bias[start : start + ROWS].double()
                mean = rows @ gram.sum - new @ gram.sum[kept]
                changes[number] += float(gram.tokens * own.square().sum() - 2 * own @ mean)
    return [
        max(change, 0.0) / dense if dense > 0 else (0.0 if change <= 0 else torch.inf)
        for change in changes
    ]


def _times(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """rows [r, C] fp64 @ matrix [C, C] fp32, of which some columns are fp64 at a time."""
    parts = [rows @ columns.double() for columns in matrix.split(COLUMNS, dim=1)]
    return torch.cat(parts, dim=1)
