"""How many channels every block keeps: pure functions under one total budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..apportion import Steps, apportion, check_budget, reachable, total_cost
from ..calibration.curves import ErrorCurve, curve_widths
from ..errors import CfspError
from ..models.parts.channels import Units
from .budget import ChannelBudget, KVLimit, Widths
from .knapsack import least_error_choices, least_error_choices_within

REFERENCE_TOKENS = 131072
"""The released CFSP sums its importance over 128 windows of 1024 tokens. Ours is a mean; times
this it equals theirs at that setting and does not change with the amount of calibration data."""
SIGMOID_SCALE = 1e4
"""The released CFSP divides the centred importance by this before the sigmoid."""


@dataclass(frozen=True)
class AllocationProblem:
    """What an allocator may look at; a part is an FFN, or the attention of a block."""

    importance: torch.Tensor
    """[L] fp64, coarse importance of every part, that of its block: mean influence per token."""
    scores: tuple[torch.Tensor, ...]
    """Scores of the columns [F_l] of every part, one expert after the other."""
    sparsity: float
    """Fraction to remove of what all units cost."""
    units: tuple[Units, ...] = ()
    """Those of every part; (): a column is a unit everywhere, and there are no experts."""
    costs: tuple[int, ...] = ()
    """Cost of one unit in every part, in all its experts; (): one per column, so that channels
    themselves are the budget."""
    steps: tuple[Steps, ...] = ()
    """Units that every part may keep; (): any number but none."""
    curves: tuple[ErrorCurve, ...] = ()
    """Error curves of every part, to be added up; () where no allocator asks for them."""
    kv: KVLimit | None = None
    """What may stay of the KV bytes beside that."""

    def __post_init__(self) -> None:
        units = self.units or tuple(Units(len(score)) for score in self.scores)
        object.__setattr__(self, "units", units)
        costs = self.costs or tuple(own.experts for own in units)
        object.__setattr__(self, "costs", costs)
        steps = self.steps or tuple(Steps(own.count) for own in units)
        object.__setattr__(self, "steps", steps)

    @property
    def experts(self) -> torch.Tensor:
        """[L] int64, experts of every part, which share one number of units."""
        return torch.tensor([own.experts for own in self.units])

    @property
    def sizes(self) -> torch.Tensor:
        """[L] int64, units of every part, of all its experts."""
        return torch.tensor([own.count * own.experts for own in self.units])

    @property
    def unit_costs(self) -> torch.Tensor:
        """[L] fp64, cost of one unit of one expert of every part."""
        return torch.tensor(self.costs) / self.experts.double()

    @property
    def budget(self) -> float:
        """Cost to keep in all, before rounding."""
        return (1 - self.sparsity) * float((self.unit_costs * self.sizes).sum())


def importance_shares(importance_sum: torch.Tensor) -> torch.Tensor:
    """s = sigmoid((I - mean I) / 1e4) of every block [L] fp64, I summed over 131072 tokens."""
    return torch.sigmoid((importance_sum - importance_sum.mean()) / SIGMOID_SCALE)


def cfsp_keep_fractions(importance_sum: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Fraction of channels [L] fp64 that each block keeps, of mean 1 - p, as the released CFSP has
    it.

    s = sigmoid((I - mean I) / 1e4), keep = s / mean(s) * (1 - p). Where the largest keep would
    reach 1, s is contracted about its mean so that it becomes (1 - p) + p / 1.05.
    Source: arXiv 2409.13199 and its released code.
    """
    share = importance_shares(importance_sum)
    mean = share.mean()
    if share.max() > mean and float(share.max() / mean) * (1 - sparsity) >= 1:
        room = mean * (1 / (1 - sparsity) - 1)
        share = mean + (share - mean) * (room / (share.max() - mean) / 1.05)
    return share / mean * (1 - sparsity)


def cfsp(problem: AllocationProblem) -> torch.Tensor:
    """Wider where the block turns its hidden states further; see :func:`cfsp_keep_fractions`."""
    keep = cfsp_keep_fractions(problem.importance * REFERENCE_TOKENS, problem.sparsity)
    widths = keep * problem.sizes
    return widths * (problem.budget / (problem.unit_costs * widths).sum())


def cfsp_filled(problem: AllocationProblem) -> torch.Tensor:
    """CFSP's shares without their contraction: an FFN whose share is more than it has stays whole,
    and the others share what is left of the budget in proportion."""
    share = importance_shares(problem.importance * REFERENCE_TOKENS)
    sizes = problem.sizes.double()
    costs = problem.unit_costs * sizes
    whole = torch.zeros(len(share), dtype=torch.bool)
    while True:
        left = problem.budget - costs[whole].sum()
        keep = torch.where(whole, 1.0, share * (left / (costs * share)[~whole].sum()))
        if torch.equal(keep >= 1, whole):
            return keep * sizes
        whole = keep >= 1


def uniform(problem: AllocationProblem) -> torch.Tensor:
    """The same fraction of every block."""
    return (1 - problem.sparsity) * problem.sizes.double()


def global_threshold(problem: AllocationProblem) -> torch.Tensor:
    """One threshold on the scores of all parts, each standardised over the columns of its part;
    that of a unit is the mean over its columns.

    Source: FLAP, arXiv 2312.11983. Equal scores go to the earlier block and channel.
    """
    standardised = []
    for score, own in zip(problem.scores, problem.units, strict=True):
        deviation = score.double().std() if len(score) > 1 else torch.tensor(0.0)
        centred = score.double() - score.double().mean()
        scaled = centred / deviation if deviation > 0 else torch.zeros_like(centred)
        standardised.append(own.scores(scaled))
    order = torch.sort(torch.cat(standardised), descending=True, stable=True).indices
    count = len(problem.scores)
    block_of = torch.arange(count).repeat_interleave(problem.sizes)[order]
    costs = problem.unit_costs[block_of]
    kept = int((costs.cumsum(0) - costs / 2 < problem.budget).sum())
    return torch.bincount(block_of[:kept], minlength=count).double()


def knapsack(problem: AllocationProblem) -> torch.Tensor:
    """Least sum of errors over all parts under the budget, and the limit of KV bytes if there is
    one, at the steps of each.

    Exact over at most 65 widths of every FFN: one multiple, all, and those at one distance.
    Sources: SPDY (arXiv 2201.13096), ZipLM (arXiv 2302.04089).
    """
    if not problem.curves:
        raise CfspError("allocator 'knapsack' needs error curves")
    capacity = check_budget(problem.steps, problem.budget, problem.costs)
    choices = [
        curve_widths(own.size // own.multiple).clamp(min=own.least // own.multiple).unique()
        * own.multiple
        for own in problem.steps
    ]
    errors = [curve.at(own).numpy() for curve, own in zip(problem.curves, choices, strict=True)]

    def all_cost(each: Sequence[int]) -> list[np.ndarray]:
        return [(own * cost).numpy() for own, cost in zip(choices, each, strict=True)]

    costs, kv = all_cost(problem.costs), problem.kv
    if kv is None:
        chosen = least_error_choices(errors, costs, capacity)
    else:
        others = all_cost(kv.costs)
        chosen = least_error_choices_within(errors, costs, capacity, others, kv.capacity)
    found = [float(own[index]) for own, index in zip(choices, chosen, strict=True)]
    return torch.tensor(found, dtype=torch.float64) * problem.experts


def search_start(problem: AllocationProblem) -> torch.Tensor:
    """Where a search begins: at the knapsack's widths where there are error curves."""
    return (knapsack if problem.curves else cfsp_filled)(problem)


@dataclass(frozen=True)
class Allocator:
    """A way to share the budget out."""

    widths: Callable[[AllocationProblem], torch.Tensor]
    """Problem -> ideal widths [L] fp64, of all experts, that cost the budget."""
    summary: str
    needs_curves: bool = False


ALLOCATORS: dict[str, Allocator] = {
    "cfsp": Allocator(
        cfsp, "wider where a block turns its hidden states further, as CFSP was published"
    ),
    "cfsp-filled": Allocator(
        cfsp_filled, "the same shares of the budget, without the published contraction"
    ),
    "uniform": Allocator(uniform, "the same fraction of every block"),
    "global": Allocator(global_threshold, "one threshold on the standardised scores of all blocks"),
    "knapsack": Allocator(
        knapsack, "the least sum of reconstruction errors, from error curves", needs_curves=True
    ),
    "search": Allocator(
        search_start, "evolutionary exchanges of width, measured on the pruned model"
    ),
}
SEARCH = "search"
"""Its widths are only where a search on the model begins; see :mod:`cfsp.pruning.search`."""


def equal_widths(steps: Sequence[Steps], sparsity: float) -> tuple[int, ...]:
    """The same fraction of every FFN, to the nearest multiple. One that is a number of times as
    large as the smallest keeps as many times its width, as configs with shared experts have it."""

    def nearest(own: Steps) -> int:
        count = max(round((1 - sparsity) * own.size / own.multiple), 1)
        return min(count * own.multiple, own.most)

    least = min(steps, key=lambda own: own.size)
    kept = nearest(least)
    return tuple(
        nearest(own) if own.size % least.size else own.size // least.size * kept for own in steps
    )


def rounded(
    ideal: torch.Tensor,
    steps: Sequence[Steps],
    budget: float,
    importance: torch.Tensor,
    costs: Sequence[int],
    kv: KVLimit | None = None,
) -> Widths:
    """:func:`cfsp.apportion.apportion`. Under a limit of KV bytes, parts that hold some keep their
    ideal numbers, which are whole, and the others take what is left, as near as they come."""
    if kv is None:
        return apportion(ideal, steps, budget, importance, costs)
    found = [int(count) for count in ideal]
    free = [part for part, cost in enumerate(kv.costs) if not cost]
    own, each = [steps[part] for part in free], [costs[part] for part in free]
    spent = sum(found[part] * costs[part] for part, cost in enumerate(kv.costs) if cost)
    least, most = reachable(own, each)
    left = min(max(budget - spent, least), most)
    for part, count in zip(
        free, apportion(ideal[free], own, left, importance[free], each), strict=True
    ):
        found[part] = count
    return tuple(found)


def even_widths(steps: Sequence[Steps], sparsity: float, budget: ChannelBudget) -> Widths:
    """About the same fraction of every part; less of those with KV bytes where a limit says so."""
    sizes = torch.tensor([own.size for own in steps], dtype=torch.float64)
    keep, even = (1 - sparsity) * total_cost(steps, budget.costs), torch.zeros_like(sizes)
    ideal, kv = (1 - sparsity) * sizes, budget.kv
    if kv is not None:
        share = kv.capacity / total_cost(steps, kv.costs)
        most = apportion(share * sizes, steps, kv.capacity, even, kv.costs)
        for part, own in enumerate(steps):
            if kv.costs[part]:
                whole = int(ideal[part] / own.multiple) * own.multiple
                ideal[part] = min(most[part], max(own.least, whole))
    return rounded(ideal, steps, keep, even, budget.costs, kv)


def allocate_widths(problem: AllocationProblem, allocator: str) -> Widths:
    """Units that every part keeps, of each expert where it has several, by the named allocator."""
    ideal = ALLOCATORS[allocator].widths(problem) / problem.experts
    return rounded(
        ideal, problem.steps, problem.budget, problem.importance, problem.costs, problem.kv
    )
