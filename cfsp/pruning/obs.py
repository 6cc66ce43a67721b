"""Optimal Brain Surgeon for channels and KV groups: order of removal and error at every width.

For one FFN, W [D, F] is its down projection and G = X^T X / T [F, F] the Gram matrix of its input.
With H = G + damping M, M the mean squares of the channels as least squares damp them (see
:func:`cfsp.pruning.least_squares.ridge_of`, of all channels here), keeping K and removing R costs

    min over V of  tr(Delta H Delta^T),  Delta = [V, 0] - W    =    tr(W_R S W_R^T),

    S = H_RR - H_RK H_KK^-1 H_KR = ((H^-1)_RR)^-1,    V = W H[:, K] H_KK^-1:

the damping pulls the refitted V towards the weights as they were. What the FFN's output loses is
tr(Delta G Delta^T), the same less damping tr(Delta M Delta^T). Everything here is in fp64. G is
given in fp32 or fp64, on the device of W; a negative damping, or one too small for a singular G,
raises CfspError.

Sources: Hassibi and Stork, Second order derivatives for network pruning (1992); for groups of
weights, ZipLM (arXiv 2302.04089); for channels of language models, OSSCAR (arXiv 2403.12983).
"""

from dataclasses import dataclass

import torch

from ..errors import CfspError
from .least_squares import DAMPING, ridge_of

STEPS_PER_UPDATE = 64
"""Removals between two updates of whole matrices; changes rounding only."""
RANK_STEP = 2.0**-40
"""Added to a score for every rank, so that scores of equal errors differ."""


@dataclass(frozen=True)
class Removal:
    """The greedy order of removal of an FFN's channels."""

    order: torch.Tensor
    """[F] int64, the first to go first."""
    error: torch.Tensor
    """[F] fp64, tr(Delta H Delta^T) after each removal and the refit of what is left."""

    @property
    def scores(self) -> torch.Tensor:
        """[F] fp64 on the CPU, in [0, 1]: the share of tr(W H W^T) that is lost when the channel is
        the last one removed, and a little for its rank, so that no two are equal and the highest
        are exactly what greedy removal leaves."""
        error, order = self.error.cpu(), self.order.cpu()
        share = error / error[-1] if error[-1] > 0 else error
        ranked = share.cummax(0).values + RANK_STEP * torch.arange(len(order))
        return torch.empty_like(ranked).scatter_(0, order, ranked)


def _damped(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """H and what damping added to its diagonal [F]. Where all activations are zero that is 1:
    weights alone decide."""
    if damping < 0:
        raise CfspError(f"damping must be 0 or more, got {damping}")
    damped = gram.to(torch.float64, copy=True)
    silent = not bool(damped.diagonal().any())
    added = torch.ones_like(damped.diagonal()) if silent else damping * ridge_of(damped)
    damped.diagonal().add_(added)
    return damped, added


def _cholesky(damped: torch.Tensor) -> torch.Tensor:
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info):
        if not bool(damped.isfinite().all()):
            raise CfspError("the Gram matrix is not finite: activations are too large for its fp32")
        raise CfspError(
            "the Gram matrix is singular: use a larger damping or more calibration tokens"
        )
    return factor


def removal_order(down: torch.Tensor, gram: torch.Tensor, damping: float = DAMPING) -> Removal:
    """Remove all channels, each time the one whose removal costs least after the others' refit.

    Channel i of those left costs |W_i|^2 / (H^-1)_ii, H of those left and W refitted to them.
    With c = (H^-1)_:i / (H^-1)_ii its removal makes H^-1 -= (H^-1)_ii c c^T and W -= W_i c^T.
    Only |W_i|^2 is needed of W, so A = W^T W is kept in its place: A -= e c^T + c e^T,
    e = A_:i - A_ii c / 2. The updates of whole matrices are made for many removals at once; until
    then single columns are corrected as they are needed. Equal costs: the highest index goes.

    Cost: 2 D F^2 for A, F^3 for the inverse, 2 F^3 for the updates; four [F, F] fp64 beside the
    Gram matrix. The host waits for the device to check G, not between removals.
    """
    labels = torch.arange(down.shape[1] - 1, -1, -1, device=down.device)
    inverse = torch.cholesky_inverse(_cholesky(_damped(gram, damping)[0].flip(0, 1)))
    weights = down.flip(1).double()
    products = weights.T @ weights
    order, costs = [], []
    while len(labels):
        picked, cost, pivot, c, e = _steps(inverse, products, min(STEPS_PER_UPDATE, len(labels)))
        order.append(labels[picked])
        costs.append(cost)
        stays = torch.ones_like(labels).index_fill_(0, picked, 0)
        left = stays.argsort(descending=True, stable=True)[: len(labels) - len(picked)]
        labels, c, e = labels[left], c[:, left], e[:, left]
        inverse = _corner(inverse, left).addmm_((c * pivot[:, None]).T, c, alpha=-1)
        products = _corner(products, left).addmm_(e.T, c, alpha=-1).addmm_(c.T, e, alpha=-1)
    return Removal(torch.cat(order), torch.cat(costs).clamp_min(0).cumsum(0))


def group_removal_order(
    down: torch.Tensor, gram: torch.Tensor, columns: int, damping: float = DAMPING
) -> Removal:
    """The same for groups of ``columns`` side by side: KV groups of an output projection [D, F].

    Group B of those left costs tr(W_B ((H^-1)_BB)^-1 W_B^T); its removal makes W -= W_B S (H^-1)_B:
    and H^-1 -= (H^-1)_:B S (H^-1)_B:, S = ((H^-1)_BB)^-1. Equal costs: the highest group goes. The
    errors are of every column of the result, so that scores are those of columns too.

    Cost: for each of the n removals 2 F^2 columns and 2 D F columns FLOPs, and as much in all as n
    factors of [columns, columns] each.
    """
    inverse = torch.cholesky_inverse(_cholesky(_damped(gram, damping)[0]))
    weights, total = down.double(), inverse.new_zeros(())
    left = list(range(down.shape[1] // columns))
    order, errors = [], []
    while left:
        costs = []
        for place in range(len(left)):
            own = slice(place * columns, (place + 1) * columns)
            factor = torch.linalg.cholesky(inverse[own, own])
            half = torch.linalg.solve_triangular(factor, weights[:, own].T, upper=False)
            costs.append(half.square().sum())
        place = len(left) - 1 - int(torch.stack(costs).flip(0).argmin())
        own = slice(place * columns, (place + 1) * columns)
        change = torch.linalg.solve(inverse[own, own], inverse[own])
        stays = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
        stays[own] = False
        weights = (weights - weights[:, own] @ change)[:, stays]
        inverse = (inverse - inverse[:, own] @ change)[stays][:, stays]
        total = total + costs[place].clamp_min(0)
        order.append(left.pop(place))
        errors.append(total)
    units = torch.arange(columns, device=down.device)
    places = torch.tensor(order, device=down.device)[:, None] * columns + units
    return Removal(places.flatten(), torch.stack(errors).repeat_interleave(columns))


def _corner(matrix: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return matrix.index_select(0, index).index_select(1, index)


def _steps(
    inverse: torch.Tensor, products: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The next ``count`` removals from n channels, whose updates of both [n, n] are still to be
    made: picked [count] int64, cost, pivot (H^-1)_ii when its turn came, c [count, n] and e."""
    pivots, energy = inverse.diagonal().clone(), products.diagonal().clone()
    picked = torch.empty(count, dtype=torch.int64, device=inverse.device)
    cost, pivot = (inverse.new_empty(count) for _ in range(2))
    c, e = (inverse.new_empty(count, len(inverse)) for _ in range(2))
    for step in range(count):
        costs = energy / pivots
        i = costs.argmin().view(1)
        before, c_i, e_i = slice(step), c[:step, i].T, e[:step, i].T
        picked[step], cost[step], pivot[step] = i[0], costs[i][0], pivots[i][0]
        column = inverse[i] - (c_i * pivot[before]) @ c[before]
        c[step] = column[0] / pivot[step]
        product = products[i] - c_i @ e[before] - e_i @ c[before]
        e[step] = product[0] - product[0, i] / 2 * c[step]
        pivots -= pivot[step] * c[step].square()
        energy -= 2 * c[step] * e[step]
        pivots[i], energy[i] = 1.0, torch.inf  # never again
    return picked, cost, pivot, c, e


def error_curve(
    down: torch.Tensor,
    gram: torch.Tensor,
    order: torch.Tensor,
    widths: torch.Tensor,
    damping: float = DAMPING,
) -> torch.Tensor:
    """tr(Delta G Delta^T) of the best damped refit at some widths, when channels go in an order.

    With the channels in reverse order of removal and H = L L^T, the factor of every kept set is
    the corner of L, and S is that of the rest: one factorisation serves all widths. When the
    block B is removed from K + B, W_K -= W_B L_BB (L^-1)_BK, at the cost |W_B L_BB|^2 in H.

    Cost: F^3 / 3 for the factor, F^3 for its inverse, 2 D F^2; three [F, F] fp64 beside the Gram
    matrix. The host waits for the device to check G and for the result.

    ``order`` [F] int64 is a permutation, the first to go first; ``widths`` int64 ascend in [0, F].
    The errors are fp64 on the CPU, in the units of the output squared, summed over D, per token.
    That of width 0 is the energy tr(W G W^T).
    """
    order = order.to(down.device).flip(0)
    damped, added = _damped(gram, damping)
    factor = _cholesky(_corner(damped, order))
    del damped
    inverse = torch.eye(len(order), dtype=torch.float64, device=down.device)
    torch.linalg.solve_triangular(factor, inverse, upper=False, out=inverse)
    added, old = added[order], down[:, order].double()
    new, energy = old.clone(), old.square().sum(0) * added
    lost, end, errors = energy.new_zeros(()), len(order), []
    for width in widths.flip(0).tolist():
        part = new[:, width:end] @ factor[width:end, width:end]
        lost = lost + part.square().sum()
        new[:, :width] -= part @ inverse[width:end, :width]
        change = (new[:, :width] - old[:, :width]).square().sum(0) @ added[:width]
        errors.append(lost - change - energy[width:].sum())
        end = width
    return torch.stack(errors).flip(0).clamp_min(0).cpu()


def plain_error_curve(
    down: torch.Tensor, gram: torch.Tensor, order: torch.Tensor, widths: torch.Tensor
) -> torch.Tensor:
    """tr(W_R G_RR W_R^T): the error where the kept columns stay as they are.

    The sum over the removed corner of the entrywise product of W^T W and G, one row after the
    other. Cost: 2 D F^2; three [F, F] fp64. Arguments and result as :func:`error_curve`.
    """
    order = order.to(down.device).flip(0)
    weights = down[:, order].double()
    products = (weights.T @ weights).mul_(_corner(gram, order).double())
    row_sums = 2 * products.triu_().sum(1) - products.diagonal()
    errors = row_sums.flip(0).cumsum(0).flip(0).clamp_min(0).cpu()
    return torch.cat([errors, errors.new_zeros(1)])[widths]


def order_of(scores: torch.Tensor) -> torch.Tensor:
    """The order of removal [F] int64 that :func:`cfsp.pruning.planning.select_channels` follows:
    lowest score first, among equal ones the highest index."""
    return len(scores) - 1 - scores.flip(0).argsort(stable=True)
