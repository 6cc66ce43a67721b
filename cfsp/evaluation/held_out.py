"""The held-out text that a model is measured on before and after."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..calibration.mixtures import format_mixture, held_out_mixture, parse_mixture, share_out
from ..calibration.windows import Calibration
from ..errors import CfspError
from ..models.loading import check_seqlen
from ..models.opening import OpenModel
from .quality import mixed_evaluation_windows


@dataclass(frozen=True)
class HeldOut:
    """What a model is measured on before and after."""

    dataset: str
    tokens: torch.Tensor | None
    """[N, S] int64; None where nothing is measured."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Windows of each dataset, one dataset after another."""


def held_out_text(
    opened: OpenModel, calibration: Calibration, dataset: str | None, windows: int
) -> HeldOut:
    """Held-out windows to measure on: of ``dataset``, or else of those of the calibration's
    datasets that have a held-out part, see :func:`cfsp.calibration.mixtures.held_out_mixture`."""
    if windows == 0:
        return HeldOut("", None)
    mixture = parse_mixture(dataset or calibration.dataset)
    if dataset is None:
        mixture = held_out_mixture(mixture)
    seqlen = calibration.seqlen
    check_seqlen(opened.model, seqlen)
    if opened.tokenizer is None:
        raise CfspError("a live model needs its tokenizer to be evaluated; eval_windows=0 skips it")
    counts = share_out(mixture, windows, "eval_windows")
    tokens = mixed_evaluation_windows(opened.tokenizer, counts, seqlen, calibration.bos)
    return HeldOut(format_mixture(mixture), tokens, counts)
