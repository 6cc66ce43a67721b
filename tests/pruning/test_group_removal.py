"""Groups of columns in greedy order of removal, against trying every one of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsp.pruning.least_squares import ridge_of
from cfsp.pruning.obs import error_curve, group_removal_order, order_of, removal_order


def problem(groups: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = groups * columns
    mixed = torch.randn(size, size, generator=generator)
    x = torch.randn(8 * size, size, generator=generator) @ mixed
    return torch.randn(5, size, generator=generator), x.T @ x / len(x)


def cost(down: torch.Tensor, gram: torch.Tensor, kept: list[int], damping: float) -> float:
    """tr(W H W^T) that no choice of kept columns can give back."""
    weights, damped = down.double(), gram.double()
    damped.diagonal().add_(damping * ridge_of(gram.double()))
    whole = float(((weights @ damped) * weights).sum())
    across = weights @ damped[:, kept]
    explained = torch.linalg.solve(damped[kept][:, kept], across.T).T
    return whole - float((explained * across).sum())


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_each_group_that_goes_is_the_one_that_costs_least(
    groups: int, columns: int, seed: int
) -> None:
    down, gram = problem(groups, columns, seed)
    found = group_removal_order(down, gram, columns, 0.2)
    left = list(range(groups))
    for step, gone in enumerate(found.order.view(groups, columns)):
        assert gone.tolist() == list(range(int(gone[0]), int(gone[0]) + columns))

        def without(group: int) -> float:
            stay = [g * columns + c for g in left if g != group for c in range(columns)]
            return cost(down, gram, stay, 0.2)

        group = int(gone[0]) // columns
        assert without(group) == pytest.approx(min(map(without, left)), rel=1e-6)
        assert float(found.error[step * columns]) == pytest.approx(without(group), rel=1e-6)
        left.remove(group)


def test_groups_of_one_column_are_channels() -> None:
    down, gram = problem(12, 1, 0)
    alone, grouped = removal_order(down, gram), group_removal_order(down, gram, 1)
    assert torch.equal(alone.order, grouped.order)
    assert torch.allclose(alone.error, grouped.error)


def test_scores_keep_what_greedy_removal_leaves() -> None:
    down, gram = problem(5, 3, 1)
    scores = group_removal_order(down, gram, 3).scores
    assert (scores.view(5, 3).diff(dim=1) < 1e-9).all()
    order = order_of(scores.view(5, 3).mean(1))
    expected = group_removal_order(down, gram, 3).order.view(5, 3)[:, 0] // 3
    assert torch.equal(order, expected)


def test_the_curve_of_that_order_ends_at_the_energy() -> None:
    down, gram = problem(4, 3, 2)
    order = group_removal_order(down, gram, 3).order
    errors = error_curve(down, gram, order, torch.arange(0, 13, 3))
    energy = float(((down.double() @ gram.double()) * down).sum())
    assert float(errors[0]) == pytest.approx(energy, rel=1e-6)
    assert (errors.diff() <= 1e-9).all()
    assert float(errors[-1]) == pytest.approx(0, abs=1e-9 * energy)
