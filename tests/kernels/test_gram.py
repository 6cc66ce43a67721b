from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, UNIT, few_examples, gram_dtype, random_matrix, same_bits

from cfsp_kernels import gram
from cfsp_kernels._triton import triton_installed
from cfsp_kernels.gram import FORMS


def within_the_bound(x: torch.Tensor, got: torch.Tensor) -> bool:
    """Two units of the sum of absolute products for every addition, as tensor cores cut off where
    others round, and eight for products in parts of TF32; nothing above the diagonal.

    A factor is a TF32 number, the nearest, and one that is cut off to TF32: 2 units are left over
    of each factor, and 4 of the product of the two lesser parts, which is not computed.
    """
    exact = x.cpu().double()
    bound = (2 * x.shape[0] + 8) * UNIT * (exact.abs().T @ exact.abs())
    error = (got.cpu().double() - (exact.T @ exact).tril()).abs()
    return bool((error <= bound.tril()).all())


def check(x: torch.Tensor, got: torch.Tensor) -> None:
    assert got.dtype == torch.float32
    assert within_the_bound(x, got)


@few_examples
@given(
    tokens=st.sampled_from([0, 1, 31, 32, 100]),
    channels=st.sampled_from([1, 16, 127, 128, 300]),
    dtype=st.sampled_from(DTYPES),
    padding=st.sampled_from([0, 1, 16]),
)
def test_any_shape(backend, device, tokens, channels, dtype, padding):
    x = random_matrix(tokens, channels, dtype, device, padding=padding)
    check(x, gram(x, backend=backend))


@pytest.mark.parametrize("channels", [96, 700])
def test_whole_numbers_are_exact(backend, device, channels):
    x = torch.randint(-8, 9, (70, channels), generator=torch.Generator().manual_seed(0))
    got = gram(x.to(device, torch.bfloat16), backend=backend)
    assert torch.equal(got.cpu().long(), (x.T @ x).tril())


def test_micro_batches_add_to_out(backend, device):
    x = random_matrix(90, 150, torch.bfloat16, device)
    out = torch.zeros(150, 150, device=device)
    for part in (x[:40], x[40:]):
        assert gram(part, out=out, backend=backend) is out
    check(x, out)


def test_above_the_diagonal_is_not_touched(backend, device):
    x = random_matrix(9, 300, device=device)
    out = torch.full((300, 310), float("nan"), device=device)[:, :300]
    out.copy_(torch.zeros(300, 300).masked_fill_(torch.ones(300, 300).triu(1).bool(), 7.0))
    gram(x, out=out, backend=backend)
    upper = torch.ones(300, 300, dtype=torch.bool, device=device).triu(1)
    assert (out[upper] == 7).all()
    check(x, out.masked_fill(upper, 0))


def test_same_bits_on_every_run(backend, device):
    x = random_matrix(100, 200, torch.float16, device).view(4, 25, 200)
    assert same_bits(gram(x, backend=backend), gram(x, backend=backend))


def test_nan_stays_in_its_row_and_column(backend, device):
    x = random_matrix(5, 6, device=device)
    x[1, 2] = float("nan")
    rows, columns = gram(x, backend=backend).isnan().nonzero(as_tuple=True)
    assert ((rows == 2) | (columns == 2)).all()
    assert len(rows) == 6


def test_the_bound_admits_products_in_parts_of_tf32_and_not_tf32():
    def cut_off(m: torch.Tensor) -> torch.Tensor:
        return (m.view(torch.int32) & ~0x1FFF).view(torch.float32)

    x = random_matrix(1, 3000) + 1  # one token: nothing evens out
    nearest = cut_off((x.view(torch.int32) + 0x1000).view(torch.float32))
    rest = cut_off(x - nearest).double()
    product = nearest.double().T @ nearest.double()
    across = rest.T @ nearest.double()
    assert within_the_bound(x, (product + across + across.T).tril())
    assert not within_the_bound(x, (product + across).tril())
    assert not within_the_bound(x, product.tril())


@pytest.mark.skipif(not triton_installed(), reason="triton is not installed")
@pytest.mark.parametrize("shape", [(70, 96), (1, 16), (33, 400)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_adds_the_triangle(device, form, shape):
    dtype = gram_dtype(form, device)
    x = random_matrix(*shape, dtype, device, padding=16)
    channels = shape[1]
    buffer = torch.full((channels, channels + 4), 5.0, device=device)
    out = buffer[:, :channels]
    out.tril_().fill_diagonal_(0).add_(torch.ones_like(out).triu(1), alpha=7.0)
    before = out.clone()
    FORMS[form](x, out)
    FORMS[form](x, out)
    upper = torch.ones_like(out, dtype=torch.bool).triu(1)
    assert (out[upper] == before[upper]).all()
    exact = x.cpu().double()
    bound = 2 * (2 * shape[0] + 12) * UNIT * (exact.abs().T @ exact.abs() + 10)
    error = (out.cpu().double() - before.cpu() - 2 * (exact.T @ exact).tril()).abs()
    assert (error <= bound).all()
    assert (buffer[:, channels:] == 5).all()


@pytest.mark.skipif(not triton_installed(), reason="triton is not installed")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_exact_for_whole_numbers(device, form):
    dtype = gram_dtype(form, device)
    channels = 2100 if form == "panels" else 1040  # several panels, tiles, groups of them
    x = torch.randint(-8, 9, (70, channels), generator=torch.Generator().manual_seed(0))
    out = torch.zeros(channels, channels, device=device)
    FORMS[form](x.to(device, dtype), out)
    assert torch.equal(out.cpu().long(), (x.T @ x).tril())


SEGMENTS = [[0, 90], [0, 0, 33, 33, 90], [0, 40, 60], [0, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offsets", SEGMENTS, ids=str)
def test_segments_have_the_bits_that_they_have_alone(backend, device, offsets, dtype):
    x = random_matrix(90, 150, dtype, device, padding=2)
    x[offsets[-1] :] = float("nan")
    index = torch.int32 if dtype == torch.float16 else torch.int64
    offsets = torch.tensor(offsets, dtype=index, device=device)
    got = gram(x, offsets=offsets, backend=backend)
    assert got.shape == (len(offsets) - 1, 150, 150)
    for triangle, (a, b) in zip(got, pairwise(offsets.tolist()), strict=True):
        assert same_bits(triangle, alone(x[a:b], backend))
        check(x[a:b], triangle)


def alone(x: torch.Tensor, backend: str) -> torch.Tensor:
    """Of one segment, by the kernel that takes segments."""
    if backend == "torch" or x.dtype == torch.float32:
        return gram(x, backend=backend)
    out = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    if x.numel():
        FORMS["tiles"](x, out)
    return out


def test_segments_are_added_to_out(backend, device):
    x = random_matrix(90, 40, torch.bfloat16, device)
    offsets = torch.tensor([0, 40, 90], device=device)
    buffer = torch.zeros(2, 40, 44, device=device)
    out = buffer[:, :, :40]
    for _ in range(2):
        assert gram(x, offsets=offsets, out=out, backend=backend) is out
    once = gram(x, offsets=offsets, backend=backend)
    assert same_bits(out, once + once)
    assert (buffer[:, :, 40:] == 0).all()


def test_segments_of_nothing(backend, device):
    offsets = torch.tensor([0, 0, 0], device=device)
    got = gram(torch.zeros(0, 6, device=device), offsets=offsets, backend=backend)
    assert torch.equal(got.cpu(), torch.zeros(2, 6, 6))
    offsets = torch.tensor([0, 5], device=device)
    assert gram(torch.zeros(5, 0, device=device), offsets=offsets, backend=backend).numel() == 0


def test_out_that_overlaps_is_refused_and_windows_are_not(backend, device):
    buffer = torch.zeros(20, 24, device=device)
    x = buffer[:8, :8]
    offsets = torch.tensor([0, 8], device=device)
    for out, segments in [
        (torch.zeros(1, 8, device=device).expand(8, 8), None),
        (torch.zeros(1, 8, 8, device=device).expand(2, 8, 8), torch.tensor([0, 4, 8]).to(device)),
        (torch.zeros(64, device=device).as_strided((8, 8), (4, 1)), None),
        (x, None),
        (buffer[7:15, 7:15], None),
        (buffer[None, 1:9, :8], offsets),
    ]:
        with pytest.raises(ValueError, match="out"):
            gram(x, offsets=segments, out=out, backend=backend)
    x.fill_(1)
    for out in (buffer[:8, 8:16], buffer[8:16, :8], buffer[12:20, 16:]):
        gram(x, out=out, backend=backend)
        assert torch.equal(out.cpu(), torch.full((8, 8), 8.0).tril())


def test_wrong_arguments_are_refused(backend):
    x = torch.zeros(3, 4)
    for out in (torch.zeros(4, 5), torch.zeros(4, 4).half(), torch.zeros(5, 4).T[:4].T[:4].T):
        with pytest.raises(ValueError, match="out must"):
            gram(x, out=out, backend=backend)
    with pytest.raises(ValueError, match="unit stride"):
        gram(x.T, backend=backend)
    with pytest.raises(TypeError, match="float64"):
        gram(x.double(), backend=backend)
