"""Widths: the published formula, the budget, ties, and what cannot be met."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsp.apportion import Steps, apportion
from cfsp.calibration.curves import ErrorCurve
from cfsp.errors import CfspError
from cfsp.models.parts.channels import Units
from cfsp.pruning.allocation import (
    ALLOCATORS,
    AllocationProblem,
    allocate_widths,
    cfsp_keep_fractions,
    equal_widths,
    importance_shares,
)
from cfsp.pruning.compensation import COMPENSATIONS
from cfsp.pruning.scoring import SCORERS


def problem(
    sizes: list[int], sparsity: float, seed: int = 0, multiple: int = 1
) -> AllocationProblem:
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(len(sizes), generator=generator, dtype=torch.float64) * 0.5
    scores = tuple(torch.rand(size, generator=generator, dtype=torch.float64) for size in sizes)
    curves = tuple(
        ErrorCurve(torch.arange(size + 1), torch.cat([score.cumsum(0).flip(0), torch.zeros(1)]))
        for size, score in zip(sizes, scores, strict=True)
    )
    steps = tuple(Steps(size, multiple) for size in sizes)
    return AllocationProblem(importance, scores, sparsity, steps=steps, curves=curves)


def test_cfsp_fractions_follow_the_formula_where_nothing_is_contracted() -> None:
    importance = torch.tensor([1000.0, 2000.0, 3000.0], dtype=torch.float64)
    keep = cfsp_keep_fractions(importance, 0.5)
    share = 1 / (1 + torch.exp(-(importance - 2000) / 1e4))
    assert torch.allclose(keep, share / share.mean() * 0.5, atol=1e-15)


def test_cfsp_fractions_are_contracted_so_that_none_reaches_one() -> None:
    keep = cfsp_keep_fractions(torch.tensor([0.0, 0.0, 1e6], dtype=torch.float64), 0.3)
    assert float(keep.max()) == pytest.approx(0.7 + 0.3 / 1.05)
    assert float(keep.mean()) == pytest.approx(0.7)


def test_filled_fractions_are_those_of_the_formula_where_none_is_over_one() -> None:
    importance = torch.tensor([0.01, 0.02, 0.03], dtype=torch.float64)
    scores = tuple(torch.rand(100) for _ in range(3))
    some = AllocationProblem(importance, scores, 0.5)
    expected = ALLOCATORS["cfsp"].widths(some)
    assert torch.allclose(ALLOCATORS["cfsp-filled"].widths(some), expected, atol=1e-12)


def test_filled_blocks_stay_whole_and_the_others_share_the_rest_in_proportion() -> None:
    importance = torch.tensor([0.1, 0.2, 0.3, 0.9, 0.5], dtype=torch.float64)
    scores = tuple(torch.rand(1000) for _ in range(5))
    some = AllocationProblem(importance, scores, 0.2)
    widths = ALLOCATORS["cfsp-filled"].widths(some)
    assert float(widths.sum()) == pytest.approx(4000)
    share = importance_shares(importance * 131072)
    whole = widths == 1000
    assert whole.tolist() == [False, False, True, True, True]
    assert (share / share.mean() * 0.8 > 1).tolist() == [False, False, False, True, True]
    ratio = widths[~whole] / share[~whole]
    assert torch.allclose(ratio, ratio[:1].expand(2), rtol=1e-12)
    assert bool((ratio.min() * share[whole] >= 1000).all())


@settings(max_examples=60, deadline=None)
@given(
    importance=st.lists(st.floats(0, 1), min_size=1, max_size=12),
    sparsity=st.floats(0, 0.95),
)
def test_filled_widths_meet_the_budget_and_none_is_over_its_size(
    importance: list[float], sparsity: float
) -> None:
    scores = tuple(torch.zeros(60 + 10 * block) for block in range(len(importance)))
    costs = tuple(1 + block % 3 for block in range(len(importance)))
    some = AllocationProblem(torch.tensor(importance).double(), scores, sparsity, costs=costs)
    widths = ALLOCATORS["cfsp-filled"].widths(some)
    assert bool((widths <= some.sizes).all())
    assert bool((widths > 0).all())
    assert float((widths * some.unit_costs).sum()) == pytest.approx(some.budget)
    order = widths / some.sizes
    for one in range(len(importance)):
        for other in range(len(importance)):
            if importance[one] >= importance[other]:
                assert order[one] >= order[other] - 1e-12


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(40, 200), min_size=1, max_size=12),
    sparsity=st.floats(0.0, 0.9),
    multiple=st.sampled_from([1, 4, 7, 16]),
    allocator=st.sampled_from(sorted(ALLOCATORS)),
    seed=st.integers(0, 5),
)
def test_the_budget_is_met_to_half_a_multiple(
    sizes: list[int], sparsity: float, multiple: int, allocator: str, seed: int
) -> None:
    given_problem = problem(sizes, sparsity, seed, multiple)
    try:
        widths = allocate_widths(given_problem, allocator)
    except CfspError:
        units = round(given_problem.budget / multiple)
        assert not len(sizes) <= units <= sum(size // multiple for size in sizes)
        return
    assert abs(sum(widths) - given_problem.budget) <= multiple / 2 + 1e-6
    for width, size in zip(widths, sizes, strict=True):
        assert width % multiple == 0
        assert multiple <= width <= size


@pytest.mark.parametrize("table", [SCORERS, ALLOCATORS, COMPENSATIONS])
def test_every_choice_has_a_line_of_its_own_for_help(table: dict[str, Any]) -> None:
    summaries = [known.summary for known in table.values()]
    assert len(set(summaries)) == len(table)
    assert all(0 < len(summary) < 100 for summary in summaries)


@settings(max_examples=60, deadline=None)
@given(
    ffns=st.lists(
        st.tuples(st.integers(40, 99), st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=9
    ),
    sparsity=st.floats(0.1, 0.8),
    allocator=st.sampled_from(sorted(ALLOCATORS)),
)
def test_a_budget_of_unequal_costs_is_met_to_half_a_channel(
    ffns: list[tuple[int, int, int]], sparsity: float, allocator: str
) -> None:
    sizes, experts, costs = (tuple(column) for column in zip(*ffns, strict=True))
    plain = problem([size * count for size, count in zip(sizes, experts, strict=True)], sparsity)
    units = tuple(map(Units, sizes, experts))
    costly = replace(plain, units=units, costs=costs, steps=())
    widths = allocate_widths(costly, allocator)
    spent = sum(width * cost for width, cost in zip(widths, costs, strict=True))
    least, total = sum(costs), sum(size * cost for size, cost in zip(sizes, costs, strict=True))
    assert costly.budget == pytest.approx((1 - sparsity) * total)
    assert least <= spent <= total
    movable = [c for w, s, c in zip(widths, sizes, costs, strict=True) if 1 < w < s]
    assert abs(spent - costly.budget) <= min(movable, default=max(costs)) / 2 + 0.5


def test_dear_channels_go_first_where_the_cost_counts() -> None:
    scores = (torch.arange(40.0), torch.arange(40.0))
    costly = AllocationProblem(torch.ones(2), scores, 0.5, costs=(1, 3))
    assert costly.unit_costs.tolist() == [1.0, 3.0]
    assert allocate_widths(costly, "global") == (20, 20)
    widths = allocate_widths(replace(costly, importance=torch.tensor([0.0, 0.4])), "cfsp")
    assert widths[1] > widths[0]
    assert widths[0] + 3 * widths[1] == 80


def test_equal_remainders_go_to_the_more_important_block_then_to_the_earlier() -> None:
    ideal = torch.full((4,), 10.5)
    importance = torch.tensor([1.0, 3.0, 3.0, 2.0])
    assert apportion(ideal, [Steps(20)] * 4, 42.0, importance) == (10, 11, 11, 10)
    assert apportion(ideal, [Steps(20)] * 4, 41.0, importance) == (10, 11, 10, 10)


def test_a_multiple_takes_the_nearest_width_first() -> None:
    ideal = torch.tensor([1020.0, 1040.0, 1012.0])
    importance = torch.tensor([1.0, 3.0, 2.0])
    assert apportion(ideal, [Steps(1536, 128)] * 3, 3072.0, importance) == (1024, 1024, 1024)


def test_uniform_keeps_the_same_fraction_everywhere() -> None:
    assert allocate_widths(problem([100, 50, 100], 0.3), "uniform") == (70, 35, 70)


def test_global_threshold_standardises_each_block() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, 10.0], dtype=torch.float64)
    same = AllocationProblem(torch.ones(2), (scores, scores * 1000), 0.5)
    assert allocate_widths(same, "global") == (2, 2)
    spiked = AllocationProblem(torch.ones(2), (scores, torch.arange(4.0)), 0.5)
    assert (
        ALLOCATORS["global"].widths(spiked).tolist() == [1.0, 3.0]
        or sum(allocate_widths(spiked, "global")) == 4
    )


def test_global_counts_are_those_of_the_sorted_standardised_scores() -> None:
    given_problem = problem([30, 40, 50], 0.4)
    z = [(s - s.mean()) / s.std() for s in given_problem.scores]
    threshold = torch.cat(z).sort(descending=True).values[round(given_problem.budget) - 1]
    expected = [int((block >= threshold).sum()) for block in z]
    assert list(allocate_widths(given_problem, "global")) == expected


def test_cfsp_allocation_does_not_change_with_the_amount_of_data() -> None:
    mean_angle = torch.tensor([0.5, 0.1, 0.1, 0.2], dtype=torch.float64)
    scores = tuple(torch.rand(1536) for _ in range(4))
    widths = allocate_widths(AllocationProblem(mean_angle, scores, 0.3), "cfsp")
    expected = cfsp_keep_fractions(mean_angle * 131072, 0.3) * 1536
    assert all(abs(w - e) <= 1 for w, e in zip(widths, expected.tolist(), strict=True))
    assert sum(widths) == round(0.7 * 4 * 1536)


@pytest.mark.parametrize(
    ("sparsity", "multiple", "message"),
    [
        (0.999, 1, "no widths meet sparsity 0.999 in multiples of 1: 4 FFNs can reach 0 to"),
        (0.1, 128, "width_multiple 128 is more than the 48 channels of FFN 0"),
        (0.0, 32, "no widths meet sparsity 0 in multiples of 32"),
    ],
)
def test_a_budget_that_no_width_meets_is_refused(
    sparsity: float, multiple: int, message: str
) -> None:
    with pytest.raises(CfspError, match=message):
        allocate_widths(problem([48] * 4, sparsity, multiple=multiple), "uniform")


def test_equal_widths_are_one_fraction_of_every_size() -> None:
    def steps(sizes: list[int], multiple: int) -> list[Steps]:
        return [Steps(size, multiple) for size in sizes]

    assert equal_widths(steps([1536] * 3, 128), 0.3) == (1024,) * 3
    assert equal_widths(steps([2048, 18432, 4096], 128), 0.3) == (1408, 9 * 1408, 2 * 1408)
    assert equal_widths(steps([100, 150], 8), 0.99) == (8, 8)
    assert equal_widths(steps([100, 150], 8), 0.0) == (96, 144)
