import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, UNIT, few_examples, random_matrix, same_bits

from cfsp_kernels import gram


def check(x: torch.Tensor, got: torch.Tensor) -> None:
    """Within one unit of the sum of absolute products for every addition, and four for products
    in parts of TF32; nothing above the diagonal."""
    exact = x.cpu().double()
    bound = (2 * x.shape[0] + 8) * UNIT * (exact.abs().T @ exact.abs())
    error = (got.cpu().double() - (exact.T @ exact).tril()).abs()
    assert got.dtype == torch.float32
    assert (error <= bound.tril()).all()


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


def test_wrong_arguments_are_refused(backend):
    x = torch.zeros(3, 4)
    for out in (torch.zeros(4, 5), torch.zeros(4, 4).half(), torch.zeros(5, 4).T[:4].T[:4].T):
        with pytest.raises(ValueError, match="out must"):
            gram(x, out=out, backend=backend)
    with pytest.raises(ValueError, match="unit stride"):
        gram(x.T, backend=backend)
    with pytest.raises(TypeError, match="float64"):
        gram(x.double(), backend=backend)
