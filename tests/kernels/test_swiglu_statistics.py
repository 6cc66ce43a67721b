import math
from itertools import pairwise
from itertools import product as pairs

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, ROUNDOFF, UNIT, few_examples, off_by, random_matrix, same_bits

from cfsp_kernels import channel_statistics, swiglu_statistics
from cfsp_kernels._configs import launch_config

# NumPy, under the interpreter, reports infinities that a GPU passes on in silence.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def exact_activation(name: str, x: torch.Tensor) -> torch.Tensor:
    """fp64, from the definitions."""
    match name:
        case "silu":
            return x / (1 + (-x).exp())
        case "gelu":
            return x / 2 * torch.special.erfc(-x / math.sqrt(2))
        case "gelu_tanh":
            inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
            return x / (1 + (-2 * inner).exp())
        case _:
            return torch.where(x > 0, x * x, torch.zeros_like(x))


def exact_product(activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return exact_activation(activation, gate.cpu().double()) * up.cpu().double()


def allowed_error(activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """How far from the exact product one may be that is computed on hardware as it is promised.

    The activation is fp32. NVIDIA's exponential and division are within 2 ulp of the rounded
    result, 5 units of 2^-24 (AMD's are closer). silu is g / (1 + e^-g). e^-g is 2^(-g log2 e),
    with a constant and a product that are rounded: 1.25 |g| units more. Its error counts by its
    share in 1 + e^-g, 1 / (1 + e^g); the sum is rounded and divided: 6 units.

    The gelus have 8 units, and some of |g|, since 1 + erf cancels for g << 0, as does 1 + tanh in
    torch: half the error of erf, which is within 4 units on a GPU and, inside torch's gelu on a
    CPU, within 13; of tanh 8. Here gelu_tanh is g / (1 + e^-z), whose z errs by 7 units more; that
    costs at most 3 units of |g|, as z e^-z has a maximum.

    The activation and the product are each rounded to the dtype.
    """
    g, u, exact = gate.cpu().double(), up.cpu().double(), exact_product(activation, gate, up)
    unit = ROUNDOFF[gate.dtype]
    inside = {"silu": 6 + (5 + 1.25 * g.abs()) * torch.sigmoid(-g)}.get(activation, 8)
    error = (2 * unit + unit**2 + inside * UNIT) * exact.abs()
    error += {"gelu": 7, "gelu_tanh": 4}.get(activation, 0) * UNIT * g.abs() * u.abs()
    subnormal = 2.0**-24 * (1 + u.abs()) if gate.dtype == torch.float16 else 2.0**-126
    return error + subnormal


def check(gate, up, activation, backend) -> None:
    product, statistics = swiglu_statistics(gate, up, activation, backend=backend)
    assert product.shape == gate.shape
    assert product.dtype == gate.dtype
    assert product.is_contiguous()
    exact = exact_product(activation, gate, up)
    error = (product.cpu().double() - exact).abs()
    assert (error <= allowed_error(activation, gate, up)).all()

    values = product.cpu().double().flatten(0, -2)
    assert statistics.tokens == values.shape[0]
    for got, terms in ((statistics.sum, values), (statistics.sum_of_squares, values.square())):
        assert ((got.cpu() - terms.sum(0)).abs() <= 256 * UNIT * terms.abs().sum(0)).all()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_and_statistics(backend, device, activation, dtype):
    gate = random_matrix(90, 140, dtype, device, seed=1) * 3
    up = random_matrix(90, 140, dtype, device, seed=2)
    check(gate, up, activation, backend)


@few_examples
@given(
    tokens=st.sampled_from([0, 1, 17, 257]),
    channels=st.sampled_from([1, 128, 129, 200]),
    dtype=st.sampled_from(DTYPES),
    paddings=st.tuples(st.sampled_from([0, 3]), st.sampled_from([0, 16])),
)
def test_any_shape(backend, device, tokens, channels, dtype, paddings):
    gate = random_matrix(tokens, channels, dtype, device, padding=paddings[0], seed=1)
    up = random_matrix(tokens, channels, dtype, device, padding=paddings[1], seed=2)
    check(gate, up, "silu", backend)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2"])
def test_extremes_stay_finite(backend, device, activation):
    gate = torch.tensor([[-1e4, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 1e4]], device=device)
    check(gate, torch.ones_like(gate), activation, backend)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2"])
def test_nan_stays_where_it_is(backend, device, activation):
    gate = random_matrix(5, 6, device=device)
    up = random_matrix(5, 6, device=device, seed=1)
    gate[2, 3] = up[4, 1] = float("nan")
    product, statistics = swiglu_statistics(gate, up, activation, backend=backend)
    assert product.isnan().nonzero().tolist() == [[2, 3], [4, 1]]
    assert statistics.sum.isnan().nonzero().flatten().tolist() == [1, 3]


def emulated(activation: str, g: torch.Tensor, ulps: int, division: int, relative: float = 0):
    """The fp32 activation as a GPU computes it: exponential (or erf) and division off by ulps, the
    former also by a relative error."""
    if activation == "gelu":
        erf = off_by(torch.erf((g * 0.7071067811865476).double()) * (1 + relative), ulps)
        return 0.5 * g * (1 + erf.clamp(-1, 1))
    z = g if activation == "silu" else 1.5957691216057308 * (g + 0.044715 * g * g * g)
    exponent = -z * torch.tensor(1.4426950408889634)
    power = off_by(torch.exp2(exponent.double()) * (1 + relative), ulps)
    return off_by(g.double() / (1 + power).double(), division)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_the_bound_admits_what_hardware_promises_and_no_more(activation):
    gate, up = random_matrix(90, 140, seed=1) * 3, random_matrix(90, 140, seed=2)
    gate[0] = torch.linspace(-80, 80, 140)

    def violations(activated: torch.Tensor, dtype: torch.dtype = torch.float32) -> int:
        product = (activated.to(dtype) * up.to(dtype)).double()
        exact, allowed = (f(activation, gate, up) for f in (exact_product, allowed_error))
        return int(((product - exact).abs() > allowed).sum())

    for ulps, division in pairs((-2, 0, 2), repeat=2):
        assert violations(emulated(activation, gate, ulps, division)) == 0
    for relative in (2.0**-18, -(2.0**-18)):
        assert violations(emulated(activation, gate, 0, 0, relative)) > 0


def test_halves_of_a_fused_projection(backend, device):
    both = random_matrix(40, 64, torch.bfloat16, device)
    gate, up = both.view(2, 20, 64).chunk(2, dim=-1)
    check(gate, up, "silu", backend)


def test_bf16_is_rounded_as_an_unfused_model_rounds(backend, device):
    gate = random_matrix(64, 128, torch.bfloat16, device, seed=1)
    up = random_matrix(64, 128, torch.bfloat16, device, seed=2)
    product, _ = swiglu_statistics(gate, up, "relu2", backend=backend)
    assert same_bits(product, torch.nn.functional.relu(gate).square() * up)


def test_statistics_are_those_of_the_product(backend, device):
    gate = random_matrix(300, 40, torch.bfloat16, device, seed=1)
    up = random_matrix(300, 40, torch.bfloat16, device, seed=2)
    product, statistics = swiglu_statistics(gate, up, backend=backend)
    separate = channel_statistics(product, backend=backend)
    ops = ("swiglu_statistics", "channel_statistics")
    configs = [launch_config(op, device) for op in ops]
    for mine, other in zip(statistics[1:], separate[1:], strict=True):
        if backend == "torch" or configs[0] == configs[1]:
            assert same_bits(mine, other)
        else:  # tuned apart, they add up the 256 tokens of a partial in orders of their own
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-3)
    again, _ = swiglu_statistics(gate, up, backend=backend)
    assert same_bits(product, again)


@pytest.mark.parametrize("offsets", [[0, 600], [0, 0, 1, 257, 257, 600], [0, 256, 300]], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_segments_have_the_bits_that_they_have_alone(backend, device, offsets, dtype):
    gate = random_matrix(600, 130, torch.bfloat16, device, padding=3, seed=1)
    up = random_matrix(600, 130, torch.bfloat16, device, seed=2)
    offsets = torch.tensor(offsets, dtype=dtype, device=device)
    product, got = swiglu_statistics(gate, up, offsets=offsets, backend=backend)
    assert got.tokens.tolist() == offsets.diff().tolist()
    for i, (a, b) in enumerate(pairwise(offsets.tolist())):
        alone, statistics = swiglu_statistics(gate[a:b], up[a:b], backend=backend)
        assert same_bits(product[a:b], alone)
        assert same_bits(got.sum[i], statistics.sum)
        assert same_bits(got.sum_of_squares[i], statistics.sum_of_squares)
    # Rows of no segment have their product all the same.
    assert same_bits(product, swiglu_statistics(gate, up, backend=backend)[0])


def test_segments_of_no_token(backend, device):
    x = torch.zeros(0, 6, device=device)
    offsets = torch.zeros(3, dtype=torch.int32, device=device)
    product, got = swiglu_statistics(x, x, offsets=offsets, backend=backend)
    assert product.shape == (0, 6)
    assert got.tokens.tolist() == [0, 0]
    assert got.sum.tolist() == [[0.0] * 6] * 2


def test_totals_are_added_to_in_place(backend, device):
    gate = random_matrix(700, 20, torch.bfloat16, device, seed=1)
    up = random_matrix(700, 20, torch.bfloat16, device, seed=2)
    for offsets in (None, torch.tensor([0, 300, 700], device=device)):
        shape = (2, 20) if offsets is None else (2, 2, 20)
        totals = torch.ones(*shape, device=device, dtype=torch.float64)
        product, got = swiglu_statistics(gate, up, offsets=offsets, totals=totals, backend=backend)
        expected = torch.ones_like(totals)
        channel_statistics(product, offsets=offsets, totals=expected, backend=backend)
        torch.testing.assert_close(totals, expected, rtol=1e-5, atol=1e-3)
        assert got.sum.data_ptr() == totals.data_ptr()
        assert same_bits(torch.stack(got[1:], -2), totals)


def test_totals_and_offsets_it_does_not_take_are_refused(backend):
    memory = torch.zeros(200)
    gate, up = memory[:40].view(10, 4), memory[80:120].view(10, 4)
    for totals in (
        torch.zeros(1, 4, dtype=torch.float64).expand(2, 4),
        memory[38:54].view(torch.float64).view(2, 4),
        memory[70:86].view(torch.float64).view(2, 4),
        torch.zeros(2, 4),
    ):
        with pytest.raises(ValueError, match="totals"):
            swiglu_statistics(gate, up, totals=totals, backend=backend)
    between = memory[40:56].view(torch.float64).view(2, 4)
    swiglu_statistics(gate, up, totals=between, backend=backend)
    with pytest.raises(ValueError, match="offsets"):
        swiglu_statistics(gate, up, offsets=torch.tensor([0, 11]), backend=backend)


def test_wrong_arguments_are_refused(backend):
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="'swish'"):
        swiglu_statistics(x, x, "swish", backend=backend)
    with pytest.raises(ValueError, match="dtype"):
        swiglu_statistics(x, x.half(), backend=backend)
    with pytest.raises(ValueError, match="shape"):
        swiglu_statistics(x, x[:1], backend=backend)
    with pytest.raises(ValueError, match="unit stride"):
        swiglu_statistics(x.T, x.T, backend=backend)
