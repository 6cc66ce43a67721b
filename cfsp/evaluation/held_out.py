"""The held-out text that a model is measured on before and after."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..calibration.mixtures import (
    format_mixture,
    held_out_mixture,
    parse_mixture,
    share_out,
    windows_of_each,
)
from ..calibration.text import EVALUATE, consecutive_windows
from ..calibration.windows import Calibration
from ..errors import CfspError
from ..models.loading import OpenModel, check_seqlen


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
    check_seqlen(opened.model, calibration.seqlen)
    if opened.tokenizer is None:
        raise CfspError("a live model needs its tokenizer to be evaluated; eval_windows=0 skips it")
    counts = share_out(mixture, windows, "eval_windows")

    def cut(tokens: torch.Tensor, count: int, start: int | None) -> torch.Tensor:
        return consecutive_windows(tokens, calibration.seqlen, count, start)

    drawn = windows_of_each(opened.tokenizer, counts, EVALUATE, calibration.bos, cut)
    return HeldOut(format_mixture(mixture), torch.cat(drawn), counts)
