"""What makes up for removed channels: a new down projection for the kept ones, and a bias."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from cfsp_kernels import gather_columns

from ..calibration.grams import held_out_windows
from ..calibration.statistics import BlockStatistics
from .least_squares import fit_down, output_errors

ROWS_PER_PRODUCT = 1024  # so that no fp64 copy of a whole matrix is made
JUDGING_TOKENS = 16
"""Held-out tokens of an expert without which nothing is known of its error."""


@dataclass(frozen=True)
class FitRecord:
    """What came of fitting the down projection of one FFN, or of one expert."""

    applied: bool
    """Whether the fit was put in; otherwise the columns are those of the dense model."""
    error_before: float | None
    """|| change of the output ||^2 / || output ||^2 on held-out tokens, with the columns as they
    were; None where nothing was held out."""
    error_after: float | None
    """The same with the fit, whether it was put in or not."""
    damping: float
    """Relative to the mean square of a channel: what was asked for, or the tenfolds of it that a
    factorisation took."""
    tokens: int
    """Tokens that it was fitted on."""
    channels: int
    """Channels of the dense FFN."""


@dataclass(frozen=True)
class CutDown:
    """The down projection of a pruned FFN."""

    weight: torch.Tensor
    """[D, width]."""
    bias: torch.Tensor | None
    """[D], to be added to the bias that the projection may have."""
    record: FitRecord | None = None
    """None for compensations that fit nothing."""


def none(
    down: torch.Tensor,
    kept: torch.Tensor,
    statistics: BlockStatistics | None,
    damping: float,
    out: torch.Tensor | None = None,
) -> CutDown:
    """The kept columns as they are."""
    return CutDown(gather_columns(down, kept, out=out), None)


def bias(
    down: torch.Tensor,
    kept: torch.Tensor,
    statistics: BlockStatistics | None,
    damping: float,
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


def least_squares(
    down: torch.Tensor,
    kept: torch.Tensor,
    statistics: BlockStatistics | None,
    damping: float,
    out: torch.Tensor | None = None,
    *,
    bias: bool = False,
) -> CutDown:
    """The kept columns fitted to the dense output, see :mod:`cfsp.pruning.least_squares`.

    They stay as they are, with a bias of zero where there is one, unless the fit lowers the error
    of the output on the held-out tokens; and where an expert has next to none of these.
    """
    if statistics is None or statistics.gram is None:
        raise ValueError("least squares need the Gram matrices of the block")
    stored, plain = statistics.gram, gather_columns(down, kept, out=out)
    tokens, judging = stored.tokens
    zero = down.new_zeros(down.shape[0]) if bias else None
    before = after = None
    fit = None
    if judging >= JUDGING_TOKENS or not held_out_windows(statistics.windows):
        fit = fit_down(down, kept, stored.fit(down.device), damping, bias=bias)
        held_out = stored.held_out(down.device)
        if held_out is not None:
            fitted = [(fit.weight, fit.bias)] if fit is not None else []
            before, *judged = output_errors(down, kept, [(plain, None), *fitted], held_out)
            after = judged[0] if judged else None
    better = fit is not None and (before is None or (after is not None and after < before))
    used = fit.damping if fit is not None else damping
    record = FitRecord(better, before, after, used, tokens, stored.channels)
    if fit is None or not better:
        return CutDown(plain, zero, record)
    return CutDown(plain.copy_(fit.weight), fit.bias, record)


Compensation = Callable[
    [torch.Tensor, torch.Tensor, BlockStatistics | None, float, torch.Tensor | None], CutDown
]
"""(down [D, F], kept [width], statistics, damping, memory for the new weight or None) -> the new
down projection."""
COMPENSATIONS: dict[str, Compensation] = {
    "none": none,
    "bias": bias,
    "least-squares": least_squares,
    "least-squares-bias": partial(least_squares, bias=True),
    "blockwise": least_squares,
}
COMPENSATION_SUMMARIES = {
    "none": "the kept columns stay as they are",
    "bias": "a bias puts back the mean of what was removed (FLAP)",
    "least-squares": "the kept columns are refitted to the dense output of the FFN",
    "least-squares-bias": "the same, with a bias",
    "blockwise": "least squares, then all weights of the FFN are trained on the block's output",
}
BLOCKWISE = frozenset({"blockwise"})
"""Compensations after which all weights of the FFN are fitted again, see :mod:`pruning.refit`."""
NEEDS_GRAM = frozenset({"least-squares", "least-squares-bias"}) | BLOCKWISE
NEEDS_STATISTICS = NEEDS_GRAM | {"bias"}
ADD_BIAS = frozenset({"bias", "least-squares-bias"})
"""Compensations after which the down projection has a bias."""
