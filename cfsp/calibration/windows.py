"""What a model is calibrated on: the settings, and the token windows that they make."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import CfspError
from ..models.loading import check_seqlen
from ..settings import at_least, check, setting
from .mixtures import calibration_tokens, parse_mixture, share_out
from .text import BOS_CHOICES, DATASETS


@dataclass(frozen=True)
class Calibration:
    """The tokens that a model is calibrated on."""

    dataset: str = setting(
        "wikitext2",
        f"{', '.join(DATASETS)}, or a text, parquet, json or arrow file; windows of several, such "
        "as wikitext2:3,c4:1, are shared out by weight.",
        metavar="NAME|PATH[:WEIGHT],...",
    )
    samples: int = setting(128, "Number of windows, of all datasets.", must_be=at_least(1))
    seqlen: int = setting(1024, "Tokens per window.", must_be=at_least(2))
    seed: int = setting(0, "Seed of the random start of each window.")
    bos: str = setting(
        "auto",
        "Whether windows start with a BOS token; auto: where the tokenizer itself puts one.",
        choices=BOS_CHOICES,
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
    """Token windows [samples, seqlen] that a calibration runs on.

    Raises:
        CfspError: seqlen beyond the model's positions, unknown dataset, too few tokens.
    """
    check_seqlen(model, settings.seqlen)
    if tokenizer is None:
        raise CfspError("a live model needs its tokenizer to be calibrated on a dataset")
    return calibration_tokens(
        tokenizer,
        parse_mixture(settings.dataset),
        settings.samples,
        settings.seqlen,
        settings.seed,
        settings.bos,
    )
