"""Scores against their published formulas, written out once more here."""

import pytest
import torch

from cfsp.calibration.statistics import BlockStatistics
from cfsp.models.parts.channels import PartWeights
from cfsp.pruning.least_squares import DAMPING
from cfsp.pruning.scoring import SCORERS

F, D, TOKENS = 40, 24, 64


@pytest.fixture
def block() -> tuple[BlockStatistics, PartWeights, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, F, dtype=torch.float64) * torch.rand(F, dtype=torch.float64) + 0.1
    statistics = BlockStatistics(TOKENS, 4, x.sum(0), x.square().sum(0), torch.zeros(4))
    weights = PartWeights(torch.randn(F, D), torch.randn(F, D), torch.randn(D, F))
    return statistics, weights, x


def released_score(weights: PartWeights, norm: torch.Tensor) -> torch.Tensor:
    """three_w_one_wa of the released code with b = c = 1, as method.md states it."""
    down = weights.down.double().abs() * norm
    up, gate = weights.up.double().abs().T, weights.gate.double().abs().T
    terms = down / down.sum(0) + up / up.sum(0) + gate / gate.sum(0)
    return terms.mean(0) * norm


def test_the_released_score_is_the_activation_norm_up_to_a_constant(
    block: tuple[BlockStatistics, PartWeights, torch.Tensor],
) -> None:
    statistics, weights, _ = block
    norm = statistics.norm
    for scale in (1.0, 100.0):  # whatever the weights are
        other = PartWeights(weights.gate * scale, weights.up.flip(0), weights.down.square())
        for ffn in (weights, other):
            score = released_score(ffn, norm)
            assert torch.allclose(score / norm, torch.full_like(norm, 3 / D), rtol=1e-12)
            assert torch.equal(score.argsort(), norm.argsort())
    assert torch.equal(SCORERS["cfsp"].score(statistics, lambda: weights, DAMPING), norm)


def test_scores_that_need_no_weights_read_none(
    block: tuple[BlockStatistics, PartWeights, torch.Tensor],
) -> None:
    def refuse() -> PartWeights:
        raise AssertionError("weights were read")

    for name in ("cfsp", "activation-norm"):
        assert SCORERS[name].score(block[0], refuse, DAMPING).shape == (F,)
    with pytest.raises(AssertionError, match="weights were read"):
        SCORERS["wanda-sp"].score(block[0], refuse, DAMPING)


def test_scores_match_their_formulas(
    block: tuple[BlockStatistics, PartWeights, torch.Tensor],
) -> None:
    statistics, weights, x = block
    gate, up, down = (m.double() for m in (weights.gate, weights.up, weights.down))
    n = (x.square().sum(0) / 4).sqrt()
    variance = x.var(0, correction=0)
    relative = n / n.mean()
    by_row = down.abs().sum(1, keepdim=True)
    weighted = down.abs() * n
    expected = {
        "activation-norm": n,
        "magnitude-sp": down.square().sum(0).sqrt(),
        "cfsp-output": n * down.square().sum(0) ** 0.25,
        "wanda-sp": down.abs().mean(0) * n,
        "wifn": down.abs().mean(0) * n,
        "flap": variance * down.square().sum(0),
        "cfsp-eq8": (down.abs() / by_row).sum(0) * n / n.norm() + 2,
        "cfsp-balanced": (weighted / weighted.sum(1, keepdim=True)).sum(0)
        + relative * (gate.abs() / gate.abs().sum(0)).sum(1)
        + relative * (up.abs() / up.abs().sum(0)).sum(1),
    }
    for name, value in expected.items():
        score = SCORERS[name].score(statistics, lambda: weights, DAMPING)
        assert torch.allclose(score, value, rtol=1e-6), name
    assert set(expected) | {"cfsp", "obs"} == set(SCORERS)  # tests/pruning/test_obs.py
