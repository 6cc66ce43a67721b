"""Greedy OBS against brute force in fp64, and what degenerate Gram matrices give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cfsp.pruning.obs
from cfsp.errors import CfspError
from cfsp.pruning.obs import error_curve, order_of, plain_error_curve, removal_order
from cfsp.pruning.planning import select_channels


def random_case(
    hidden: int, channels: int, tokens: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """down [D, F] and a Gram matrix [F, F] of correlated activations, fp64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(tokens, channels) @ normal(channels, channels)
    return normal(hidden, channels), x.T @ x / tokens


def refit_errors(
    down: torch.Tensor, gram: torch.Tensor, kept: list[int], damping: float
) -> tuple[float, float]:
    """tr(Delta H Delta^T) and tr(Delta G Delta^T) after the damped refit, by the formula."""
    own = gram.diagonal()
    damped = gram + damping * torch.diag(own.clamp_min(1e-3 * own.mean()))
    delta = -down.clone()
    if kept:
        delta[:, kept] += down @ damped[:, kept] @ torch.linalg.inv(damped[kept][:, kept])
    return tuple(float((delta @ m * delta).sum()) for m in (damped, gram))  # type: ignore[return-value]


@settings(max_examples=25, deadline=None)
@given(
    hidden=st.integers(1, 6),
    channels=st.integers(1, 9),
    tokens=st.integers(1, 20),
    damping=st.sampled_from([1e-3, 1e-2, 0.3]),
    seed=st.integers(0, 100),
)
def test_every_removal_is_the_one_that_costs_least(
    hidden: int, channels: int, tokens: int, damping: float, seed: int
) -> None:
    down, gram = random_case(hidden, channels, tokens, seed)
    removal = removal_order(down, gram, damping)
    kept = list(range(channels))
    for channel, error in zip(removal.order.tolist(), removal.error.tolist(), strict=True):
        errors = {
            i: refit_errors(down, gram, [k for k in kept if k != i], damping)[0] for i in kept
        }
        tolerance = 1e-8 * float((down @ gram * down).sum())
        assert errors[channel] <= min(errors.values()) + tolerance
        assert error == pytest.approx(errors[channel], rel=1e-8, abs=tolerance)
        kept.remove(channel)
    assert kept == []


@settings(max_examples=25, deadline=None)
@given(
    hidden=st.integers(1, 6),
    channels=st.integers(1, 12),
    tokens=st.integers(1, 20),
    damping=st.sampled_from([1e-3, 1e-2, 0.3]),
    seed=st.integers(0, 100),
)
def test_the_error_curve_is_the_refit_at_every_width(
    hidden: int, channels: int, tokens: int, damping: float, seed: int
) -> None:
    down, gram = random_case(hidden, channels, tokens, seed)
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
    widths = torch.arange(channels + 1)[seed % 2 :]
    errors = error_curve(down, gram, order, widths, damping)
    for width, error in zip(widths.tolist(), errors.tolist(), strict=True):
        expected = refit_errors(down, gram, order[channels - width :].tolist(), damping)[1]
        assert error == pytest.approx(expected, rel=1e-7, abs=1e-9 * float(gram.trace()))
    sparse = error_curve(down, gram, order, widths[::3], damping)
    assert torch.allclose(sparse, errors[::3], rtol=1e-8, atol=1e-10 * float(gram.trace()))


def test_the_highest_scores_are_what_the_greedy_removal_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    down, gram = random_case(16, 150, 90, 3)
    removal = removal_order(down, gram)
    assert removal.scores.min() >= 0
    assert removal.scores.max() == pytest.approx(1, abs=1e-6)
    for width in (1, 37, 149, 150):
        left = removal.order[150 - width :].sort().values
        assert torch.equal(select_channels(removal.scores, width), left)
    monkeypatch.setattr(cfsp.pruning.obs, "STEPS_PER_UPDATE", 1)
    assert torch.equal(removal_order(down, gram).order, removal.order)


def test_greedy_removal_errs_less_than_the_order_of_the_norms() -> None:
    down, gram = random_case(24, 60, 400, 1)
    widths = torch.tensor([15, 30, 45])
    greedy = error_curve(down, gram, removal_order(down, gram).order, widths)
    norms = error_curve(down, gram, gram.diagonal().argsort(), widths)
    assert (greedy < norms).all()


def test_dead_channels_go_first_and_twins_one_at_a_time() -> None:
    down, gram = random_case(8, 12, 50, 0)
    gram[3], gram[:, 3], gram[7], gram[:, 7] = 0, 0, 0, 0
    gram[5], gram[:, 5] = gram[2], gram[:, 2]
    gram[5, 5], gram[2, 5], gram[5, 2] = (gram[2, 2].clone(),) * 3
    down[:, 7] = down[:, 3]
    order = removal_order(down, gram, 1e-6).order.tolist()
    assert order.index(7) < order.index(3)  # equal: the higher index goes first
    assert len({2, 3, 5, 7} & set(order[:3])) == 3
    assert not {2, 5} <= set(order[:4])
    lost = error_curve(down, gram, torch.tensor(order), torch.tensor([9, 10, 12]), 1e-6)
    energy = float((down @ gram * down).sum())
    assert lost.tolist() == pytest.approx([0, 0, 0], abs=1e-9 * energy)


def test_constant_channels_stand_in_for_each_other() -> None:
    down, _ = random_case(4, 6, 50, 0)
    x = torch.ones(50, 6, dtype=torch.float64) * torch.arange(1.0, 7.0)
    errors = error_curve(down, x.T @ x / 50, torch.arange(6), torch.arange(7), 1e-9)
    assert (errors[1:] < 1e-6 * errors[0]).all()


def test_without_activations_the_weights_decide() -> None:
    down = torch.tensor([[3.0, 0.0, 1.0, 0.0, 2.0]])
    removal = removal_order(down, torch.zeros(5, 5))
    assert removal.order.tolist() == [3, 1, 2, 4, 0]
    assert error_curve(down, torch.zeros(5, 5), removal.order, torch.arange(6)).eq(0).all()
    assert removal_order(down * 0, torch.zeros(5, 5)).scores.unique().numel() == 5


@pytest.mark.parametrize(
    ("damping", "message"), [(0.0, "use a larger damping"), (-1.0, "0 or more, got -1")]
)
def test_a_singular_gram_needs_damping(damping: float, message: str) -> None:
    down, gram = random_case(4, 6, 2, 0)
    gram[0], gram[:, 0] = 0, 0
    with pytest.raises(CfspError, match=message):
        removal_order(down, gram, damping)
    with pytest.raises(CfspError, match=message):
        error_curve(down, gram, torch.arange(6), torch.arange(7), damping)


def test_bf16_weights_and_an_fp32_gram_are_taken_as_they_are() -> None:
    down, gram = random_case(8, 20, 60, 2)
    half, single = down.bfloat16(), gram.float()
    order = removal_order(half, single).order
    assert torch.equal(order, removal_order(half.double(), single.double()).order)
    assert single.diagonal().equal(gram.float().diagonal())  # not damped in place


@settings(max_examples=25, deadline=None)
@given(
    hidden=st.integers(1, 6),
    channels=st.integers(1, 12),
    tokens=st.integers(1, 20),
    seed=st.integers(0, 100),
)
def test_the_plain_error_curve_is_what_the_removed_columns_gave(
    hidden: int, channels: int, tokens: int, seed: int
) -> None:
    down, gram = random_case(hidden, channels, tokens, seed)
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
    widths = torch.arange(channels + 1)
    errors = plain_error_curve(down, gram, order, widths)
    for width, error in zip(widths.tolist(), errors.tolist(), strict=True):
        gone = order[: channels - width]
        lost = down[:, gone]
        expected = float((lost @ gram[gone][:, gone] * lost).sum())
        assert error == pytest.approx(expected, rel=1e-8, abs=1e-9 * float(gram.trace()))
    refitted = error_curve(down, gram, order, widths, 1e-3)
    assert (refitted <= errors * (1 + 1e-9) + 1e-9 * float(gram.trace())).all()


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_the_order_of_scores_leaves_what_selection_keeps(width: int) -> None:
    scores = torch.tensor([1.0, 0.5, 1.0, 0.5, 0.5, 2.0])
    left = order_of(scores)[len(scores) - width :].sort().values
    assert torch.equal(left, select_channels(scores, width))
