"""How many channels every block keeps: pure functions under one total budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..apportion import apportion, check_budget
from ..calibration.curves import ErrorCurve, curve_widths
from ..errors import CfspError
from .knapsack import least_error_choices

REFERENCE_TOKENS = 131072
"""The released CFSP sums its importance over 128 windows of 1024 tokens. Ours is a mean; times
this it equals theirs at that setting and does not change with the amount of calibration data."""
SIGMOID_SCALE = 1e4
"""The released CFSP divides the centred importance by this before the sigmoid."""


@dataclass(frozen=True)
class AllocationProblem:
    """What an allocator may look at."""

    importance: torch.Tensor
    """[L] fp64, coarse importance of every FFN, that of its block: mean influence per token."""
    scores: tuple[torch.Tensor, ...]
    """Channel scores [F_l] of every FFN, one expert after the other."""
    sparsity: float
    """Fraction to remove of what all channels cost."""
    experts: tuple[int, ...] = ()
    """Experts of every FFN, which share one width; () where no FFN has any."""
    costs: tuple[int, ...] = ()
    """Cost of one channel of width in every FFN, in all its experts, in any unit; (): one per
    channel, so that channels themselves are the budget."""
    width_multiple: int = 1
    curves: tuple[ErrorCurve, ...] = ()
    """Error curves of every FFN, to be added up; () where no allocator asks for them."""

    @property
    def expert_counts(self) -> tuple[int, ...]:
        return self.experts or (1,) * len(self.scores)

    @property
    def width_costs(self) -> tuple[int, ...]:
        return self.costs or self.expert_counts

    @property
    def intermediate_sizes(self) -> torch.Tensor:
        """[L] int64, channels of every FFN, of all its experts."""
        return torch.tensor([len(score) for score in self.scores])

    @property
    def expert_sizes(self) -> list[int]:
        return [len(s) // count for s, count in zip(self.scores, self.expert_counts, strict=True)]

    @property
    def channel_costs(self) -> torch.Tensor:
        """[L] fp64, cost of one channel of one expert of every FFN."""
        return torch.tensor(self.width_costs) / torch.tensor(self.expert_counts).double()

    @property
    def budget(self) -> float:
        """Cost to keep in all, before rounding."""
        return (1 - self.sparsity) * float((self.channel_costs * self.intermediate_sizes).sum())


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
    widths = keep * problem.intermediate_sizes
    return widths * (problem.budget / (problem.channel_costs * widths).sum())


def cfsp_filled(problem: AllocationProblem) -> torch.Tensor:
    """CFSP's shares without their contraction: an FFN whose share is more than it has stays whole,
    and the others share what is left of the budget in proportion."""
    share = importance_shares(problem.importance * REFERENCE_TOKENS)
    sizes = problem.intermediate_sizes.double()
    costs = problem.channel_costs * sizes
    whole = torch.zeros(len(share), dtype=torch.bool)
    while True:
        left = problem.budget - costs[whole].sum()
        keep = torch.where(whole, 1.0, share * (left / (costs * share)[~whole].sum()))
        if torch.equal(keep >= 1, whole):
            return keep * sizes
        whole = keep >= 1


def uniform(problem: AllocationProblem) -> torch.Tensor:
    """The same fraction of every block."""
    return (1 - problem.sparsity) * problem.intermediate_sizes.double()


def global_threshold(problem: AllocationProblem) -> torch.Tensor:
    """One threshold on the scores of all blocks, each standardised within its block.

    Source: FLAP, arXiv 2312.11983. Equal scores go to the earlier block and channel.
    """
    standardised = []
    for score in problem.scores:
        deviation = score.double().std() if len(score) > 1 else torch.tensor(0.0)
        centred = score.double() - score.double().mean()
        standardised.append(centred / deviation if deviation > 0 else torch.zeros_like(centred))
    order = torch.sort(torch.cat(standardised), descending=True, stable=True).indices
    count = len(problem.scores)
    block_of = torch.arange(count).repeat_interleave(problem.intermediate_sizes)[order]
    costs = problem.channel_costs[block_of]
    kept = int((costs.cumsum(0) - costs / 2 < problem.budget).sum())
    return torch.bincount(block_of[:kept], minlength=count).double()


def knapsack(problem: AllocationProblem) -> torch.Tensor:
    """Least sum of errors over all FFNs under the budget, at multiples of the width multiple.

    Exact over at most 65 widths of every FFN: one multiple, all, and those at one distance.
    Sources: SPDY (arXiv 2201.13096), ZipLM (arXiv 2302.04089).
    """
    if not problem.curves:
        raise CfspError("allocator 'knapsack' needs error curves")
    costs, multiple, sizes = problem.width_costs, problem.width_multiple, problem.expert_sizes
    capacity = check_budget(sizes, problem.budget, multiple, costs) * multiple
    widths = [curve_widths(size // multiple).clamp(min=1).unique() * multiple for size in sizes]
    chosen = least_error_choices(
        [curve.at(of_ffn).numpy() for curve, of_ffn in zip(problem.curves, widths, strict=True)],
        [(of_ffn * cost).numpy() for of_ffn, cost in zip(widths, costs, strict=True)],
        capacity,
    )
    found = [float(of_ffn[index]) for of_ffn, index in zip(widths, chosen, strict=True)]
    return torch.tensor(found, dtype=torch.float64) * torch.tensor(problem.expert_counts)


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


def equal_widths(sizes: Sequence[int], sparsity: float, multiple: int) -> tuple[int, ...]:
    """The same fraction of every FFN, to the nearest multiple. One that is a number of times as
    large as the smallest keeps as many times its width, as configs with shared experts have it."""

    def nearest(size: int) -> int:
        units = max(round((1 - sparsity) * size / multiple), 1)
        return min(units, size // multiple) * multiple

    least = min(sizes)
    kept = nearest(least)
    return tuple(nearest(size) if size % least else size // least * kept for size in sizes)


def allocate_widths(problem: AllocationProblem, allocator: str, multiple: int) -> tuple[int, ...]:
    """Width of every FFN, of each expert where it has several, by the named allocator."""
    ideal = ALLOCATORS[allocator].widths(replace(problem, width_multiple=multiple))
    return apportion(
        ideal / torch.tensor(problem.expert_counts),
        problem.expert_sizes,
        problem.budget,
        multiple,
        problem.importance,
        problem.width_costs,
    )
