import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, UNIT, few_examples, random_matrix, same_bits

from cfsp_kernels import channel_importance

SCORES = ["magnitude", "wanda", "flap", "eq8", "balanced"]
SUBSETS = [("gate", "up", "down"), ("down",), ("up", "down"), ("gate",), ("gate", "up")]


def exact_importance(score, gate, up, down, norms, variance):
    """fp64, term by term from the table of the docstring; every matrix as [F, D]."""
    n, v = norms.cpu().double(), variance.cpu().double()
    inputs = [m.cpu().double() for m in (gate, up) if m is not None]
    output = None if down is None else down.cpu().double().T
    entries = inputs + ([] if output is None else [output])
    match score:
        case "magnitude":
            return sum(m.square().sum(1) for m in entries).sqrt()
        case "wanda":
            return sum(n * m.abs().mean(1) for m in entries)
        case "flap":
            return sum(v * m.square().sum(1) for m in entries)
        case "eq8":
            total = torch.full_like(n, len(inputs))
            if output is not None:
                total += (output.abs() * n[:, None] / output.abs().sum(0)).sum(1) / n.norm()
            return total
        case _:
            total = torch.zeros_like(n)
            for m in inputs:
                total += n / n.mean() * (m.abs() / m.abs().sum(0)).sum(1)
            if output is not None:
                weighted = output.abs() * n[:, None]
                total += (weighted / weighted.sum(0)).sum(1)
            return total


def check(score, matrices, norms, variance, backend) -> None:
    got = channel_importance(score, **matrices, norms=norms, variance=variance, backend=backend)
    whole = {name: matrices.get(name) for name in ("gate", "up", "down")}
    exact = exact_importance(score, **whole, norms=norms, variance=variance)
    assert got.dtype == torch.float32
    # Every term is positive: the sum of n of them is within n units, and a share twice that.
    first = next(iter(matrices.values()))
    bound = 2 * (max(first.shape) + 16) * UNIT
    assert ((got.cpu() - exact).abs() <= bound * exact).all()


def weights(channels, width, dtype, device, padding=0):
    return {
        "gate": random_matrix(channels, width, dtype, device, padding=padding, seed=1),
        "up": random_matrix(channels, width, dtype, device, seed=2),
        "down": random_matrix(width, channels, dtype, device, padding=padding, seed=3),
    }


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_every_score_of_any_matrices(backend, device, score, subset):
    every = weights(200, 90, torch.bfloat16, device)
    norms = random_matrix(1, 200, device=device, seed=4)[0].abs()
    check(score, {name: every[name] for name in subset}, norms, norms.double() * 2, backend)


@few_examples
@given(
    score=st.sampled_from(SCORES),
    channels=st.sampled_from([1, 5, 128, 300]),
    width=st.sampled_from([1, 4, 257, 513]),
    dtype=st.sampled_from(DTYPES),
    padding=st.sampled_from([0, 1, 16]),
)
def test_any_shape(backend, device, score, channels, width, dtype, padding):
    matrices = weights(channels, width, dtype, device, padding)
    norms = random_matrix(1, channels, device=device, seed=4)[0].abs() + 0.1
    check(score, matrices, norms.double(), norms, backend)


@pytest.mark.parametrize("score", SCORES)
def test_dead_weights_and_channels_score_no_nan(backend, device, score):
    matrices = weights(20, 10, torch.float32, device)
    matrices["down"][3] = 0
    matrices["gate"][:, 4] = 0
    matrices["gate"][5] = matrices["up"][5] = matrices["down"][:, 5] = 0
    norms = torch.ones(20, device=device)
    norms[7] = 0
    got = channel_importance(score, **matrices, norms=norms, variance=norms, backend=backend)
    assert got.isfinite().all()
    if score != "eq8":  # whose terms of gate and up are constant
        assert got[5] == 0
    if score not in ("eq8", "magnitude"):
        assert got[7] == 0


def test_same_bits_on_every_run(backend, device):
    matrices = weights(140, 300, torch.bfloat16, device)
    norms = torch.rand(140, generator=torch.Generator().manual_seed(0)).to(device)
    for score in ("wanda", "balanced"):
        first, second = (
            channel_importance(score, **matrices, norms=norms, backend=backend) for _ in range(2)
        )
        assert same_bits(first, second)


def test_matrices_may_differ_in_dtype(backend, device):
    matrices = weights(30, 20, torch.float32, device)
    matrices["up"] = matrices["up"].bfloat16()
    matrices["down"] = matrices["down"].half()
    check("wanda", matrices, torch.ones(30, device=device), torch.ones(30), backend)


def experts(count: int, channels: int, width: int, device) -> dict[str, torch.Tensor]:
    """Gate and up as views of one tensor [E, 2F, D], and down [E, D, F]: as checkpoints do it."""
    packed = random_matrix(count * 2 * channels, width, torch.bfloat16, device, padding=2, seed=1)
    packed = packed.unflatten(0, (count, 2 * channels))
    down = random_matrix(count * width, channels, torch.bfloat16, device, padding=1, seed=3)
    return {
        "gate": packed[:, :channels],
        "up": packed[:, channels:],
        "down": down.unflatten(0, (count, width)),
    }


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("subset", [SUBSETS[0], ("down",), ("gate",)], ids="+".join)
def test_experts_have_the_bits_that_they_have_alone(backend, device, score, subset):
    every = experts(3, 130, 20, device)
    matrices = {name: every[name] for name in subset}
    norms = random_matrix(3, 130, device=device, seed=4).abs()
    norms[1] *= 50  # shares of another expert would show
    options = {"norms": norms, "variance": norms.double() * 2}
    got = channel_importance(score, **matrices, **options, backend=backend)
    assert got.shape == (3, 130)
    assert got.dtype == torch.float32
    for e in range(3):
        one = {name: tensor[e] for name, tensor in {**matrices, **options}.items()}
        assert same_bits(got[e], channel_importance(score, **one, backend=backend))
        check(score, {n: one[n] for n in matrices}, one["norms"], one["variance"], backend)


@pytest.mark.parametrize("score", SCORES)
def test_experts_of_any_size(backend, device, score):
    for count, channels, width in ((2, 130, 300), (1, 1, 1), (2, 0, 4)):
        matrices = experts(count, channels, width, device)
        norms = torch.ones(count, channels, device=device)
        options = {"norms": norms, "variance": norms}
        got = channel_importance(score, **matrices, **options, backend=backend)
        assert got.shape == (count, channels)
        for e in range(count):
            one = {name: tensor[e] for name, tensor in {**matrices, **options}.items()}
            assert same_bits(got[e], channel_importance(score, **one, backend=backend))


@pytest.mark.parametrize("score", SCORES)
def test_no_expert_is_no_score(backend, device, score):
    matrices, norms = experts(0, 6, 4, device), torch.ones(0, 6, device=device)
    got = channel_importance(score, **matrices, norms=norms, variance=norms, backend=backend)
    assert got.shape == (0, 6)


def test_wrong_experts_are_refused(backend):
    gate, down = torch.zeros(3, 6, 4), torch.zeros(3, 4, 6)
    norms = torch.ones(3, 6)
    for arguments, message in [
        ({"gate": gate, "down": down[0], "norms": norms}, "down must"),
        ({"gate": gate[0], "down": down, "norms": norms[0]}, "down must"),
        ({"gate": gate, "down": down[:2], "norms": norms}, "down must"),
        ({"gate": gate, "down": down, "norms": norms[0]}, "norms must"),
        ({"gate": gate[None], "norms": norms}, "gate must"),
        ({"down": down.mT, "norms": torch.ones(3, 4)}, "unit stride"),
    ]:
        with pytest.raises(ValueError, match=message):
            channel_importance("wanda", **arguments, backend=backend)


def test_wrong_arguments_are_refused(backend):
    down, norms = torch.zeros(4, 6), torch.ones(6)
    for arguments, error, message in [
        ({"score": "best", "down": down}, ValueError, "'best'"),
        ({"score": "wanda"}, ValueError, "at least one"),
        ({"score": "wanda", "down": down}, ValueError, "needs norms"),
        ({"score": "flap", "down": down, "norms": norms}, ValueError, "needs variance"),
        ({"score": "wanda", "down": down, "norms": norms[:4]}, ValueError, r"\(6,\)"),
        ({"score": "wanda", "down": down, "norms": norms.long()}, TypeError, "floating"),
        ({"score": "magnitude", "down": down, "up": down}, ValueError, "down must be"),
        ({"score": "magnitude", "down": down.T}, ValueError, "unit stride"),
        ({"score": "magnitude", "down": down.double()}, TypeError, "float64"),
    ]:
        with pytest.raises(error, match=message):
            channel_importance(**arguments, backend=backend)


@pytest.mark.parametrize("score", ["wanda", "eq8", "balanced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_may_have_any_strides(backend, device, score, dtype):
    matrices = weights(40, 24, torch.float32, device)
    packed = {name: torch.stack([m, m + 1, m * 2]) for name, m in matrices.items()}
    values = random_matrix(3, 80, dtype, device, seed=4).abs() + 0.1
    for norms, chosen in (
        (values[0, ::2], matrices),
        (values[:1, :1].expand(1, 40)[0], matrices),
        (values[:, :40], packed),
        (values[:, :40].T.contiguous().T, packed),
    ):
        got = channel_importance(score, **chosen, norms=norms, backend=backend)
        plain = channel_importance(score, **chosen, norms=norms.contiguous(), backend=backend)
        assert same_bits(got, plain)


def test_what_is_no_tensor_is_refused_by_name(backend):
    down, norms = torch.zeros(4, 6), torch.ones(6)
    for arguments, name in (
        ({"gate": [[1.0]], "norms": norms}, "gate"),
        ({"down": down, "norms": [1.0] * 6}, "norms"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
            channel_importance("wanda", **arguments, backend=backend)
