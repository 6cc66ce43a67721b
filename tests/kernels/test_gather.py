import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, few_examples, random_matrix, same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

from cfsp_kernels import gather_columns, gather_ffn, gather_rows


def random_index(kept: int, size: int, dtype=torch.int64, device="cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(kept)
    return torch.randint(0, size, (kept,), generator=generator).to(device, dtype)


@few_examples
@given(
    rows=st.sampled_from([0, 1, 5, 33]),
    columns=st.sampled_from([1, 17, 2000]),
    kept=st.sampled_from([0, 1, 16, 1025]),
    dtype=st.sampled_from(DTYPES),
    index_dtype=st.sampled_from([torch.int64, torch.int32]),
    padding=st.sampled_from([0, 3]),
)
def test_bits_of_any_shape(backend, device, rows, columns, kept, dtype, index_dtype, padding):
    weight = random_matrix(rows, columns, dtype, device, padding=padding)
    weight[:, 0] = float("nan")
    index = random_index(kept, columns, index_dtype, device)
    assert same_bits(gather_columns(weight, index, backend=backend), weight[:, index.long()])
    if rows:
        index = random_index(kept, rows, index_dtype, device)
        assert same_bits(gather_rows(weight, index, backend=backend), weight[index.long()])


@pytest.mark.parametrize("gather", [gather_rows, gather_columns])
def test_out_is_written_in_place(backend, device, gather):
    weight = random_matrix(40, 40, torch.bfloat16, device)
    index = random_index(40, 40, device=device)
    buffer = torch.zeros(41, 48, dtype=torch.bfloat16, device=device)
    out = buffer[:40, :40]
    assert gather(weight, index, out=out, backend=backend) is out
    assert same_bits(out, gather(weight, index, backend="torch"))
    assert (buffer[40] == 0).all()
    assert (buffer[:, 40:] == 0).all()


def test_index_may_have_a_stride(backend, device):
    weight = random_matrix(6, 30, device=device)
    index = random_index(20, 30, device=device)[::2]
    assert same_bits(gather_columns(weight, index, backend=backend), weight[:, index])


def test_ffn_is_compacted_in_reused_buffers(backend, device):
    index = random_index(64, 100, device=device).sort().values
    out = None
    for seed in (0, 10):
        gate = random_matrix(100, 30, torch.bfloat16, device, seed=seed)
        up = random_matrix(100, 30, torch.float32, device, seed=seed + 1)
        down = random_matrix(30, 100, torch.float16, device, seed=seed + 2)
        compact = gather_ffn(gate, up, down, index, out=out, backend=backend)
        assert same_bits(compact.gate, gate[index])
        assert same_bits(compact.up, up[index])
        assert same_bits(compact.down, down[:, index])
        assert out is None or all(a is b for a, b in zip(compact, out, strict=True))
        out = compact


def test_ffn_without_a_gate(backend, device):
    up, down = random_matrix(10, 4, device=device), random_matrix(4, 10, device=device)
    index = torch.tensor([1, 8], device=device)
    compact = gather_ffn(None, up, down, index, backend=backend)
    assert compact.gate is None
    assert same_bits(compact.down, down[:, index])
    with pytest.raises(ValueError, match="has none"):
        gather_ffn(None, up, down, index, out=(up, up, down), backend=backend)


@pytest.mark.parametrize("gather", [gather_rows, gather_columns])
def test_out_that_overlaps_is_refused_and_windows_are_not(backend, device, gather):
    values = random_matrix(24, 40, device=device)
    buffer = values.clone()
    weight = buffer[:8, :8]
    index = torch.tensor([5, 0, 7, 2], device=device)
    shape = (4, 8) if gather is gather_rows else (8, 4)
    for out in (
        torch.zeros(1, 1, device=device).expand(shape),
        torch.zeros(1, shape[1], device=device).expand(shape),
        torch.zeros(64, device=device).as_strided(shape, (2, 1)),
        weight[: shape[0], : shape[1]],
        buffer[7:, 7:][: shape[0], : shape[1]],
    ):
        with pytest.raises(ValueError, match="out"):
            gather(weight, index, out=out, backend=backend)
    assert same_bits(buffer, values)
    expected = gather(values[:8, :8], index, backend="torch")
    for row, column in ((0, 8), (8, 0), (3, 9)):
        out = buffer[row:, column:][: shape[0], : shape[1]]
        gather(weight, index, out=out, backend=backend)
        assert same_bits(out, expected)
        buffer.copy_(values)


def test_ffn_out_that_overlaps_is_refused(backend, device):
    up, down = random_matrix(10, 4, device=device), random_matrix(4, 10, device=device)
    index = torch.tensor([1, 8], device=device)
    new = torch.zeros(2, 4, device=device)
    for out in (
        (new, new[:1].expand(2, 4), new.view(4, 2)),
        (new, up[:2], torch.zeros(4, 2, device=device)),
        (new, torch.zeros_like(new), down[:, :2]),
    ):
        with pytest.raises(ValueError, match="out"):
            gather_ffn(up, up, down, index, out=out, backend=backend)


def test_fakes_of_a_cpu_have_no_values_to_check(backend):
    with FakeTensorMode():
        weight, index = torch.zeros(6, 5), torch.zeros(3, dtype=torch.int64)
        assert gather_rows(weight, index, backend=backend).shape == (3, 5)
        assert gather_columns(weight, index, backend=backend).shape == (6, 3)
        compact = gather_ffn(None, weight, weight.T.contiguous(), index, backend=backend)
        assert compact.down.shape == (5, 3)


@pytest.mark.parametrize("gather", [gather_rows, gather_columns])
def test_wrong_arguments_are_refused(backend, gather):
    weight, index = torch.zeros(6, 6), torch.tensor([0, 5])
    for bad, error in [
        (torch.tensor([0, 6]), IndexError),
        (torch.tensor([-1]), IndexError),
        (torch.tensor([[0]]), ValueError),
        (torch.tensor([0.0]), TypeError),
        (torch.tensor([True]), TypeError),
    ]:
        with pytest.raises(error):
            gather(weight, bad, backend=backend)
    with pytest.raises(ValueError, match="unit stride"):
        gather(weight.T[:, :2], index, backend=backend)
    with pytest.raises(ValueError, match="out must"):
        gather(weight, index, out=torch.zeros(3, 3), backend=backend)


def test_ffn_of_shapes_that_differ_is_refused(backend):
    with pytest.raises(ValueError, match="down has 5 channels"):
        gather_ffn(None, torch.zeros(6, 4), torch.zeros(4, 5), torch.tensor([0]), backend=backend)
    with pytest.raises(TypeError, match="up must be"):
        gather_ffn(None, None, torch.zeros(4, 5), torch.tensor([0]), backend=backend)


def test_no_out_of_an_ffn_may_share_memory_with_what_the_others_need(backend, device):
    gate, up = random_matrix(8, 4, device=device), random_matrix(8, 4, device=device, seed=1)
    down = random_matrix(4, 8, device=device, seed=2)
    index = torch.tensor([0, 3, 5], device=device)
    one, other, last = (torch.empty(3, 4, device=device) for _ in range(3))
    for out in ((one, one, last.T.contiguous()), (up[:3], other, torch.empty(4, 3, device=device))):
        with pytest.raises(ValueError, match="out shares memory"):
            gather_ffn(gate, up, down, index, out=out, backend=backend)
