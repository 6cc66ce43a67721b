"""Gram matrices of the block at work: the numbers, what is held out, and what stays."""

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from cfsp.calibration import grams
from cfsp.calibration.collect import collect_statistics
from cfsp.calibration.grams import Gram, Split, check_ranks, held_out_windows, mirror_
from cfsp.calibration.statistics import (
    BlockStatistics,
    Statistics,
)
from cfsp.distributed import Ranks
from cfsp.errors import CfspError
from cfsp.models.layouts import LAYOUTS

from ..conftest import make_tiny
from ..models.test_experts import routed_activations
from ..models.test_families import make
from .test_statistics import whole_model_reference

WINDOWS = torch.randint(0, 256, (21, 12), generator=torch.Generator().manual_seed(1))
FITTED = 19  # windows; the last two are held out


def collect(
    model: PreTrainedModel, *, gram: bool = True, **options: object
) -> tuple[Statistics, list[BlockStatistics]]:
    """The statistics, and those of every block at its turn."""
    turns: list[BlockStatistics] = []
    layout = LAYOUTS[model.config.model_type]
    found = collect_statistics(
        model,
        layout,
        WINDOWS,
        progress=False,
        gram=gram,
        visit=lambda number, block, statistics: turns.append(statistics),
        **options,
    )
    return found, turns


@pytest.fixture(scope="module", autouse=True)
def small_panels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grams, "PANEL", 20)  # of 48 channels
        yield


def assert_is(found: Gram, fitted: torch.Tensor, held_out: torch.Tensor) -> None:
    """``fitted``, ``held_out``: activations [T, F]."""
    x = fitted.double()
    assert found.tokens == len(x)
    assert torch.allclose(found.sum, x.sum(0), rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.product.double(), x.T @ x, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.product, found.product.T)
    assert found.held_out is not None
    assert found.held_out.tokens == len(held_out)
    rows = torch.cat(list(found.held_out.rows.values()))
    assert torch.allclose(rows.double(), held_out.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("micro_batch", [1, 4])  # windows 19 and 20: of two calls; of one's end
def test_they_are_those_of_an_ordinary_forward(fused: bool, micro_batch: int) -> None:
    model = make_tiny()
    activations, _ = whole_model_reference(model, WINDOWS)
    options = {"fused": fused, "micro_batch": micro_batch}
    found, turns = collect(model, **options)
    border = FITTED * WINDOWS.shape[1]
    for block, x in zip(turns, activations, strict=True):
        assert block.gram is not None
        assert_is(block.gram, x[:border], x[border:])
    assert not any(block.grams for block in found.blocks)  # forgotten with their block
    plain, _ = collect(model, gram=False, **options)
    for a, b in zip(found.blocks, plain.blocks, strict=True):
        assert torch.equal(a.sum, b.sum)
        assert torch.equal(a.sum_of_squares, b.sum_of_squares)
    assert found.provenance == plain.provenance


def test_each_expert_has_those_of_its_tokens() -> None:
    model = make("deepseek_v3")
    parts = [routed_activations(model, part) for part in (WINDOWS[:FITTED], WINDOWS[FITTED:])]
    _, turns = collect(model, micro_batch=5)
    assert [len(block.grams) for block in turns] == [1, 5, 5, 5]
    for number, expert in parts[0]:
        gram = turns[number].parts()[expert].gram
        assert gram is not None
        assert_is(gram, *(part[number, expert] for part in parts))


def test_moments_are_second_moments_or_the_covariance() -> None:
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).double() + 2
    gram = Gram(len(x), x.sum(0), (x.T @ x).float())
    rows, columns = torch.tensor([1, 5]), torch.tensor([0, 2, 6])
    plain, centred = x.T @ x / 50, torch.cov(x.T, correction=0)
    assert torch.allclose(gram.moments().double(), plain, rtol=1e-6)
    assert torch.allclose(gram.moments(rows, columns).double(), plain[rows][:, columns], rtol=1e-6)
    assert torch.allclose(gram.moments(centred=True).double(), centred, atol=1e-5)
    part = gram.moments(rows, columns, centred=True)
    assert torch.allclose(part.double(), centred[rows][:, columns], atol=1e-5)
    nothing = Gram(0, torch.zeros(7).double(), torch.zeros(7, 7))
    assert not nothing.moments(centred=True).any()


def test_what_is_judged_is_the_squared_change_of_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 7, generator=generator)
    change, bias = torch.randn(5, 7, generator=generator), torch.randn(5, generator=generator)
    judge = grams.HeldOut({1: x[:20], 2: x[20:]}, 30, 3, Ranks())
    found = judge.squares([(change, None), (change, bias)])
    output = x.double() @ change.double().T
    expected = [output.square().sum(), (output - bias).square().sum()]
    assert found == pytest.approx([float(value) for value in expected], rel=1e-6)


@pytest.mark.parametrize("size", [1, 19, 20, 53])  # of panels of 20
def test_a_triangle_becomes_the_whole_matrix(size: int) -> None:
    whole = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    whole += whole.T.clone()
    lower = whole.tril() + torch.full_like(whole, torch.nan).triu(1)
    assert torch.equal(mirror_(lower), whole)


@pytest.mark.parametrize("windows", [1, 2, 9, 10, 21, 128, 160])
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_what_is_held_out_and_who_sums_it(windows: int, micro_batch: int) -> None:
    """By windows alone; and every rank has whole chunks."""
    split = Split(windows, 7, micro_batch)
    count = -(-windows // micro_batch)
    fitted, held = (sum(x) // 7 for x in zip(*map(split.tokens, range(count)), strict=True))
    assert held == held_out_windows(windows)
    assert (fitted, held) == (
        windows - held,
        0 if windows == 1 else min(4, max(1, windows // 10)),
    )
    chunks = [split.chunk(index) for index in range(count)]
    assert chunks == sorted(chunks)
    for size in (1, 2, 4, 8):
        shares = [set(chunks[Ranks(rank, size).share(count)]) for rank in range(size)]
        assert sum(map(len, shares)) == len(set(chunks))
    with pytest.raises(CfspError, match="take 1, 2, 4 or 8 ranks, not 3"):
        check_ranks(3)
