"""The held-out text that a model is measured on before and after."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ..calibration.mixtures import (
    format_mixture,
    held_out_mixture,
    parse_mixture,
    share_out,
    windows_of_each,
)
from ..calibration.text import EVALUATE, consecutive_windows
from ..calibration.windows import Calibration
from ..distributed import ALONE, Ranks
from ..errors import CfspError
from ..models.blockwise import RidingWindows
from ..models.loading import check_seqlen
from ..models.opening import OpenModel
from .quality import Perplexity, perplexity, perplexity_of_logits


@dataclass(frozen=True)
class HeldOut:
    """What a model is measured on before and after."""

    dataset: str
    tokens: torch.Tensor | None
    """[N, S] int64; None where nothing is measured."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Windows of each dataset, one dataset after another."""

    def measure(
        self, model: PreTrainedModel, *, progress: bool, ranks: Ranks = ALONE
    ) -> Perplexity | None:
        """The perplexity of a model in memory; None where nothing is measured."""
        if self.tokens is None:
            return None
        return perplexity(
            model,
            self.tokens,
            dataset=self.dataset,
            counts=self.counts,
            progress=progress,
            ranks=ranks,
        )

    def measure_ridden(self, riding: RidingWindows, ranks: Ranks) -> Perplexity | None:
        """That of the blocks that this rank's share of the windows went through."""
        if self.tokens is None:
            return None
        return perplexity_of_logits(
            riding.logits(),
            self.tokens,
            dataset=self.dataset,
            counts=self.counts,
            ranks=ranks,
            seconds=riding.seconds,
        )


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
