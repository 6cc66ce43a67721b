"""Perplexity by the usual protocol."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel

from ..calibration.text import EVALUATE, bos_token, consecutive_windows, load_text, tokenize
from ..distributed import ALONE, Ranks

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


@torch.no_grad()
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
    device = next(model.parameters()).device
    own = windows[ranks.share(len(windows))]
    bar = tqdm(
        total=own.numel(), desc="evaluate", unit="tok", unit_scale=True, disable=not progress
    )

    def logits() -> Iterator[torch.Tensor]:
        for window in own:
            yield model(input_ids=window[None].to(device), use_cache=False).logits
            bar.update(len(window))

    with bar:
        return perplexity_of_logits(logits(), windows, dataset=dataset, counts=counts, ranks=ranks)


@torch.no_grad()
def perplexity_of_logits(
    logits: Iterable[torch.Tensor],
    windows: torch.Tensor,
    *,
    dataset: str = "",
    counts: Mapping[str, int] | None = None,
    ranks: Ranks = ALONE,
    seconds: float = 0.0,
) -> Perplexity:
    """:func:`perplexity` from what a model says to each window, however it was run.

    Args:
        logits: [1, S, V] of every window of this rank's share in order, asked for one at a time.
        windows: [N, S] int64, those of all ranks.
        dataset, counts, ranks: see :func:`perplexity`.
        seconds: spent on the windows before the logits.
    """
    started = time.perf_counter()
    count, seqlen = windows.shape
    own = ranks.share(count)
    found = [_loss(*pair) for pair in zip(logits, windows[own], strict=True)]
    losses = torch.zeros(count, dtype=torch.float64)
    if found:
        losses[own] = torch.stack(found).cpu()
    ranks.fill_(losses)
    several = counts if counts is not None and len(counts) > 1 else {}
    parts = losses.split(list(several.values())) if several else ()
    return Perplexity(
        _perplexity(losses, seqlen),
        count,
        count * (seqlen - 1),
        seqlen,
        dataset,
        ranks.most(seconds + time.perf_counter() - started),
        {name: _perplexity(part, seqlen) for name, part in zip(several, parts, strict=True)},
    )


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
    tokenizer: Any, dataset: str, seqlen: int, windows: int | None, bos: str
) -> torch.Tensor:
    """Non-overlapping windows [N, S] of a dataset's held-out text."""
    tokens = tokenize(tokenizer, load_text(dataset, EVALUATE))
    return consecutive_windows(tokens, seqlen, windows, bos_token(tokenizer, bos))


def perplexities_by_dataset(
    before: Perplexity, after: Perplexity
) -> list[tuple[str, float, float]]:
    """(dataset, before, after) of each dataset of several that the same windows are of."""
    return [(name, value, after.by_dataset[name]) for name, value in before.by_dataset.items()]
