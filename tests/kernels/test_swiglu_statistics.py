import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, ROUNDOFF, UNIT, few_examples, random_matrix, same_bits

from cfsp_kernels import channel_statistics, swiglu_statistics

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


def check(gate, up, activation, backend) -> None:
    product, statistics = swiglu_statistics(gate, up, activation, backend=backend)
    assert product.shape == gate.shape
    assert product.dtype == gate.dtype
    assert product.is_contiguous()
    g, u = gate.cpu().double(), up.cpu().double()
    a = exact_activation(activation, g)
    exact = a * u
    # Two roundings to the dtype, and 8 in fp32 inside the activation; 1 + erf cancels for g << 0,
    # as does 1 + tanh in torch, so there it is 4 roundings of a term of size |g|.
    unit = ROUNDOFF[gate.dtype]
    error = (2 * unit + unit**2 + 8 * UNIT) * exact.abs()
    error += (4 * UNIT * g.abs() if "gelu" in activation else 0) * u.abs()
    error += 2.0**-24 * (1 + u.abs()) if gate.dtype == torch.float16 else 2.0**-126  # subnormal
    assert ((product.cpu().double() - exact).abs() <= error).all()

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
    assert same_bits(statistics.sum, separate.sum)
    assert same_bits(statistics.sum_of_squares, separate.sum_of_squares)
    again, _ = swiglu_statistics(gate, up, backend=backend)
    assert same_bits(product, again)


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
