"""The search over widths: what it may change, what it finds, and that it is repeatable."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsp.pruning.search import search_widths


@settings(max_examples=60, deadline=None)
@given(
    units=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=6),
    multiple=st.sampled_from([1, 8]),
    seed=st.integers(0, 9),
)
def test_every_candidate_keeps_the_cost_and_stays_in_range(
    units: list[tuple[int, int]], multiple: int, seed: int
) -> None:
    sizes = [40 * multiple + 3] * len(units)
    costs = [cost for _, cost in units]
    start = tuple(count * multiple for count, _ in units)
    seen: list[tuple[int, ...]] = []

    def evaluate(widths: tuple[int, ...]) -> float:
        seen.append(widths)
        return math.nan if len(seen) % 3 == 0 else float(sum(w * w for w in widths))

    found = search_widths(
        evaluate, start, sizes, multiple, costs=costs, generations=4, offspring=3, seed=seed
    )
    assert seen[0] == start
    assert len(seen) == len(set(seen)) == found.evaluations <= 13
    spent = sum(w * c for w, c in zip(start, costs, strict=True))
    for widths in seen:
        assert sum(w * c for w, c in zip(widths, costs, strict=True)) == spent
        assert all(w % multiple == 0 for w in widths)
        assert all(multiple <= w <= s for w, s in zip(widths, sizes, strict=True))
    assert found.loss <= found.start_loss


def test_it_finds_the_widths_of_least_loss_and_the_same_ones_again() -> None:
    target = (96, 32, 64, 64)

    def evaluate(widths: tuple[int, ...]) -> float:
        return sum((w - t) ** 2 for w, t in zip(widths, target, strict=True))

    runs = [
        search_widths(evaluate, [64] * 4, [128] * 4, 8, generations=60, offspring=4, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert [run.widths for run in runs] == [target] * 3
    assert runs[0] == runs[1]
    assert (runs[0].loss, runs[0].start_loss) == (0, 2 * 32**2)


@pytest.mark.parametrize(("start", "sizes"), [([8], [16]), ([16, 16], [16, 16]), ([8, 8], [8, 8])])
def test_where_nothing_can_move_the_start_is_the_result(start: list[int], sizes: list[int]) -> None:
    found = search_widths(lambda widths: math.nan, start, sizes, 8)
    assert (found.widths, found.evaluations) == (tuple(start), 1)
    assert found.loss == math.inf
