"""One choice for each item, so that errors sum to the least and costs to at most a capacity; or two
kinds of costs to two capacities."""

import math
from collections.abc import Sequence

import numpy as np

RUNS, REPAIRS = 20, 8
"""Of the dynamic programming under two capacities: for the rate, then to use up what is left."""
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


def least_error_choices_within(
    errors: Sequence[np.ndarray],
    costs: Sequence[np.ndarray],
    capacity: int,
    others: Sequence[np.ndarray],
    limit: int,
) -> list[int]:
    """:func:`least_error_choices` whose ``others``, int64 [choices] of 0 or more, sum to at most
    ``limit``. Of the choices of an item, dearer ones have no less of the others.

    Errors are summed with a rate times the others (Lagrange): the rate at which the best choices
    turn from too many to few enough is found by chords, in at most 20 runs. Items are then taken
    from the former to the latter as far as the limit goes, and single choices raised. No more than
    rate * (limit - others) from the least possible. ValueError as for :func:`least_error_choices`,
    and where the fewest others are more than the limit.
    """
    fewest = sum(int(own.min()) for own in others)
    if fewest > limit:
        raise ValueError(f"the fewest others are {fewest}, the limit is {limit}")

    def summed(values: Sequence[np.ndarray], chosen: Sequence[int]) -> float:
        return sum(own[index].item() for own, index in zip(values, chosen, strict=True))

    def among(allowed: Sequence[np.ndarray], rate: float = 0.0) -> list[int]:
        """The best choices where every item has some of its own."""
        picked = zip(errors, others, allowed, strict=True)
        priced = [own[some] + rate * more[some] for own, more, some in picked]
        spent = [own[some] for own, some in zip(costs, allowed, strict=True)]
        found = least_error_choices(priced, spent, capacity)
        return [int(some[index]) for some, index in zip(allowed, found, strict=True)]

    every = [np.arange(len(own)) for own in errors]
    over = among(every)
    if summed(others, over) <= limit:
        return over
    under = among([np.flatnonzero(own == own.min()) for own in others])
    for _ in range(RUNS):
        more = summed(others, over) - summed(others, under)
        rate = (summed(errors, under) - summed(errors, over)) / more
        found = among(every, rate)
        value, known = (summed(errors, x) + rate * summed(others, x) for x in (found, over))
        if value >= known - 1e-12 * abs(known):
            break
        if summed(others, found) <= limit:
            under = found
        else:
            over = found

    def filled(chosen: Sequence[int]) -> list[int]:
        """The best where items with others keep their choices."""
        return among(
            [
                np.array([index]) if own.any() else some
                for own, index, some in zip(others, chosen, every, strict=True)
            ]
        )

    def drop(item: int, to: int, chosen: Sequence[int]) -> float:
        gained = errors[item][chosen[item]] - errors[item][to]
        return float(gained / max(1, others[item][to] - others[item][chosen[item]]))

    def is_allowed(chosen: Sequence[int]) -> bool:
        each = zip(costs, others, chosen, strict=True)
        spent = sum(int(own[index] if more.any() else own.min()) for own, more, index in each)
        return spent <= capacity and summed(others, chosen) <= limit

    mixed = list(under)
    for item in sorted(range(len(errors)), key=lambda own: -drop(own, over[own], under)):
        trial = [*mixed[:item], over[item], *mixed[item + 1 :]]
        mixed = trial if is_allowed(trial) else mixed
    best = min(under, filled(mixed), key=lambda own: summed(errors, own))
    for _ in range(REPAIRS):
        raised = [
            (drop(item, int(to), best), [*best[:item], int(to), *best[item + 1 :]])
            for item, own in enumerate(others)
            for to in np.flatnonzero(own > own[best[item]])
        ]
        gain, trial = max((x for x in raised if is_allowed(x[1])), default=(0.0, best))
        found = filled(trial) if gain > 0 else best
        if summed(errors, found) >= summed(errors, best):
            break
        best = found
    return best
