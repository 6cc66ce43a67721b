import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, UNIT, few_examples, off_by, random_matrix, same_bits

from cfsp_kernels import block_influence

# NumPy, under the interpreter, reports infinities that a GPU passes on in silence.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def exact_metrics(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[T, 4] fp64: angle / pi by Kahan's formula, which holds at every angle, then 1 - cos, mse,
    mae. No row of zeros."""
    x, y = x.cpu().double(), y.cpu().double()
    u, v = (m / m.norm(dim=1, keepdim=True) for m in (x, y))
    angle = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
    cosine = 2 * torch.sin(angle / 2) ** 2
    difference = y - x
    return torch.stack(
        [angle / math.pi, cosine, difference.square().mean(1), difference.abs().mean(1)], 1
    )


def check(x, y, backend) -> None:
    """Every sum within the bound of fp32 sums of rows.

    A sum over D errs by n units, n the additions in a row of one tile. 1 - cos then errs by n
    units of d / (2 |x| |y|), and 1 + cos, which serves past a right angle, by n units of
    |x + y|^2 / (2 |x| |y|); an angle by that over its sine.
    """
    exact = exact_metrics(x, y)
    a, b = x.cpu().double(), y.cpu().double()
    n = 4 * (x.shape[1] / 2048 + 16) * UNIT
    product = 2 * a.norm(dim=1) * b.norm(dim=1)
    cosine_error = n * (b - a).square().sum(1) / product
    nearest = torch.minimum(cosine_error, n * (b + a).square().sum(1) / product)
    sine = torch.sin(exact[:, 0] * math.pi).clamp_min(1e-99)
    # At an angle of 0 (or pi) the sine is 0, and the error is at most that of a square root.
    angle_error = torch.minimum(nearest / sine, (2 * nearest).sqrt()) / math.pi
    bounds = torch.stack(
        [
            angle_error + n * exact[:, 0],
            cosine_error + n * exact[:, 1],
            n * exact[:, 2],
            n * exact[:, 3],
        ],
        1,
    )
    got = block_influence(x, y, backend=backend)
    assert got.tokens == x.shape[0]
    for value, total, bound in zip(got[1:], exact.sum(0), bounds.sum(0), strict=True):
        assert value.dtype == torch.float64
        assert abs(value.item() - total) <= bound


@few_examples
@given(
    tokens=st.integers(1, 6),
    width=st.sampled_from([1, 2, 63, 576, 2048, 2049, 5000]),
    dtype=st.sampled_from(DTYPES),
    change=st.sampled_from([1e-3, 0.1, 1.0, 100.0]),
    paddings=st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 16])),
)
def test_any_shape(backend, device, tokens, width, dtype, change, paddings):
    x = random_matrix(tokens, width, dtype, device, padding=paddings[0])
    y = random_matrix(tokens, width, dtype, device, padding=paddings[1], seed=1)
    y.mul_(change).add_(x)
    check(x, y, backend)


def turned(x: torch.Tensor, angle: float, growth: float) -> torch.Tensor:
    """``x`` turned by an angle towards a random direction, and scaled."""
    orthogonal = random_matrix(*x.shape, seed=1).double()
    x = x.double()
    orthogonal -= x * (orthogonal * x).sum(1, keepdim=True) / x.square().sum(1, keepdim=True)
    orthogonal *= x.norm(dim=1, keepdim=True) / orthogonal.norm(dim=1, keepdim=True)
    return (growth * (x * math.cos(angle) + orthogonal * math.sin(angle))).float()


@pytest.mark.parametrize("angle", [3.3e-4, 1e-2, 1.0, 3.0])
def test_small_angles_keep_their_digits(backend, device, angle):
    x = random_matrix(8, 4096)
    y = turned(x, angle, growth=1)
    exact = exact_metrics(x, y).sum(0)
    got = block_influence(x.to(device), y.to(device), backend=backend)
    assert got.angular.item() == pytest.approx(exact[0].item(), rel=5e-6)
    assert got.cosine.item() == pytest.approx(exact[1].item(), rel=1e-5)


GROWTHS = (1.02, 1.05, 1.1, 1.2)


def allowed_relative_error(growth: float) -> float:
    """Of 1 - cos at an angle of 1e-3 between x and y, which is ``growth`` times as long.

    1 - cos is (d - l^2) / (2 |x| |y|), l = (|y|^2 - |x|^2) / (|y| + |x|). NVIDIA's square root is
    within 2 units of 2^-24, its division within 2 ulp of the rounded result, 5 units, and a sum or
    product is rounded by 1: l errs by 2 + 1 + 5, l^2 by 16, and that is of nearly all of d, which
    is ``(growth - 1)^2 / (growth 1e-6)`` times what is left of it. 8 units more are for the sums
    over channels, whose roundings mostly cancel. (The quotient of the two adds 11, but of 1 - cos.)
    """
    return (16 + 8) * UNIT * (1 + (growth - 1) ** 2 / (growth * 1e-6))


def test_small_angles_survive_growth(backend, device):
    """Most of d is radial here: it must be subtracted to more digits than two norms have."""
    x = random_matrix(1, 4096)
    for growth in GROWTHS:
        y = turned(x, 1e-3, growth)
        exact = exact_metrics(x, y)[0]
        got = block_influence(x.to(device), y.to(device), backend=backend)
        allowed = allowed_relative_error(growth)
        assert got.cosine.item() == pytest.approx(exact[1].item(), rel=allowed)


def emulated_cosine(x, y, root: int = 0, division: int = 0, from_norms: bool = False) -> float:
    """1 - cos by the kernel's formula, of exact sums, with roots and quotients off by ulps; or
    with |y| - |x| as it stands."""
    square, x_square, y_square = (m.double().square().sum() for m in (y - x, x, y))
    x_norm, y_norm = off_by(x_square.sqrt(), root), off_by(y_square.sqrt(), root)
    radial = ((y - x).double() * (y + x).double()).sum().float()
    longer = off_by(radial.double() / (y_norm + x_norm).double(), division)
    if from_norms:
        longer = y_norm - x_norm
    rest = square.float() - longer * longer
    return off_by(rest.double() / (2 * x_norm * y_norm).double(), division).item()


def test_the_bound_admits_what_hardware_promises_and_no_more():
    x = random_matrix(1, 4096)
    refused = 0
    for growth in GROWTHS:
        y = turned(x, 1e-3, growth)
        exact = pytest.approx(exact_metrics(x, y)[0, 1].item(), rel=allowed_relative_error(growth))
        for root, division in itertools.product((-1, 0, 1), (-2, 0, 2)):
            assert emulated_cosine(x, y, root, division) == exact
        assert emulated_cosine(x, y, root=12) != exact
        refused += emulated_cosine(x, y, from_norms=True) != exact
    assert refused


def test_opposite_and_equal_rows(backend, device):
    x = random_matrix(5, 1000, torch.bfloat16, device)
    opposite = block_influence(x, -x, backend=backend)
    assert opposite.angular.item() == pytest.approx(5, abs=1e-6)
    assert opposite.cosine.item() == pytest.approx(10, abs=1e-5)
    assert [v.item() for v in block_influence(x, x, backend=backend)[1:]] == [0, 0, 0, 0]


def test_rows_of_zeros(backend, device):
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]], device=device)
    y = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], device=device)
    got = block_influence(x, y, backend=backend)
    assert [v.item() for v in got[1:]] == pytest.approx([1.0, 2.0, 25.0, 7.0])


def test_nan_propagates(backend, device):
    x, y = random_matrix(3, 5, device=device), random_matrix(3, 5, device=device, seed=1)
    y[1, 2] = float("nan")
    assert all(v.isnan() for v in block_influence(x, y, backend=backend)[1:])
    y[1, 2] = float("inf")
    got = block_influence(x, y, backend=backend)
    assert got.angular.isnan()
    assert got.cosine.isnan()
    assert got.mse.isinf()


def test_no_token(backend, device):
    x = torch.zeros(0, 8, device=device)
    got = block_influence(x, x, backend=backend)
    assert got.tokens == 0
    assert [v.item() for v in got[1:]] == [0, 0, 0, 0]


def test_no_width_keeps_the_number_of_tokens(backend, device):
    for shape, tokens in (((5, 0), 5), ((2, 5, 0), 10)):
        x = torch.zeros(shape, device=device)
        got = block_influence(x, x, backend=backend)
        assert got.tokens == tokens
        assert [v.item() for v in got[1:]] == [0, 0, 0, 0]


@pytest.mark.parametrize("tokens", [0, 5])
def test_out_is_written(backend, device, tokens):
    x, y = (random_matrix(tokens, 30, device=device, seed=seed) for seed in (0, 1))
    out = torch.full((4,), 7.0, dtype=torch.float64, device=device)
    got = block_influence(x, y, out=out, backend=backend)
    assert same_bits(out, torch.stack(block_influence(x, y, backend=backend)[1:]))
    addresses = [value.data_ptr() for value in got[1:]]
    assert addresses == [out.data_ptr() + 8 * i for i in range(4)]


def test_out_it_cannot_write_is_refused(backend, device):
    memory = torch.zeros(20, dtype=torch.float64, device=device)
    x, y = (memory[i : i + 4].view(torch.float32).view(2, 4) for i in (0, 8))
    for out in (
        memory[:1].expand(4),
        memory[::2][:4],
        memory[3:7],
        memory[11:15],
        memory[:3],
        memory.float()[:4],
    ):
        with pytest.raises(ValueError, match="out"):
            block_influence(x, y, out=out, backend=backend)
    x.fill_(1)
    block_influence(x, y, out=memory[4:8], backend=backend)
    assert memory[4:8].tolist() == pytest.approx([1.0, 2.0, 2.0, 2.0])


def test_batches_and_repeats(backend, device):
    x, y = random_matrix(24, 40, device=device), random_matrix(24, 40, device=device, seed=1)
    whole = block_influence(x, y, backend=backend)
    batched = block_influence(x.view(2, 12, 40), y.view(2, 12, 40), backend=backend)
    assert batched.tokens == 24
    assert all(same_bits(a, b) for a, b in zip(whole[1:], batched[1:], strict=True))
    parts = [block_influence(x[s], y[s], backend=backend) for s in (slice(7), slice(7, None))]
    torch.testing.assert_close(parts[0].mse + parts[1].mse, whole.mse, rtol=1e-12, atol=0)


def test_wrong_arguments_are_refused(backend):
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="shape"):
        block_influence(x, x[:1], backend=backend)
    with pytest.raises(ValueError, match="dtype"):
        block_influence(x, x.half(), backend=backend)
    with pytest.raises(ValueError, match="unit stride"):
        block_influence(x.T, x.T, backend=backend)
