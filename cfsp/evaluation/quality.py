"""Perplexity by the usual protocol, and the held-out text that it is measured on."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel

from ..calibration.mixtures import (
    format_mixture,
    held_out_mixture,
    parse_mixture,
    share_out,
    windows_of_each,
)
from ..calibration.text import EVALUATE, load_text
from ..calibration.tokens import bos_token, check_tokens, consecutive_windows, tokenize
from ..calibration.windows import Calibration
from ..distributed import ALONE, Ranks
from ..errors import CfspError
from ..models.loading import check_seqlen, model_device
from ..models.opening import OpenModel
from ..typed import check_whole

EVALUATION_WINDOWS = 16
ROWS_PER_LOSS = 256  # positions per cross entropy, so that no second copy of all logits is made


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over non-overlapping windows."""

    perplexity: float
    windows: int
    tokens: int
    """Predicted tokens: windows * (seqlen - 1)."""
    seqlen: int
    dataset: str
    seconds: float
    by_dataset: Mapping[str, float] = field(default_factory=dict)
    """Perplexity of the windows of each dataset, where they are of several."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = asdict(self)
        if not self.by_dataset:
            del values["by_dataset"]
        return values


@dataclass(frozen=True)
class HeldOut:
    """The windows that a model is measured on, before and after."""

    tokens: torch.Tensor
    """[N, S] int64; none where nothing is measured."""
    dataset: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Windows of each dataset, one after another, where they are of several."""

    @torch.no_grad()
    def measure(
        self, model: PreTrainedModel, *, progress: bool, ranks: Ranks = ALONE
    ) -> Perplexity | None:
        """The perplexity of a model in memory; None where nothing is measured."""
        device = model_device(model)
        own = self.tokens[ranks.share(len(self.tokens))]
        hidden = not progress or not len(own)
        bar = tqdm(total=own.numel(), desc="evaluate", unit="tok", unit_scale=True, disable=hidden)

        def logits() -> Iterator[torch.Tensor]:
            for window in own:
                yield model(input_ids=window[None].to(device), use_cache=False).logits
                bar.update(len(window))

        with bar:
            return self.of_logits(logits(), ranks)

    @torch.no_grad()
    def of_logits(
        self, logits: Iterable[torch.Tensor], ranks: Ranks, seconds: float = 0.0
    ) -> Perplexity | None:
        """The same from [1, S, V] of every window of this rank's share in order, asked for one at a
        time, after ``seconds`` spent on them."""
        started = time.perf_counter()
        count, seqlen = self.tokens.shape
        if count == 0:
            return None
        own = ranks.share(count)
        found = list(map(_loss, logits, self.tokens[own]))  # unlike zip, it holds none of them
        losses = torch.zeros(count, dtype=torch.float64)
        if found:
            losses[own] = torch.stack(found).cpu()
        ranks.fill_(losses)
        several = self.counts if len(self.counts) > 1 else {}
        parts = losses.split(list(several.values())) if several else ()
        return Perplexity(
            _perplexity(losses, seqlen),
            count,
            count * (seqlen - 1),
            seqlen,
            self.dataset,
            ranks.most(seconds + time.perf_counter() - started),
            {name: _perplexity(part, seqlen) for name, part in zip(several, parts, strict=True)},
        )


def perplexity(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    dataset: str = "",
    counts: Mapping[str, int] | None = None,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> Perplexity:
    """exp of the mean negative log likelihood over all predicted tokens.

    Args:
        model: a causal LM in eval mode.
        windows: [N, S] int64; each is read on its own, and predicts its last S - 1 tokens.
        dataset: kept with the result.
        counts: windows of each dataset, one after another, where they are of several.
        progress: show a bar on stderr.
        ranks: each reads its share of the windows; the perplexity does not depend on how many.
    """
    check_tokens(model, None, windows)
    held_out = HeldOut(windows, dataset, counts or {})
    measured = held_out.measure(model, progress=progress, ranks=ranks)
    if measured is None:
        raise CfspError("there are no windows to measure on")
    return measured


def _perplexity(losses: torch.Tensor, seqlen: int) -> float:
    """Of windows with these losses [N] fp64, each a sum over its seqlen - 1 tokens."""
    mean = math.fsum(losses.tolist()) / (len(losses) * (seqlen - 1))
    return math.nan if math.isnan(mean) else math.exp(min(mean, 700.0))


def _loss(logits: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood of a window [S] after its first token, from [1, S, V]: fp64 []."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    rows, targets = logits[0, :-1], window[1:].to(logits.device)
    for part in zip(rows.split(ROWS_PER_LOSS), targets.split(ROWS_PER_LOSS), strict=True):
        total += functional.cross_entropy(part[0].float(), part[1], reduction="sum").double()
    return total


def evaluation_windows(
    tokenizer: Any,
    dataset: str,
    seqlen: int,
    windows: int | None,
    bos: str,
    text_column: str | None = None,
) -> torch.Tensor:
    """Non-overlapping windows [N, S] of a dataset's held-out text."""
    tokens = tokenize(tokenizer, load_text(dataset, EVALUATE, text_column, tokenizer))
    return consecutive_windows(tokens, seqlen, windows, bos_token(tokenizer, bos))


def held_out_text(
    opened: OpenModel, calibration: Calibration, dataset: str | None, windows: int
) -> HeldOut:
    """Held-out windows to measure on: of ``dataset``, or else of those of the calibration's
    datasets that have a held-out part, see :func:`cfsp.calibration.mixtures.held_out_mixture`."""
    check_whole("eval_windows", windows)
    if windows == 0:
        return HeldOut(torch.empty(0, calibration.seqlen, dtype=torch.int64))
    mixture = parse_mixture(dataset or calibration.dataset)
    if dataset is None:
        mixture = held_out_mixture(mixture)
    check_seqlen(opened.model, calibration.seqlen)
    if opened.tokenizer is None:
        raise CfspError("a live model needs its tokenizer to be evaluated; eval_windows=0 skips it")
    counts = share_out(mixture, windows, "eval_windows")

    def cut(tokens: torch.Tensor, count: int, start: int | None) -> torch.Tensor:
        return consecutive_windows(tokens, calibration.seqlen, count, start)

    bos, column = calibration.bos, calibration.text_column
    drawn = windows_of_each(opened.tokenizer, counts, EVALUATE, bos, cut, column)
    tokens = torch.cat(drawn)
    check_tokens(opened.model, opened.tokenizer, tokens)
    return HeldOut(tokens, format_mixture(mixture), counts)
