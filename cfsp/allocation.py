"""How many channels every block keeps: pure functions under one total budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .errors import CfspError

REFERENCE_TOKENS = 131072
"""The released CFSP sums its importance over 128 windows of 1024 tokens. Ours is a mean; times
this it equals theirs at that setting and does not change with the amount of calibration data."""

SIGMOID_SCALE = 1e4
"""The released CFSP divides the centred importance by this before the sigmoid."""


@dataclass(frozen=True)
class AllocationProblem:
    """What an allocator may look at."""

    importance: torch.Tensor
    """[L] fp64, coarse importance: mean influence per token."""
    scores: tuple[torch.Tensor, ...]
    """Channel scores [F_l] of every block."""
    sparsity: float
    """Fraction of all channels to remove."""

    @property
    def intermediate_sizes(self) -> torch.Tensor:
        """[L] int64, channels of every block."""
        return torch.tensor([len(score) for score in self.scores])

    @property
    def budget(self) -> float:
        """Channels to keep in all, before rounding."""
        return (1 - self.sparsity) * float(self.intermediate_sizes.sum())


def cfsp_keep_fractions(importance_sum: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Fraction of channels that each block keeps, as the released CFSP has it.

    s = sigmoid((I - mean I) / 1e4), keep = s / mean(s) * (1 - p). Where the largest keep would
    reach 1, s is contracted about its mean so that it becomes (1 - p) + p / 1.05.

    Args:
        importance_sum: [L] fp64, influence of each block summed over 131072 tokens.
        sparsity: p in [0, 1).

    Returns:
        [L] fp64 with mean 1 - p.

    Source: arXiv 2409.13199 and its released code.
    """
    share = torch.sigmoid((importance_sum - importance_sum.mean()) / SIGMOID_SCALE)
    mean = share.mean()
    if share.max() > mean and float(share.max() / mean) * (1 - sparsity) >= 1:
        room = mean * (1 / (1 - sparsity) - 1)
        share = mean + (share - mean) * (room / (share.max() - mean) / 1.05)
    return share / mean * (1 - sparsity)


def cfsp(problem: AllocationProblem) -> torch.Tensor:
    """Wider where the block turns its hidden states further; see :func:`cfsp_keep_fractions`."""
    keep = cfsp_keep_fractions(problem.importance * REFERENCE_TOKENS, problem.sparsity)
    sizes = problem.intermediate_sizes
    widths = keep * sizes
    return widths * (problem.budget / widths.sum())


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
    kept = order[: round(problem.budget)]
    block_of = torch.repeat_interleave(
        torch.arange(len(problem.scores)), problem.intermediate_sizes
    )
    return torch.bincount(block_of[kept], minlength=len(problem.scores)).double()


ALLOCATORS: dict[str, Callable[[AllocationProblem], torch.Tensor]] = {
    "cfsp": cfsp,
    "uniform": uniform,
    "global": global_threshold,
}
"""Allocator by name: problem -> ideal widths [L] fp64 that sum to the budget."""


def check_budget(intermediate_sizes: Sequence[int], budget: float, multiple: int) -> int:
    """The number of multiples to keep in all, where some widths meet the budget.

    Raises:
        CfspError: none do; says which sparsities can be reached.
    """
    room = [size // multiple for size in intermediate_sizes]
    wanted = round(budget / multiple)
    if min(room) < 1:
        raise CfspError(
            f"width_multiple {multiple} is more than the {min(intermediate_sizes)} channels of "
            f"block {room.index(min(room))}; 1 gives exact widths"
        )
    if not len(room) <= wanted <= sum(room):
        total = sum(intermediate_sizes)
        low, high = (1 - units * multiple / total for units in (sum(room), len(room)))
        raise CfspError(
            f"no widths meet sparsity {1 - budget / total:.4g} in multiples of {multiple}: "
            f"{len(room)} blocks can reach {max(0.0, low):.4g} to {high:.4g}"
        )
    return wanted


def apportion(
    ideal: torch.Tensor,
    intermediate_sizes: Sequence[int],
    budget: float,
    multiple: int,
    importance: torch.Tensor,
) -> tuple[int, ...]:
    """Round ideal widths to multiples, so that their sum is the budget to half a multiple.

    Every width is rounded down; what is then missing goes, a multiple each, to the blocks that lost
    most by it, among equals to the more important one (the largest-remainder method). A block
    keeps at least one multiple and at most what it has.

    Args:
        ideal: [L] widths, real.
        intermediate_sizes: channels of every block.
        budget: channels to keep in all.
        multiple: 1 for exact widths.
        importance: [L]; breaks ties, then the index does.

    Raises:
        CfspError: no widths meet the budget; says what could be.
    """
    room = [size // multiple for size in intermediate_sizes]
    wanted = check_budget(intermediate_sizes, budget, multiple)
    quotas = (ideal.double() / multiple).tolist()
    units = [min(max(int(quota), 1), most) for quota, most in zip(quotas, room, strict=True)]
    lost = [round(quota - count, 6) for quota, count in zip(quotas, units, strict=True)]
    order = sorted(
        range(len(units)), key=lambda block: (-lost[block], -float(importance[block]), block)
    )
    while (missing := wanted - sum(units)) > 0:
        open_blocks = [block for block in order if units[block] < room[block]]
        for block in open_blocks[:missing]:
            units[block] += 1
    while (excess := sum(units) - wanted) > 0:
        shrinkable = [block for block in reversed(order) if units[block] > 1]
        for block in shrinkable[:excess]:
            units[block] -= 1
    return tuple(count * multiple for count in units)


def allocate_widths(problem: AllocationProblem, allocator: str, multiple: int) -> tuple[int, ...]:
    """Width of every block under the budget, by the named allocator."""
    return apportion(
        ALLOCATORS[allocator](problem),
        problem.intermediate_sizes.tolist(),
        problem.budget,
        multiple,
        problem.importance,
    )
