"""Whole widths under one budget: the largest-remainder method.

Widths and sizes are those of one expert where an FFN has several. ``costs`` are what one channel
of width costs in every FFN: its experts, where channels are the budget; None: 1.
"""

from collections.abc import Sequence
from operator import mul

import torch

from .errors import CfspError


def check_budget(sizes: Sequence[int], budget: float, multiple: int, costs: Sequence[int]) -> int:
    """The cost to keep in all over the multiple; raises CfspError where no widths meet the budget
    and says which sparsities can be reached."""
    wanted = round(budget / multiple)
    least, most = reachable(sizes, multiple, costs)
    if not least <= wanted <= most:
        total = sum(map(mul, sizes, costs))
        low, high = (1 - units * multiple / total for units in (most, least))
        raise CfspError(
            f"no widths meet sparsity {1 - budget / total:.4g} in multiples of {multiple}: "
            f"{len(costs)} FFNs can reach {max(0.0, low):.4g} to {high:.4g}"
        )
    return wanted


def reachable(sizes: Sequence[int], multiple: int, costs: Sequence[int]) -> tuple[int, int]:
    """What all FFNs cost at least and at most, over the multiple; raises CfspError where an FFN
    has fewer channels than that."""
    room = [size // multiple for size in sizes]
    if min(room) < 1:
        raise CfspError(
            f"width_multiple {multiple} is more than the {min(sizes)} channels of FFN "
            f"{room.index(min(room))}; 1 gives exact widths"
        )
    return sum(costs), sum(map(mul, room, costs))


def apportion(
    ideal: torch.Tensor,
    sizes: Sequence[int],
    budget: float,
    multiple: int,
    importance: torch.Tensor,
    costs: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Round ideal widths [L] to multiples, so that their sum is the budget to half a multiple;
    raises CfspError where no widths meet it.

    Every width is rounded down; what is then missing goes, a multiple each, to the FFNs that lost
    most by it, among equals to the one of more ``importance`` [L], then to the first. An FFN keeps
    at least one multiple and at most what it has. A multiple of an FFN with experts is one of each
    of them; the budget is met to half of the smallest step that can be made.
    """
    costs = costs or [1] * len(sizes)
    room = [size // multiple for size in sizes]
    wanted = check_budget(sizes, budget, multiple, costs)
    quotas = (ideal.double() / multiple).tolist()
    units = [min(max(int(quota), 1), most) for quota, most in zip(quotas, room, strict=True)]
    lost = [round(quota - count, 6) for quota, count in zip(quotas, units, strict=True)]
    order = sorted(range(len(units)), key=lambda ffn: (-lost[ffn], -float(importance[ffn]), ffn))

    missing = wanted - sum(map(mul, units, costs))
    changed = True
    while changed:
        changed = False
        for by, turn in ((1, order), (-1, order[::-1])):
            for ffn in turn:
                nearer = 2 * missing * by > costs[ffn]
                if nearer and 1 <= units[ffn] + by <= room[ffn]:
                    units[ffn] += by
                    missing -= by * costs[ffn]
                    changed = True
    return tuple(count * multiple for count in units)
