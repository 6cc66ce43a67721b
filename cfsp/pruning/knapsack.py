"""One choice for each item, so that errors sum to the least and costs to at most a capacity."""

import math
from collections.abc import Sequence

import numpy as np

CAPACITY_UNITS = 1 << 15
"""Costs without a common divisor that keeps the capacity below this are rounded up to a unit."""


def least_error_choices(
    errors: Sequence[np.ndarray], costs: Sequence[np.ndarray], capacity: int
) -> list[int]:
    """Index of every item's choice, of least sum of errors, by dynamic programming over capacity.

    ``errors`` and ``costs`` [choices] of every item are finite float64, and int64 of 0 or more;
    ValueError where the cheapest choices cost more than the capacity. Exact where the costs have a
    common divisor of at least capacity / 32768; else every cost is rounded up to a unit of about
    that, and the choices are the best for the rounded ones. Among equal sums each item, from the
    last, takes its earliest choice. Time: the sum over items of choices times units of capacity.
    """
    least = [int(cost.min()) for cost in costs]
    spare = capacity - sum(least)
    if spare < 0:
        raise ValueError(f"the cheapest choices cost {sum(least)}, the capacity is {capacity}")
    over = [cost - low for cost, low in zip(costs, least, strict=True)]
    divisor = math.gcd(*(int(value) for cost in over for value in cost)) or 1
    unit = max(divisor, -(-spare // CAPACITY_UNITS))
    units = [-(-cost // unit) for cost in over]
    room = spare // unit

    best = np.zeros(room + 1)  # least error of the items so far at every capacity
    chosen = []
    for item_errors, item_units in zip(errors, units, strict=True):
        total = np.full(room + 1, np.inf)
        choice = np.zeros(room + 1, dtype=np.int32)
        for index, (error, taken) in enumerate(zip(item_errors, item_units, strict=True)):
            if taken <= room:
                candidate = best[: room + 1 - taken] + error
                better = candidate < total[taken:]
                total[taken:][better] = candidate[better]
                choice[taken:][better] = index
        best = total
        chosen.append(choice)

    found = []
    for choice, item_units in zip(chosen[::-1], units[::-1], strict=True):
        found.append(int(choice[room]))
        room -= int(item_units[found[-1]])
    return found[::-1]
