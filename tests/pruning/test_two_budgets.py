"""Choices under two capacities, against all there are; widths under a budget and a KV limit."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsp.apportion import Steps, apportion
from cfsp.calibration.curves import ErrorCurve
from cfsp.models.parts.channels import Units
from cfsp.pruning.allocation import ALLOCATORS, AllocationProblem, allocate_widths, even_widths
from cfsp.pruning.budget import ChannelBudget, KVLimit
from cfsp.pruning.knapsack import least_error_choices, least_error_choices_within

Items = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


@st.composite
def items(draw: st.DrawFn) -> Items:
    """Errors that fall, costs that rise, and others that some items have none of."""
    found = []
    plain, keyed = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    for number in range(plain + keyed):
        count = draw(st.integers(2, 4))
        drops = draw(st.lists(st.floats(0.001, 1.0), min_size=count, max_size=count))
        rises = draw(st.lists(st.integers(1, 6), min_size=count - 1, max_size=count - 1))
        each = draw(st.integers(1, 3)) if number >= plain else 0
        found.append(
            (
                np.cumsum(drops)[::-1].copy() ** draw(st.sampled_from([1, 3])),
                np.cumsum([draw(st.integers(0, 2)), *rises]).astype(np.int64),
                np.arange(count, dtype=np.int64) * each,
            )
        )
    if draw(st.booleans()):  # equal ones, which turn all at once
        found[plain:] = [found[plain]] * keyed
    return found


def totals(given: Items, chosen: tuple[int, ...] | list[int]) -> tuple[float, int, int]:
    picked = [tuple(x[index].item() for x in own) for own, index in zip(given, chosen, strict=True)]
    errors, costs, others = zip(*picked, strict=True)
    return sum(errors), sum(costs), sum(others)


def ends(given: Items) -> list[tuple[int, int]]:
    """The least and the most that costs and others sum to."""
    return [tuple(sum(int(own[k][at]) for own in given) for at in (0, -1)) for k in (1, 2)]


@settings(max_examples=150, deadline=None)
@given(given_items=items(), room=st.floats(0, 1), share=st.floats(0, 1))
def test_choices_keep_both_capacities_and_come_near_the_best_of_all(
    given_items: Items, room: float, share: float
) -> None:
    (least, most), (_, every) = ends(given_items)
    capacity, limit = round(least + room * (most - least)), round(share * every)
    columns = list(zip(*given_items, strict=True))
    chosen = least_error_choices_within(*columns[:2], capacity, columns[2], limit)
    error, cost, other = totals(given_items, chosen)
    assert cost <= capacity
    assert other <= limit
    each = (totals(given_items, x) for x in product(*(range(len(own[0])) for own in given_items)))
    best = min(e for e, c, o in each if c <= capacity and o <= limit)
    step = max(float(-np.diff(own[0]).min()) for own in given_items)
    assert best - 1e-9 <= error <= best + step


@settings(max_examples=60, deadline=None)
@given(given_items=items(), room=st.floats(0, 1))
def test_a_limit_that_leaves_room_changes_nothing(given_items: Items, room: float) -> None:
    (least, most), (_, every) = ends(given_items)
    capacity = round(least + room * (most - least))
    columns = list(zip(*given_items, strict=True))
    plain = least_error_choices(*columns[:2], capacity)
    assert least_error_choices_within(*columns[:2], capacity, columns[2], every) == plain


def test_most_choices_are_the_best_of_all() -> None:
    generator, exact = np.random.default_rng(0), 0
    for _ in range(60):
        given_items = []
        for number in range(6):
            errors = np.sort(generator.random(4))[::-1].copy()
            costs = np.cumsum(generator.integers(1, 6, 4))
            given_items.append((errors, costs, np.arange(4) * (number % 2)))
        columns = list(zip(*given_items, strict=True))
        (least, most), (_, every) = ends(given_items)
        capacity, limit = (least + most) // 2, every // 2
        chosen = least_error_choices_within(*columns[:2], capacity, columns[2], limit)
        each = (totals(given_items, x) for x in product(range(4), repeat=6))
        best = min(e for e, c, o in each if c <= capacity and o <= limit)
        exact += totals(given_items, chosen)[0] <= best + 1e-9
    assert exact >= 50


def test_capacities_that_cannot_be_kept_are_refused() -> None:
    one = (np.array([1.0, 0.0]),), (np.array([2, 3]),)
    with pytest.raises(ValueError, match="the fewest others are 1, the limit is 0"):
        least_error_choices_within(*one, 3, (np.array([1, 2]),), 0)
    with pytest.raises(ValueError, match="the cheapest choices cost 2, the capacity is 1"):
        least_error_choices_within(*one, 1, (np.array([1, 2]),), 2)


def problem(sparsity: float, limit: int, seed: int, whole: bool = False) -> AllocationProblem:
    """Four blocks of an FFN with 64 channels and an attention with 4 groups of 8 columns."""
    generator = torch.Generator().manual_seed(seed)
    units = (Units(64), Units(4, columns=8)) * 4
    scores = tuple(torch.rand(own.size, generator=generator).double() for own in units)
    curves = []
    for own in units:
        errors = torch.rand(own.count, generator=generator).double().cumsum(0)
        curves.append(
            ErrorCurve(torch.arange(own.count + 1), torch.cat([errors.flip(0), torch.zeros(1)]))
        )
    steps = tuple(Steps(own.count, 4 if own.are_channels else 1, whole) for own in units)
    kv = KVLimit((0, 1) * 4, limit)
    costs = (3, 40) * 4
    return AllocationProblem(
        torch.ones(8), scores, sparsity, units, costs, steps, tuple(curves), kv
    )


@settings(max_examples=60, deadline=None)
@given(
    sparsity=st.floats(0.05, 0.6),
    limit=st.integers(4, 16),
    seed=st.integers(0, 9),
    whole=st.booleans(),
)
def test_widths_meet_the_budget_beside_the_limit(
    sparsity: float, limit: int, seed: int, whole: bool
) -> None:
    some = problem(sparsity, limit, seed, whole)
    widths = allocate_widths(some, "knapsack")
    channels, groups = widths[::2], widths[1::2]
    assert sum(groups) <= limit
    spent = 3 * sum(channels) + 40 * sum(groups)
    if min(channels) < 64:
        assert abs(spent - some.budget) <= 3 * 4 / 2 + 0.5
    else:  # so few groups may stay that whole FFNs leave something of the budget
        assert spent <= some.budget + 6.5
    free = ALLOCATORS["knapsack"].widths(replace(some, kv=None))
    if free[1::2].sum() <= limit:
        assert list(groups) == free[1::2].tolist()


@settings(max_examples=60, deadline=None)
@given(sparsity=st.floats(0.05, 0.6), limit=st.integers(4, 16))
def test_even_widths_keep_the_limit(sparsity: float, limit: int) -> None:
    some = problem(sparsity, limit, 0)
    budget = ChannelBudget(sparsity, some.costs, kv=some.kv)
    widths = even_widths(some.steps, sparsity, budget)
    assert sum(widths[1::2]) <= limit
    assert max(widths[1::2]) - min(widths[1::2]) <= 1
    assert max(widths[::2]) - min(widths[::2]) <= 4


@pytest.mark.parametrize("allocator", sorted(set(ALLOCATORS) - {"search"}))
def test_parts_that_cost_nothing_keep_all_that_they_may(allocator: str) -> None:
    free = replace(problem(0.5, 16, 0), kv=None, costs=(0, 1) * 4)
    widths = allocate_widths(free, allocator)
    assert widths[::2] == (64,) * 4
    assert sum(widths[1::2]) == 8


def test_no_step_is_taken_from_a_part_that_costs_nothing() -> None:
    ideal, steps = torch.tensor([10.0, 4.0]), [Steps(10), Steps(4)]
    assert apportion(ideal, steps, 2.0, torch.zeros(2), [0, 1]) == (10, 2)
    assert apportion(ideal * 0.1, steps, 3.0, torch.zeros(2), [0, 1]) == (10, 3)
