"""Which channels a block keeps: those with the highest scores, exactly as many as asked."""

import torch

from .errors import CfspError


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
