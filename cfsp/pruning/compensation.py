"""What makes up for removed channels: a new down projection for the kept ones, and a bias."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from cfsp_kernels import gather_columns

from ..calibration.statistics import BlockStatistics
from ..models.parts.channels import CutDown
from .least_squares import DAMPING, fit_down, output_errors

ROWS_PER_PRODUCT = 1024  # so that no fp64 copy of a whole matrix is made
JUDGING_TOKENS = 16
"""Held-out tokens of an expert without which nothing is known of its error."""


@dataclass(frozen=True)
class DownProjection:
    """A down projection that is to be cut, and what is known of its input."""

    weight: torch.Tensor
    """[D, F]."""
    kept: torch.Tensor
    """[width] int64, on the device of the weight."""
    statistics: BlockStatistics | None = None
    """Statistics of this FFN or expert alone."""
    damping: float = DAMPING
    out: torch.Tensor | None = None
    """Memory for the new weight [D, width]; None: new memory is taken."""

    def kept_columns(self) -> torch.Tensor:
        """[D, width], the kept columns as they are."""
        return gather_columns(self.weight, self.kept, out=self.out)


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


Compensated = tuple[CutDown, FitRecord | None]


def none(down: DownProjection) -> Compensated:
    """The kept columns as they are."""
    return CutDown(down.kept_columns(), None), None


def bias(down: DownProjection) -> Compensated:
    """A bias that puts the mean of what was removed back: W[:, removed] @ mean(x)[removed].
    Source: FLAP, arXiv 2312.11983."""
    if down.statistics is None:
        raise ValueError("bias compensation needs the statistics of the block")
    mean = down.statistics.mean.to(down.weight.device, copy=True)
    mean[down.kept] = 0
    # Copies in fp64: a product over the weights where they lie depends, in its last bits, on the
    # alignment of their memory, and so on how they were loaded.
    added = torch.cat([rows.double() @ mean for rows in down.weight.split(ROWS_PER_PRODUCT)])
    return CutDown(down.kept_columns(), added.to(down.weight.dtype)), None


def least_squares(down: DownProjection, *, bias: bool = False) -> Compensated:
    """The kept columns fitted to the dense output, see :mod:`cfsp.pruning.least_squares`.

    They stay as they are, with a bias of zero where one is asked for, unless the fit lowers the
    error on held-out tokens; and where an expert has next to none of these.
    """
    if down.statistics is None or down.statistics.gram is None:
        raise ValueError("least squares need the Gram matrix of the FFN")
    gram, weight, plain = down.statistics.gram, down.weight, down.kept_columns()
    held_out, before, after, fit = gram.held_out, None, None, None
    if held_out is None or held_out.tokens >= JUDGING_TOKENS:
        fit = fit_down(weight, down.kept, gram, down.damping, bias=bias)
        if held_out is not None:
            candidates = [(plain, None)] + ([(fit.weight, fit.bias)] if fit is not None else [])
            before, *judged = output_errors(weight, down.kept, candidates, held_out)
            after = next(iter(judged), None)
    better = fit is not None and (before is None or (after is not None and after < before))
    used = fit.damping if fit is not None else down.damping
    record = FitRecord(better, before, after, used, gram.tokens, weight.shape[1])
    if fit is None or not better:
        return CutDown(plain, weight.new_zeros(len(weight)) if bias else None), record
    return CutDown(plain.copy_(fit.weight), fit.bias), record


@dataclass(frozen=True)
class Compensation:
    """A way to make up for removed channels."""

    cut: Callable[[DownProjection], Compensated]
    summary: str
    needs_statistics: bool = True
    needs_gram: bool = True
    adds_bias: bool = False
    """Whether the down projection then has a bias."""
    blockwise: bool = False
    """Whether all weights of the FFN are then fitted again, see :mod:`cfsp.pruning.refit`."""


COMPENSATIONS: dict[str, Compensation] = {
    "none": Compensation(
        none, "the kept columns stay as they are", needs_statistics=False, needs_gram=False
    ),
    "bias": Compensation(
        bias,
        "a bias puts back the mean of what was removed (FLAP)",
        needs_gram=False,
        adds_bias=True,
    ),
    "least-squares": Compensation(
        least_squares, "the kept columns are refitted to the dense output of the FFN"
    ),
    "least-squares-bias": Compensation(
        partial(least_squares, bias=True), "the same, with a bias", adds_bias=True
    ),
    "blockwise": Compensation(
        least_squares,
        "least squares, then all weights of the FFN are trained on the block's output",
        blockwise=True,
    ),
}
