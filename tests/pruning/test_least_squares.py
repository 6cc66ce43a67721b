"""The fit of what is kept, against least squares in fp64; and what has no well-posed fit."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsp.calibration.grams import Gram, HeldOut
from cfsp.distributed import ALONE
from cfsp.pruning import least_squares
from cfsp.pruning.least_squares import fit_down, output_errors, solve_damped


def gram_of(x: torch.Tensor) -> Gram:
    return Gram(len(x), x.double().sum(0), (x.double().T @ x.double()).float())


def held_out(x: torch.Tensor) -> HeldOut:
    """Of two micro-batches."""
    half = len(x) // 2
    return HeldOut({0: x[:half], 1: x[half:]}, len(x), 2, ALONE)


def problem(
    tokens: int, channels: int, hidden: int, width: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, F] with correlated channels of a mean, down [D, F], kept [width]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator)
    x = x @ torch.randn(channels, channels, generator=generator) + 0.5
    down = torch.randn(hidden, channels, generator=generator)
    kept = torch.randperm(channels, generator=generator)[:width].sort().values
    return x, down, kept


def reference(
    x: torch.Tensor, down: torch.Tensor, kept: torch.Tensor, damping: float, bias: bool
) -> torch.Tensor:
    """The new columns, by a least-squares solver on the tokens themselves."""
    x, down = x.double(), down.double()
    if bias:
        x = x - x.mean(0)
    own = x[:, kept].square().mean(0)
    weight = (damping * own.clamp_min(1e-3 * own.mean()) * len(x)).sqrt().diag()
    matrix = torch.cat([x[:, kept], weight])
    target = torch.cat([x @ down.T, weight @ down[:, kept].T])
    return torch.linalg.lstsq(matrix, target).solution.T


@settings(max_examples=30, deadline=None)
@given(
    channels=st.integers(1, 23),
    hidden=st.integers(1, 9),
    seed=st.integers(0, 99),
    damping=st.sampled_from([1e-3, 0.1, 3.0]),
    bias=st.booleans(),
    data=st.data(),
)
def test_it_is_the_least_squares_solution(
    channels: int,
    hidden: int,
    seed: int,
    damping: float,
    bias: bool,
    data: st.DataObject,
) -> None:
    width = data.draw(st.integers(1, channels))
    tokens = data.draw(st.integers(2, 60))
    x, down, kept = problem(tokens, channels, hidden, width, seed)
    fit = fit_down(down, kept, gram_of(x), damping, bias=bias)
    assert fit is not None
    expected = reference(x, down, kept, damping, bias)
    # x^T x is kept in fp32: taking the means off two tokens that are about equal cancels.
    own = x[:, kept].double()
    own = (own - own.mean(0) if bias else own).square().mean(0)
    least = own.clamp_min(1e-3 * own.mean()).min()
    rounded = 2**-23 * float(x.double().square().mean(0).max() / least) / damping
    assert (fit.weight - expected).abs().max() < (1e-4 + rounded) * expected.abs().max()
    assert fit.damping == damping
    assert (fit.bias is not None) == bias
    if fit.bias is not None:
        mean = x.double().mean(0)
        added = down.double() @ mean - fit.weight.double() @ mean[kept]
        assert torch.allclose(fit.bias.double(), added, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_removed_changes_nothing(bias: bool, dtype: torch.dtype) -> None:
    x, down, _ = problem(70, 13, 6, 13)
    down = down.to(dtype)
    fit = fit_down(down, torch.arange(13), gram_of(x), 0.1, bias=bias)
    assert fit is not None
    assert fit.weight.dtype == dtype
    assert torch.equal(fit.weight, down)
    assert fit.bias is None or torch.equal(fit.bias, torch.zeros(6, dtype=dtype))


def few_tokens(x: torch.Tensor) -> torch.Tensor:
    return x[:5]


def dead(x: torch.Tensor) -> torch.Tensor:
    return x * (torch.arange(x.shape[1]) % 3 > 0)


def constant(x: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(x.shape[1]) % 2 > 0, x, 2.0)


def duplicated(x: torch.Tensor) -> torch.Tensor:
    return x[:, torch.arange(x.shape[1]) // 2]


def one_token(x: torch.Tensor) -> torch.Tensor:
    return x[:1]


@pytest.mark.parametrize("change", [few_tokens, dead, constant, duplicated, one_token])
@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
def test_singular_moments_give_finite_weights_that_fit_no_worse(
    change: Callable[[torch.Tensor], torch.Tensor], damping: float, bias: bool
) -> None:
    x, down, kept = problem(200, 18, 7, 11)
    gram = gram_of(change(x))
    fit = fit_down(down, kept, gram, damping, bias=bias)
    if fit is None:  # the covariance of one token is zero
        assert change is one_token
        assert bias
        return
    assert fit.weight.isfinite().all()
    assert damping <= fit.damping <= 1
    candidates = [(down[:, kept], None), (fit.weight, fit.bias)]
    before, after = output_errors(down, kept, candidates, held_out(change(x)))
    assert after <= before * (1 + 1e-5)


def test_damping_is_raised_where_there_is_no_factor() -> None:
    x, down, kept = problem(200, 18, 7, 11)
    gram = gram_of(x)
    gram.product.diagonal().sub_(0.3 * gram.product.diagonal().mean())  # no longer definite
    fit = fit_down(down, kept, gram, 1e-4)
    assert fit is not None
    assert fit.damping in (pytest.approx(0.1), pytest.approx(1.0))
    fallen = Gram(gram.tokens, gram.sum, gram.product - 1e9 * gram.product.diagonal().mean())
    fallen.product.diagonal().copy_(gram.product.diagonal())
    assert fit_down(down, kept, fallen, 1e-9) is None


@pytest.mark.parametrize("wanted", [1e-4, -1.0])
def test_fp64_is_called_for_where_the_residual_of_fp32_is_large(
    wanted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly equal channels with next to no damping; -1: no residual is small enough."""
    monkeypatch.setattr(least_squares, "RESIDUAL", wanted)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 1, generator=generator) + 1e-4 * torch.randn(400, 30, generator=generator)
    moments, across = (x.double().T @ x.double() / 400), torch.randn(70, 30, generator=generator)
    dtypes = []

    def solution(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
        dtypes.append(matrix.dtype)
        return solve(matrix, right)

    solve = least_squares._solution
    monkeypatch.setattr(least_squares, "_solution", solution)
    damping = 1e-5 if wanted > 0 else 0.1
    solved = solve_damped(moments.float(), across.clone(), damping)
    assert solved is not None
    assert dtypes == [torch.float32, torch.float64]
    assert solved[1] == damping
    rounded = moments.float().double()
    rounded.diagonal().mul_(1 + damping)
    expected = torch.linalg.solve(rounded, across.double(), left=False)
    assert (
        solved[0] - expected
    ).norm() < 0.05 * expected.norm()  # the scaled matrix itself is rounded


def test_fp32_is_enough_for_ordinary_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    x, down, kept = problem(400, 60, 70, 40)
    plain = fit_down(down, kept, gram_of(x), 0.2)
    monkeypatch.setattr(least_squares, "RESIDUAL", -1.0)
    exact = fit_down(down, kept, gram_of(x), 0.2)
    assert plain is not None
    assert exact is not None
    assert (plain.weight - exact.weight).norm() < 1e-5 * exact.weight.norm()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_activations_that_are_zero_or_not_finite_have_no_fit(value: float) -> None:
    x, down, kept = problem(20, 6, 4, 3)
    assert fit_down(down, kept, gram_of(x * value)) is None
    assert fit_down(down, kept, gram_of(x[:0])) is None
    broken = gram_of(x)
    broken.product[4, 4] = value if value else float("nan")
    assert fit_down(down, kept, broken) is None


def test_weights_that_overflow_their_dtype_are_no_fit() -> None:
    x = torch.tensor([[1.0, 2.0], [2.0, 4.0], [-1.0, -2.0]])  # the new column is old + 2 removed
    down = torch.full((3, 2), 3e4)
    assert fit_down(down, torch.tensor([0]), gram_of(x), 1e-6) is not None
    assert fit_down(down.half(), torch.tensor([0]), gram_of(x), 1e-6) is None


@pytest.mark.parametrize("bias", [False, True])
def test_the_error_is_that_of_the_outputs(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "ROWS", 3)
    x, down, kept = problem(150, 17, 8, 9)
    fit = fit_down(down, kept, gram_of(x[:100]), bias=bias)
    assert fit is not None
    dense = x[100:] @ down.T
    new = x[100:][:, kept] @ fit.weight.T + (fit.bias if fit.bias is not None else 0)
    expected = ((dense - new).square().sum() / dense.square().sum()).item()
    candidates = [(down[:, kept] * 0, None), (fit.weight, fit.bias)]
    found = output_errors(down, kept, candidates, held_out(x[100:]))
    assert found == [pytest.approx(1.0), pytest.approx(expected, rel=1e-4)]
    assert output_errors(down, kept, candidates[:1], held_out(x * 0)) == [0]
