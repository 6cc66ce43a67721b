"""Scores [E] of routed experts, of sums that a calibration makes, and which of them stay."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...calibration.statistics import BlockStatistics
from ...errors import CfspError
from ...models.parts.experts import ExpertsFFN
from ...models.parts.part import Part


@dataclass(frozen=True)
class ExpertScore:
    """A way to score experts."""

    score: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """(tokens of each, sum over them of the squared norm of its output, of the norm times the
    token's share) -> [E] fp64; 0 of one without tokens."""
    summary: str


EXPERT_SCORES: dict[str, ExpertScore] = {
    "msan": ExpertScore(
        lambda tokens, energy, gated: energy / tokens.clamp(min=1),
        "mean squared norm of the expert's output over its tokens (arXiv 2606.15716)",
    ),
    "reap": ExpertScore(
        lambda tokens, energy, gated: gated / tokens.clamp(min=1),
        "mean norm of its output times the token's share, over its tokens (arXiv 2510.13999)",
    ),
    "frequency": ExpertScore(lambda tokens, energy, gated: tokens.double(), "number of its tokens"),
}
"""Score by name."""


def expert_scores(block: BlockStatistics, score: str) -> torch.Tensor:
    """[E] fp64 of the routed experts of a block."""
    routed = [own.experts > 1 for own in block.units for _ in range(own.experts)]
    seen = torch.tensor(block.expert_tokens)[torch.tensor(routed)]
    return EXPERT_SCORES[score].score(seen, block.expert_energy, block.expert_gated)


def chosen_experts(
    block: BlockStatistics, parts: Sequence[Part], score: str
) -> torch.Tensor | None:
    """Which experts of a block stay, [n] int64, ascending; None where all do. Raises CfspError
    where nothing was measured."""
    for part in parts:
        if isinstance(part, ExpertsFFN) and part.fewer is not None:
            scores = expert_scores(block, score)
            if not scores.any():
                raise CfspError(f"expert_score {score!r}: no expert of a block saw a token")
            return part.fewer.choose(scores)
    return None
