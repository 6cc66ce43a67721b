"""What makes up for removed channels: a new down projection for the kept ones, and a bias."""

from collections.abc import Callable

import torch

from cfsp_kernels import gather_columns

from .channels import CutDown
from .statistics import BlockStatistics

ROWS_PER_PRODUCT = 1024  # so that no fp64 copy of a whole matrix is made


def none(
    down: torch.Tensor,
    kept: torch.Tensor,
    statistics: BlockStatistics | None,
    out: torch.Tensor | None = None,
) -> CutDown:
    """The kept columns as they are."""
    return CutDown(gather_columns(down, kept, out=out), None)


def bias(
    down: torch.Tensor,
    kept: torch.Tensor,
    statistics: BlockStatistics | None,
    out: torch.Tensor | None = None,
) -> CutDown:
    """A bias that puts the mean of what was removed back: W[:, removed] @ mean(x)[removed].

    Source: FLAP, arXiv 2312.11983.
    """
    if statistics is None:
        raise ValueError("bias compensation needs the statistics of the block")
    mean = statistics.mean.to(down.device, copy=True)
    mean[kept] = 0
    # Copies in fp64: a product over the weights where they lie depends, in its last bits, on the
    # alignment of their memory, and so on how they were loaded.
    added = torch.cat([rows.double() @ mean for rows in down.split(ROWS_PER_PRODUCT)])
    return CutDown(gather_columns(down, kept, out=out), added.to(down.dtype))


Compensation = Callable[
    [torch.Tensor, torch.Tensor, BlockStatistics | None, torch.Tensor | None], CutDown
]
"""(down [D, F], kept [width], statistics, memory for the new weight or None) -> the new down
projection."""
COMPENSATIONS: dict[str, Compensation] = {"none": none, "bias": bias}
NEEDS_STATISTICS = frozenset({"bias"})
ADD_BIAS = frozenset({"bias"})
"""Compensations after which the down projection has a bias."""
