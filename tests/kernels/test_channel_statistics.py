from itertools import pairwise

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


def test_no_channel_keeps_the_number_of_tokens(backend, device):
    for shape, tokens in (((5, 0), 5), ((2, 5, 0), 10), ((0, 0), 0)):
        x = torch.zeros(shape, device=device)
        got = channel_statistics(x, backend=backend)
        assert got.tokens == tokens
        assert got.sum.shape == got.sum_of_squares.shape == (0,)
        accumulator = ChannelAccumulator(backend=backend)
        accumulator.update(x)
        assert accumulator.tokens == tokens


def test_totals_are_added_to_in_place(backend, device):
    x = random_matrix(700, 130, torch.bfloat16, device)
    buffer = torch.full((2, 133), 7.0, dtype=torch.float64, device=device)
    totals = buffer[:, 1:131]  # rows apart, and the first at no multiple of 16 bytes
    totals.zero_()
    for part in x.split(512):
        got = channel_statistics(part, totals=totals, backend=backend)
        assert got.tokens == part.shape[0]
    whole = channel_statistics(x, backend=backend)
    assert same_bits(totals, torch.stack(whole[1:]))
    assert (got.sum.data_ptr(), got.sum_of_squares.data_ptr()) == (
        totals[0].data_ptr(),
        totals[1].data_ptr(),
    )
    assert (buffer[:, [0, 131, 132]] == 7).all()


def segment_by_segment(x, offsets, backend) -> list[torch.Tensor]:
    """(sum, sum of squares), each [E, C]."""
    parts = [channel_statistics(x[a:b], backend=backend)[1:] for a, b in pairwise(offsets.tolist())]
    return [torch.stack(sums) for sums in zip(*parts, strict=True)]


OFFSETS = [
    [0, 700],
    [0, 0, 700],
    [0, 1, 257, 257, 700],
    [0, 256, 512, 700],
    [0, 3, 5, 5],  # and 695 rows of no segment
    [0, 255, 256, 511, 513, 699, 700],
    [0, 0, 0],
]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_segments_have_the_bits_that_they_have_alone(backend, device, offsets, dtype):
    x = random_matrix(700, 130, torch.bfloat16, device, padding=3)
    x[offsets[-1] :] = float("nan")
    offsets = torch.tensor(offsets, dtype=dtype, device=device)
    got = channel_statistics(x, offsets=offsets, backend=backend)
    assert got.tokens.tolist() == offsets.diff().tolist()
    for mine, alone in zip(got[1:], segment_by_segment(x, offsets, backend), strict=True):
        assert same_bits(mine, alone)


@few_examples
@given(cuts=st.lists(st.integers(0, 600), max_size=5).map(sorted), tokens=st.integers(600, 601))
def test_segments_of_any_lengths(backend, device, cuts, tokens):
    x = random_matrix(tokens, 5, torch.float16, device)
    offsets = torch.tensor([0, *cuts, 600], device=device)
    got = channel_statistics(x, offsets=offsets, backend=backend)
    for mine, alone in zip(got[1:], segment_by_segment(x, offsets, backend), strict=True):
        assert same_bits(mine, alone)


def test_segments_of_no_token(backend, device):
    x = torch.zeros(0, 6, device=device)
    offsets = torch.zeros(3, dtype=torch.int32, device=device)
    got = channel_statistics(x, offsets=offsets, backend=backend)
    assert got.tokens.tolist() == [0, 0]
    assert got.sum.tolist() == [[0.0] * 6] * 2
    none = torch.zeros(1, dtype=torch.int64, device=device)
    got = channel_statistics(torch.ones(4, 6, device=device), offsets=none, backend=backend)
    assert got.tokens.shape == (0,)
    assert got.sum.shape == (0, 6)


def test_totals_of_segments_are_added_to_in_place(backend, device):
    x = random_matrix(600, 20, torch.bfloat16, device)
    offsets = torch.tensor([0, 256, 256, 600], device=device)
    buffer = torch.zeros(2, 3, 24, dtype=torch.float64, device=device)
    totals = buffer.transpose(0, 1)[:, :, :20]
    for _ in range(2):
        got = channel_statistics(x, offsets=offsets, totals=totals, backend=backend)
    assert got.sum.data_ptr() == totals.data_ptr()
    expected = torch.zeros(3, 2, 20, dtype=torch.float64, device=device)
    for _ in range(2):
        for i, (a, b) in enumerate(pairwise(offsets.tolist())):
            channel_statistics(x[a:b], totals=expected[i], backend=backend)
    assert same_bits(totals, expected)
    assert (buffer[:, :, 20:] == 0).all()


@pytest.mark.parametrize(
    ("offsets", "error"),
    [
        (torch.tensor([1, 4]), ValueError),
        (torch.tensor([0, 3, 2]), ValueError),
        (torch.tensor([0, 5]), ValueError),
        (torch.tensor([0, -1, 4]), ValueError),
        (torch.tensor([[0, 4]]), ValueError),
        (torch.tensor([], dtype=torch.int64), ValueError),
        (torch.tensor([0.0, 4.0]), TypeError),
    ],
    ids=["not from 0", "falling", "past the end", "negative", "matrix", "empty", "floats"],
)
def test_offsets_that_are_none_are_refused(backend, offsets, error):
    with pytest.raises(error, match="offsets"):
        channel_statistics(torch.zeros(4, 4), offsets=offsets, backend=backend)


def test_totals_it_cannot_add_to_are_refused(backend):
    x = torch.zeros(4, 6)
    fp64 = torch.zeros(2, 6, dtype=torch.float64)
    offsets = torch.tensor([0, 2, 4])
    for totals, segments in [
        (fp64.float(), None),
        (fp64[:, :5], None),
        (fp64[None], None),
        (torch.zeros(6, 2, dtype=torch.float64).T, None),
        (fp64, offsets),
        (fp64[:1].expand(2, 6), None),
        (fp64.expand(2, 2, 6), offsets),
    ]:
        with pytest.raises(ValueError, match="totals"):
            channel_statistics(x, offsets=segments, totals=totals, backend=backend)


def test_totals_that_share_memory_with_x_are_refused(backend, device):
    memory = torch.zeros(100, dtype=torch.float64, device=device)
    x = memory[:20].view(torch.float32).view(10, 4)
    for first in (0, 12, 19):
        totals = memory[first : first + 8].view(2, 4)
        with pytest.raises(ValueError, match="totals"):
            channel_statistics(x, totals=totals, backend=backend)
    apart = memory[20:28].view(2, 4)
    x.fill_(1)
    channel_statistics(x, totals=apart, backend=backend)
    assert apart.tolist() == [[10.0] * 4] * 2


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

    def test_begun_in_inference_mode_it_goes_on_outside_and_the_other_way(self, backend, device):
        x = random_matrix(20, 8, device=device)
        for inside_first in (True, False):
            accumulator = ChannelAccumulator(backend=backend)
            for inside in (inside_first, not inside_first):
                with torch.inference_mode(inside):
                    accumulator.update(x)
            assert accumulator.tokens == 40
            check(torch.cat([x, x]), accumulator.statistics)

    def test_hook_holds_no_graph(self, backend, device):
        layer = torch.nn.Linear(6, 2).to(device)
        accumulator = ChannelAccumulator(backend=backend)
        handle = layer.register_forward_pre_hook(lambda module, args: accumulator.update(args[0]))
        x = torch.randn(3, 5, 6, device=device, requires_grad=True)
        layer(x).sum().backward()
        handle.remove()
        assert accumulator.tokens == 15
        assert not accumulator.norm.requires_grad


def test_offsets_and_totals_that_are_no_tensors_are_refused_by_name(backend):
    x = torch.zeros(10, 4)
    with pytest.raises(TypeError, match="offsets must be a tensor, got list"):
        channel_statistics(x, offsets=[0, 5, 10], backend=backend)
    with pytest.raises(TypeError, match="totals must be a tensor, got ChannelStatistics"):
        channel_statistics(x, totals=channel_statistics(x), backend=backend)
    with pytest.raises(ValueError, match=r"never fall .* got \[0, 6, 5\]"):
        channel_statistics(x, offsets=torch.tensor([0, 6, 5]), backend=backend)
