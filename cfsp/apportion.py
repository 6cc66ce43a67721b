"""Whole numbers under one budget: the largest-remainder method.

Of an FFN with several experts, numbers are those of one expert. ``costs`` are what one unit costs
in every part: its experts, where channels are the budget; None: 1. A part whose units cost nothing
keeps all that it may.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

import torch

from .errors import CfspError


@dataclass(frozen=True)
class Steps:
    """The numbers that a part may keep of its units: multiples, one of them at least."""

    size: int
    multiple: int = 1
    removable: bool = False
    """Whether it may keep none."""

    @property
    def is_fixed(self) -> bool:
        """Whether it keeps all."""
        return self.multiple == self.size and not self.removable

    @property
    def least(self) -> int:
        return 0 if self.removable else self.multiple

    @property
    def most(self) -> int:
        return self.size // self.multiple * self.multiple


def check_budget(steps: Sequence[Steps], budget: float, costs: Sequence[int]) -> int:
    """The cost to keep in all, in whole steps; raises CfspError where no numbers meet the budget
    and says which sparsities can be reached."""
    unit = math.gcd(*(own.multiple for own in steps))
    wanted = round(budget / unit) * unit
    least, most = reachable(steps, costs)
    if not least <= wanted <= most:
        multiple, total = max(own.multiple for own in steps), total_cost(steps, costs)
        low, high = (1 - kept / total for kept in (most, least))
        raise CfspError(
            f"no widths meet sparsity {1 - budget / total:.4g} in multiples of {multiple}: "
            f"{len(costs)} FFNs can reach {max(0.0, low):.4g} to {high:.4g}"
        )
    return wanted


def total_cost(steps: Sequence[Steps], costs: Sequence[int]) -> int:
    """What all units cost."""
    return sum(map(mul, (own.size for own in steps), costs))


def reachable(steps: Sequence[Steps], costs: Sequence[int]) -> tuple[int, int]:
    """What parts cost at least and at most; raises CfspError for a part of less than a multiple."""
    for number, own in enumerate(steps):
        if own.most < own.multiple:
            raise CfspError(
                f"width_multiple {own.multiple} is more than the {own.size} channels of FFN "
                f"{number}; 1 gives exact widths"
            )
    return (
        sum(map(mul, (own.least for own in steps), costs)),
        sum(map(mul, (own.most for own in steps), costs)),
    )


def apportion(
    ideal: torch.Tensor,
    steps: Sequence[Steps],
    budget: float,
    importance: torch.Tensor,
    costs: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Round ideal numbers [L] to multiples, so that their cost is the budget to half a step;
    raises CfspError where no numbers meet it.

    Every number is rounded down; what is then missing goes, a multiple each, to the parts that lost
    most by it, among equals to the one of more ``importance`` [L], then to the first. A multiple of
    an FFN with experts is one of each of them; the budget is met to half of the smallest step that
    can be made.
    """
    costs = costs or [1] * len(steps)
    wanted = check_budget(steps, budget, costs)
    quotas = [float(x) / own.multiple for x, own in zip(ideal.double(), steps, strict=True)]
    least, most = (
        [end // own.multiple for end, own in zip(ends, steps, strict=True)]
        for ends in ([own.least for own in steps], [own.most for own in steps])
    )
    quotas = [q if cost else high for q, cost, high in zip(quotas, costs, most, strict=True)]
    counts = [min(max(int(q), low), high) for q, low, high in zip(quotas, least, most, strict=True)]
    lost = [round(quota - count, 6) for quota, count in zip(quotas, counts, strict=True)]
    order = sorted(range(len(counts)), key=lambda i: (-lost[i], -float(importance[i]), i))
    step_costs = [own.multiple * cost for own, cost in zip(steps, costs, strict=True)]
    missing = wanted - sum(map(mul, counts, step_costs))
    changed = True
    while changed:
        changed = False
        for by, turn in ((1, order), (-1, order[::-1])):
            for part in turn:
                nearer = 2 * missing * by > step_costs[part] > 0
                if nearer and least[part] <= counts[part] + by <= most[part]:
                    counts[part] += by
                    missing -= by * step_costs[part]
                    changed = True
    return tuple(count * own.multiple for count, own in zip(counts, steps, strict=True))
