"""Widths of least error: the exact optimum, the budget, and what the errors are measured in."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsp.apportion import Steps
from cfsp.calibration.curves import ErrorCurve, curve_widths, hidden_energy, of_experts, weighted
from cfsp.errors import CfspError
from cfsp.models.parts.channels import Units
from cfsp.pruning.allocation import AllocationProblem, allocate_widths
from cfsp.pruning.knapsack import least_error_choices


def convex_curve(size: int, steepness: float, energy: float = 1.0) -> ErrorCurve:
    widths = curve_widths(size)
    return ErrorCurve(widths, energy * (1 - widths.double() / size) ** steepness)


def problem(curves: list[ErrorCurve], sparsity: float, multiple: int = 1) -> AllocationProblem:
    sizes = [int(curve.widths[-1]) for curve in curves]
    scores = tuple(torch.zeros(size) for size in sizes)
    steps = tuple(Steps(size, multiple) for size in sizes)
    return AllocationProblem(
        torch.ones(len(sizes)), scores, sparsity, steps=steps, curves=tuple(curves)
    )


@settings(max_examples=150, deadline=None)
@given(
    items=st.lists(
        st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12)), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    ),
    factor=st.sampled_from([1, 7, 1000]),
    slack=st.integers(0, 40),
)
def test_the_choices_are_those_of_brute_force(
    items: list[list[tuple[float, int]]], factor: int, slack: int
) -> None:
    errors = [np.array([error for error, _ in item]) for item in items]
    costs = [np.array([cost * factor for _, cost in item]) for item in items]
    capacity = sum(int(cost.min()) for cost in costs) + slack * factor
    found = least_error_choices(errors, costs, capacity)

    def total(values: list[np.ndarray], choices: tuple[int, ...]) -> float:
        return sum(value[choice] for value, choice in zip(values, choices, strict=True))

    assert total(costs, tuple(found)) <= capacity
    least = min(
        total(errors, choices)
        for choices in itertools.product(*(range(len(item)) for item in items))
        if total(costs, choices) <= capacity
    )
    assert total(errors, tuple(found)) == pytest.approx(least, abs=1e-12)


def test_costs_without_a_divisor_are_rounded_up() -> None:
    costs = [np.array([1, 1_000_003]), np.array([1, 999_983])]
    errors = [np.array([1.0, 0.0]), np.array([0.5, 0.0])]
    assert least_error_choices(errors, costs, 2_000_100) == [1, 1]
    assert least_error_choices(errors, costs, 1_999_985) == [1, 0]
    with pytest.raises(ValueError, match="the cheapest choices cost 2, the capacity is 1"):
        least_error_choices(errors, costs, 1)


def test_a_large_model_is_allocated_within_seconds() -> None:
    curves = [convex_curve(28672, 1 + block % 7) for block in range(80)]
    started = time.perf_counter()
    widths = allocate_widths(problem(curves, 0.3, 128), "knapsack")
    assert time.perf_counter() - started < 5
    assert abs(sum(widths) - 0.7 * 80 * 28672) <= 64


@pytest.mark.parametrize("multiple", [4, 8, 32])
def test_widths_are_those_of_least_error_on_the_grid(multiple: int) -> None:
    curves = [convex_curve(64, p, e) for p, e in ((1, 1.0), (2, 3.0), (6, 0.5))]
    widths = allocate_widths(problem(curves, 0.5, multiple), "knapsack")

    def error(choice: tuple[int, ...]) -> float:
        return sum(
            float(curve.at(torch.tensor([width]))[0])
            for curve, width in zip(curves, choice, strict=True)
        )

    choices = itertools.product(range(multiple, 65, multiple), repeat=3)
    least = min(error(choice) for choice in choices if sum(choice) <= 96)
    assert sum(widths) == 96
    assert error(widths) == pytest.approx(least)


@settings(max_examples=40, deadline=None)
@given(
    powers=st.lists(st.floats(0.5, 8), min_size=1, max_size=6),
    sparsity=st.floats(0.05, 0.7),
)
def test_a_larger_budget_raises_no_error(powers: list[float], sparsity: float) -> None:
    curves = [convex_curve(128, power) for power in powers]

    def result(removed: float) -> tuple[float, int]:
        widths = allocate_widths(problem(curves, removed, 2), "knapsack")
        errors = [
            float(curve.at(torch.tensor([width]))[0])
            for curve, width in zip(curves, widths, strict=True)
        ]
        return sum(errors), sum(widths)

    error, total = result(sparsity)
    less_error, more = result(sparsity * 0.8)
    assert less_error <= error + 1e-12
    assert more >= total


def test_dear_channels_and_experts_count_as_often_as_they_are() -> None:
    curves = [convex_curve(64, 2), convex_curve(64, 2)]
    scores = (torch.zeros(64), torch.zeros(256))
    units = (Units(64), Units(64, experts=4))
    even = AllocationProblem(torch.ones(2), scores, 0.5, units, curves=tuple(curves))
    single, expert = allocate_widths(even, "knapsack")
    assert single > expert
    assert abs(single + 4 * expert - 160) <= 2
    dear = replace(problem(curves, 0.5), costs=(3, 1))
    first, second = allocate_widths(dear, "knapsack")
    assert first < second
    assert abs(3 * first + second - 128) <= 1


def test_without_curves_it_is_refused() -> None:
    bare = replace(problem([convex_curve(64, 1)], 0.5), curves=())
    with pytest.raises(CfspError, match="needs error curves"):
        allocate_widths(bare, "knapsack")


def test_a_multiple_wider_than_an_ffn_is_refused() -> None:
    with pytest.raises(CfspError, match="width_multiple 128 is more than the 64 channels"):
        allocate_widths(problem([convex_curve(64, 1)], 0.5, 128), "knapsack")


def test_errors_are_scaled_as_asked() -> None:
    curves = [convex_curve(8, 1, 4.0), convex_curve(8, 1, 0.0)]
    importance = torch.tensor([0.5, 2.0])
    by_output = weighted(curves, importance, [10.0, 10.0], "output", 0)
    assert by_output[0].errors[0] == 1
    assert by_output[1].errors.eq(0).all()  # an FFN without output loses nothing
    by_hidden = weighted(curves, importance, [10.0, float("inf")], "hidden", 0)
    assert by_hidden[0].errors[0] == pytest.approx(0.4)
    assert weighted(curves, importance, [1.0, 1.0], "absolute", 2)[0].errors[0] == 1


def test_the_hidden_energy_is_found_from_the_change_of_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    x, turn = (torch.randn(500, 64, generator=generator).double() for _ in range(2))
    y = x + 0.05 * turn
    cosine = 1 - torch.nn.functional.cosine_similarity(x, y)
    energy = hidden_energy(float((y - x).square().mean()), float(cosine.mean()))
    assert energy == pytest.approx(float(x.square().mean()), rel=0.05)
    assert hidden_energy(1.0, 0.0) == float("inf")


def test_experts_count_by_their_tokens() -> None:
    curves = [convex_curve(8, 1, 1.0), convex_curve(8, 1, 5.0)]
    assert of_experts(curves, (3, 1), 4).errors[0] == pytest.approx(2.0)
    assert of_experts(curves, (3, 1), 2).errors[0] == pytest.approx(4.0)  # two for each token
    assert of_experts(curves, (0, 0), 4).errors.eq(0).all()


@pytest.mark.parametrize("channels", [1, 63, 64, 65, 1536, 14336])
def test_curve_widths_run_from_nothing_to_everything(channels: int) -> None:
    widths = curve_widths(channels)
    assert widths[0] == 0
    assert widths[-1] == channels
    assert len(widths) <= 65
    assert (widths.diff() > 0).all()


def test_a_curve_is_linear_between_its_widths() -> None:
    curve = ErrorCurve(torch.tensor([0, 10, 20, 23]), torch.tensor([4.0, 2.0, 1.0, 0.0]).double())
    asked = torch.tensor([0, 5, 10, 15, 20, 23])
    assert curve.at(asked).tolist() == [4.0, 3.0, 2.0, 1.5, 1.0, 0.0]
