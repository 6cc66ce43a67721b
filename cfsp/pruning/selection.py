"""Which channels a block keeps: those with the highest scores, exactly as many as asked."""

import torch

from ..errors import CfspError

QUANTILES = 33


def select_channels(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of the ``width`` highest scores, [width] int64 in ascending order.

    Equal scores go to the lower index.

    Raises:
        CfspError: a score is NaN, or the width is not in [1, F].
    """
    if not 1 <= width <= len(scores):
        raise CfspError(f"width must be in [1, {len(scores)}], got {width}")
    if scores.isnan().any():
        raise CfspError(f"score of channel {int(scores.isnan().nonzero()[0])} is NaN")
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:width].sort().values


def select_by_expert(scores: torch.Tensor, experts: int, width: int) -> torch.Tensor:
    """Of each of a number of experts the ``width`` highest scores, [experts, width] int64.

    ``scores`` are those of one expert after the other; indices count within an expert.
    """
    return torch.stack([select_channels(part, width) for part in scores.chunk(experts)])


def score_quantiles(scores: torch.Tensor) -> tuple[float, ...]:
    """The scores [F] at 33 evenly spaced ranks, lowest first, to 5 digits: how they are spread.

    Scores that are not finite are left out; () where none is.
    """
    ordered = scores[scores.isfinite()].sort().values
    if not len(ordered):
        return ()
    ranks = torch.linspace(0, len(ordered) - 1, QUANTILES, dtype=torch.float64).round().long()
    return tuple(float(f"{value:.5g}") for value in ordered[ranks].tolist())
