"""What a model is calibrated on: the settings, and the token windows that they make."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import CfspError
from ..models.loading import check_seqlen
from ..settings import at_least, check, setting
from .columns import ORDER
from .mixtures import interleaved, parse_mixture, share_out, windows_of_each
from .text import CALIBRATE, DATASETS, LOCAL
from .tokens import BOS_CHOICES, check_tokens, random_windows

MAX_WINDOWS = 1_000_000
"""Of a calibration: more tokens than anyone's memory has room for."""


@dataclass(frozen=True)
class Calibration:
    """The tokens that a model is calibrated on."""

    dataset: str = setting(
        "wikitext2",
        f"{', '.join(DATASETS)}, or the path of a {LOCAL}, of whose splits train is read; windows "
        "of several, such as wikitext2:3,c4:1, are shared out by weight.",
        metavar="NAME|PATH[:WEIGHT],...",
    )
    samples: int = setting(
        128, "Number of windows, of all datasets.", must_be=at_least(1), most=MAX_WINDOWS
    )
    seqlen: int = setting(1024, "Tokens per window.", must_be=at_least(2))
    seed: int = setting(0, "Seed of the random start of each window.")
    bos: str = setting(
        "auto",
        "Whether windows start with a BOS token; auto: where the tokenizer itself puts one.",
        choices=BOS_CHOICES,
    )
    text_column: str | None = setting(
        None,
        "Column of the text in local files that have columns: strings, or chats for the "
        "tokenizer's chat template.",
        metavar="NAME",
        unset=ORDER,
    )

    def __post_init__(self) -> None:
        check(self)
        share_out(parse_mixture(self.dataset), self.samples)

    @property
    def windows_by_dataset(self) -> dict[str, int]:
        """Windows of each dataset."""
        return share_out(parse_mixture(self.dataset), self.samples)


def calibration_windows(
    model: PreTrainedModel, tokenizer: Any, settings: Calibration
) -> torch.Tensor:
    """Token windows [samples, seqlen] that a calibration runs on. CfspError where seqlen is beyond
    the model's positions or a token beyond its embeddings, a dataset is unknown or has too few
    tokens."""
    check_seqlen(model, settings.seqlen)
    if tokenizer is None:
        raise CfspError("a live model needs its tokenizer to be calibrated on a dataset")
    windows = calibration_tokens(tokenizer, settings)
    check_tokens(model, tokenizer, windows)
    return windows


def calibration_tokens(tokenizer: Any, settings: Calibration) -> torch.Tensor:
    """Calibration windows [samples, seqlen], mixed evenly; each dataset gives the first of those
    that it gives alone with the same seed, so that they do not depend on the others."""

    def cut(tokens: torch.Tensor, count: int, bos: int | None) -> torch.Tensor:
        return random_windows(tokens, count, settings.seqlen, settings.seed, bos)

    counts = settings.windows_by_dataset
    drawn = windows_of_each(tokenizer, counts, CALIBRATE, settings.bos, cut, settings.text_column)
    return torch.cat(drawn)[interleaved(list(counts.values()))]
