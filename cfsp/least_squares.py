"""Least squares for what is kept: a down projection that makes up for the channels removed.

W is the down projection [D, F], x [T, F] its input over the fitting tokens, K the kept channels.
With G = x^T x / T (the covariance, where a bias is fitted too), m = mean(diag G) and W_K the
old columns, the new ones W' minimise

    || x W^T - x_K W'^T ||^2 / T  +  damping m || W' - W_K ||^2

The change of the columns, W' - W_K = W_R G_RK (G_KK + damping m I)^-1 over the removed channels R,
is what is solved for: it is nothing where nothing is removed.
"""

from dataclasses import dataclass

import torch

from .grams import Gram

ROWS = 1024  # of the projection that are fp64 at a time
COLUMNS = 2048  # of a Gram matrix
DAMPING = 0.1
ATTEMPTS = 6
MORE_DAMPING = 10.0
LEAST_DAMPING = 1e-6
"""What a factorisation that fails without damping is tried again with."""


@dataclass(frozen=True)
class Fit:
    """A down projection fitted to the dense one's output."""

    weight: torch.Tensor
    """[D, width], of the dtype of the old."""
    bias: torch.Tensor | None
    """[D], where one was asked for."""
    damping: float
    """With which the factorisation succeeded."""


def _moments(gram: Gram, rows: torch.Tensor, columns: torch.Tensor, centred: bool) -> torch.Tensor:
    """[rows, columns] fp64, of the second moments or the covariance."""
    found = gram.product[rows[:, None], columns].double() / gram.tokens
    if centred:
        mean = gram.sum / gram.tokens
        found -= mean[rows, None] * mean[columns]
    return found


def _removed(kept: torch.Tensor, channels: int) -> torch.Tensor:
    goes = torch.ones(channels, dtype=torch.bool, device=kept.device)
    goes[kept] = False
    return goes.nonzero().flatten()


def _factor(moments: torch.Tensor, mean: float, damping: float) -> tuple[torch.Tensor, float]:
    """Cholesky factor of the moments, damped in place, and the damping with which there is one.

    Raises:
        ValueError: there is none; the moments are not finite.
    """
    diagonal = moments.diagonal().clone()
    for _ in range(ATTEMPTS):
        moments.diagonal().copy_(diagonal + damping * mean)
        factor, failed = torch.linalg.cholesky_ex(moments)
        if not failed and bool(factor.diagonal().isfinite().all()):
            return factor, damping
        damping = max(damping, LEAST_DAMPING / MORE_DAMPING) * MORE_DAMPING
    raise ValueError("no Cholesky factor")


@torch.no_grad()
def fit_down(
    down: torch.Tensor,
    kept: torch.Tensor,
    gram: Gram,
    damping: float = DAMPING,
    *,
    bias: bool = False,
    pull: float = 1.0,
) -> Fit | None:
    """The kept columns of a down projection, changed so that its output is nearly the dense one's.

    Solved in fp64 on the device of ``down``. 2 D R K + K^3 / 3 + 2 D K^2 FLOPs for K kept and R
    removed channels; memory beside the arguments: 16 K^2 + 16 D K bytes.

    Args:
        down: [D, F] fp16, bf16 or fp32.
        kept: [K] int64, ascending.
        gram: of its input, on the same device.
        damping: weight of the second term, relative to the mean square of a channel. Where the
            moments have no Cholesky factor it is raised tenfold, at most 5 times.
        bias: remove the means first and give a bias.
        pull: where the second term pulls: pull * W_K. 0 is ordinary ridge regression.

    Returns:
        The fit; None where there is none, for the activations are all zero or not finite.
    """
    channels = down.shape[1]
    removed = _removed(kept, channels)
    mean = gram.product.diagonal().double() / max(gram.tokens, 1)
    if bias:
        mean = mean - (gram.sum / max(gram.tokens, 1)).square()
    scale = float(mean.mean())
    if not 0 < scale < torch.inf:
        return None
    try:
        factor, used = _factor(_moments(gram, kept, kept, bias), scale, damping)
    except ValueError:
        return None
    across = _moments(gram, removed, kept, bias)
    weight = down.new_empty(down.shape[0], len(kept))
    added = down.new_zeros(down.shape[0]) if bias else None
    for start in range(0, len(down), ROWS):
        rows = down[start : start + ROWS].double()
        old = rows[:, kept]
        target = rows[:, removed] @ across
        if pull != 1:
            target -= (1 - pull) * used * scale * old
        new = old + torch.cholesky_solve(target.T, factor).T
        weight[start : start + ROWS] = new
        if added is not None:
            rows[:, kept] -= weight[start : start + ROWS].double()
            added[start : start + ROWS] = rows @ gram.sum / gram.tokens
    finite = all(bool(x.isfinite().all()) for x in (weight, added) if x is not None)
    return Fit(weight, added, used) if finite else None


@torch.no_grad()
def output_error(
    down: torch.Tensor,
    kept: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gram: Gram,
) -> float:
    """|| x W^T - x_K W'^T - b ||^2 / || x W^T ||^2 over the tokens of ``gram``; fp64 throughout.

    Args:
        down: W, [D, F].
        kept: [K] int64.
        weight: W', [D, K].
        bias: b, [D], or None.
        gram: of x, on the device of ``down``.

    Returns:
        The relative error; 0 where the dense output is zero and the other is too.
    """
    dense = change = 0.0
    for start in range(0, len(down), ROWS):
        rows = down[start : start + ROWS].double()
        dense += _energy(rows, gram)
        rows[:, kept] -= weight[start : start + ROWS].double()
        change += _energy(rows, gram)
        if bias is not None:
            own = bias[start : start + ROWS].double()
            change += float(gram.tokens * own.square().sum() - 2 * own @ (rows @ gram.sum))
    change = max(change, 0.0)
    return change / dense if dense > 0 else (0.0 if change == 0 else torch.inf)


def _energy(rows: torch.Tensor, gram: Gram) -> float:
    """tr(rows G rows^T), of the sums over tokens."""
    total = rows.new_zeros(())
    for start in range(0, rows.shape[1], COLUMNS):
        here = slice(start, start + COLUMNS)
        total += ((rows @ gram.product[:, here].double()) * rows[:, here]).sum()
    return float(total)
