import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, UNIT, few_examples, random_matrix, same_bits

from cfsp_kernels import ChannelAccumulator, channel_statistics

# fp32 additions run over 256 tokens at most, whatever the number of tokens.
BOUND = 256 * UNIT


def check(x: torch.Tensor, got) -> None:
    exact = x.detach().cpu().double().flatten(0, -2)
    assert got.tokens == exact.shape[0]
    assert got.sum.dtype == got.sum_of_squares.dtype == torch.float64
    for value, terms in ((got.sum, exact), (got.sum_of_squares, exact.square())):
        error = (value.cpu() - terms.sum(0)).abs()
        assert (error <= BOUND * terms.abs().sum(0)).all()


@few_examples
@given(
    tokens=st.sampled_from([0, 1, 2, 255, 256, 257, 600]),
    channels=st.sampled_from([1, 3, 127, 128, 129, 300]),
    dtype=st.sampled_from(DTYPES),
    padding=st.sampled_from([0, 1, 16]),
)
def test_sums_of_any_shape(backend, device, tokens, channels, dtype, padding):
    x = random_matrix(tokens, channels, dtype, device, padding=padding)
    check(x, channel_statistics(x, backend=backend))


def test_every_leading_dimension_is_tokens(backend, device):
    x = random_matrix(30, 40, torch.bfloat16, device)
    whole = channel_statistics(x, backend=backend)
    batched = channel_statistics(x.view(2, 3, 5, 40), backend=backend)
    assert batched.tokens == 30
    assert same_bits(batched.sum, whole.sum)


def test_error_does_not_grow_with_tokens(backend, device):
    x = torch.full((4096, 1), 0.1, device=device)
    got = channel_statistics(x, backend=backend)
    exact = x.cpu().double()
    assert abs(got.sum.item() / exact.sum().item() - 1) < 2e-6  # in sequence: 2e-5 and more


def test_same_bits_on_every_run(backend, device):
    x = random_matrix(700, 130, torch.bfloat16, device)
    first, second = (channel_statistics(x, backend=backend) for _ in range(2))
    assert same_bits(first.sum, second.sum)
    assert same_bits(first.sum_of_squares, second.sum_of_squares)


def test_nan_stays_in_its_channel(backend, device):
    x = random_matrix(20, 20, device=device)
    x[7, 3] = float("nan")
    x[9, 5] = float("inf")
    got = channel_statistics(x, backend=backend)
    assert got.sum.isnan().nonzero().flatten().tolist() == [3]
    assert got.sum_of_squares.isinf().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.zeros(4, 4).T[:, :2], ValueError),
        (torch.zeros(4, 4, 4).transpose(0, 1), ValueError),
        (torch.zeros(4), ValueError),
        (torch.zeros(4, 4, dtype=torch.int32), TypeError),
        (torch.zeros(4, 4, dtype=torch.float64), TypeError),
        ([[1.0]], TypeError),
    ],
    ids=["column-major", "no single row stride", "vector", "integers", "fp64", "list"],
)
def test_tensors_it_does_not_read_are_refused(backend, x, error):
    with pytest.raises(error):
        channel_statistics(x, backend=backend)


class TestAccumulator:
    def test_results_are_those_of_all_tokens(self, backend, device):
        accumulator = ChannelAccumulator(backend=backend)
        parts = [random_matrix(n, 50, torch.float32, device, seed=n) + 3 for n in (1, 100, 259)]
        for part in parts:
            accumulator.update(part)
        exact = torch.cat(parts).cpu().double()
        assert accumulator.tokens == 360
        torch.testing.assert_close(accumulator.mean.cpu(), exact.mean(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(accumulator.norm.cpu(), exact.norm(dim=0), rtol=1e-6, atol=0)
        ratio = accumulator.variance.cpu() / exact.var(0, correction=0)
        assert (ratio - 1).abs().max() < BOUND * (1 + 2 * 9)

    def test_bits_do_not_depend_on_how_tokens_were_divided(self, backend, device):
        x = random_matrix(1100, 130, torch.bfloat16, device)
        whole, divided = ChannelAccumulator(backend=backend), ChannelAccumulator(backend=backend)
        whole.update(x)
        for part in x.split(512):
            divided.update(part)
        assert same_bits(whole.statistics.sum, divided.statistics.sum)
        assert same_bits(whole.norm, divided.norm)
        assert same_bits(whole.norm, channel_statistics(x, backend=backend).sum_of_squares.sqrt())

    def test_results_do_not_change_with_later_updates(self, backend, device):
        accumulator = ChannelAccumulator(backend=backend)
        accumulator.update(random_matrix(10, 8, device=device))
        before = accumulator.statistics
        kept = before.sum.clone()
        accumulator.update(random_matrix(10, 8, device=device, seed=1))
        assert torch.equal(before.sum, kept)

    def test_no_token_is_no_statistic(self, backend, device):
        accumulator = ChannelAccumulator(backend=backend)
        with pytest.raises(ValueError, match="seen no tensor"):
            _ = accumulator.norm
        accumulator.update(torch.zeros(0, 4, device=device))
        assert accumulator.tokens == 0
        assert accumulator.norm.tolist() == [0, 0, 0, 0]
        assert accumulator.mean.isnan().all()
        assert accumulator.variance.isnan().all()

    def test_other_channels_are_refused(self, backend, device):
        accumulator = ChannelAccumulator(backend=backend)
        accumulator.update(torch.zeros(2, 4, device=device))
        with pytest.raises(ValueError, match="5 channels"):
            accumulator.update(torch.zeros(2, 5, device=device))
        assert accumulator.tokens == 2

    def test_hook_holds_no_graph(self, backend, device):
        layer = torch.nn.Linear(6, 2).to(device)
        accumulator = ChannelAccumulator(backend=backend)
        handle = layer.register_forward_pre_hook(lambda module, args: accumulator.update(args[0]))
        x = torch.randn(3, 5, 6, device=device, requires_grad=True)
        layer(x).sum().backward()
        handle.remove()
        assert accumulator.tokens == 15
        assert not accumulator.norm.requires_grad
