"""Perplexity by the usual protocol, and generation with its speed."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel

from ..calibration.mixtures import windows_of_each
from ..calibration.text import (
    EVALUATE,
    bos_token,
    consecutive_windows,
    load_text,
    tokenize,
)
from ..distributed import ALONE, Ranks
from ..models.blockwise import RidingWindows

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
    started = time.perf_counter()
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
        measured = perplexity_of_logits(
            logits(), windows, dataset=dataset, counts=counts, ranks=ranks
        )
    return replace(measured, seconds=ranks.most(time.perf_counter() - started))


@torch.no_grad()
def perplexity_of_logits(
    logits: Iterable[torch.Tensor],
    windows: torch.Tensor,
    *,
    dataset: str = "",
    counts: Mapping[str, int] | None = None,
    ranks: Ranks = ALONE,
) -> Perplexity:
    """:func:`perplexity` from what a model says to each window, however it was run.

    Args:
        logits: [1, S, V] of every window of this rank's share in order, asked for one at a time.
        windows: [N, S] int64, those of all ranks.
        dataset: kept with the result.
        counts: windows of each dataset, one after another, where they are of several.
        ranks: those that share the windows.
    """
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
        seconds=0.0,
        by_dataset={
            name: _perplexity(part, seqlen) for name, part in zip(several, parts, strict=True)
        },
    )


def _perplexity(losses: torch.Tensor, seqlen: int) -> float:
    """Of windows with these losses [N] fp64, each a sum over its seqlen - 1 tokens."""
    mean = math.fsum(losses.tolist()) / (len(losses) * (seqlen - 1))
    return math.nan if math.isnan(mean) else math.exp(min(mean, 700.0))


def _loss(logits: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood of a window [S] after its first token, from [1, S, V]: fp64 []."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    targets_of_window = window[1:].to(logits.device)
    for rows, targets in zip(
        logits[0, :-1].split(ROWS_PER_LOSS), targets_of_window.split(ROWS_PER_LOSS), strict=True
    ):
        total += functional.cross_entropy(rows.float(), targets, reduction="sum").double()
    return total


def ridden_perplexity(
    riding: RidingWindows,
    windows: torch.Tensor,
    *,
    dataset: str = "",
    counts: Mapping[str, int] | None = None,
    ranks: Ranks = ALONE,
) -> Perplexity:
    """:func:`perplexity` of windows [N, S] that have gone through every block.

    Args:
        riding: this rank's share of them.
        windows: those of all ranks.
        dataset: kept with the result.
        counts: windows of each dataset, one after another, where they are of several.
        ranks: those that share the windows.
    """
    measured = perplexity_of_logits(
        riding.logits(), windows, dataset=dataset, counts=counts, ranks=ranks
    )
    return replace(measured, seconds=ranks.most(riding.seconds))


def evaluation_windows(
    tokenizer: Any, dataset: str, seqlen: int, windows: int | None, bos: str
) -> torch.Tensor:
    """Non-overlapping windows [N, S] of a dataset's held-out text."""
    tokens = tokenize(tokenizer, load_text(dataset, EVALUATE))
    return consecutive_windows(tokens, seqlen, windows, bos_token(tokenizer, bos))


def mixed_evaluation_windows(
    tokenizer: Any, counts: Mapping[str, int], seqlen: int, bos: str
) -> torch.Tensor:
    """:func:`evaluation_windows` [N, S] of several datasets, so many of each, one after another."""

    def cut(tokens: torch.Tensor, count: int, start: int | None) -> torch.Tensor:
        return consecutive_windows(tokens, seqlen, count, start)

    return torch.cat(windows_of_each(tokenizer, counts, EVALUATE, bos, cut))


def perplexities_by_dataset(
    before: Perplexity, after: Perplexity
) -> list[tuple[str, float, float]]:
    """(dataset, before, after) of each dataset of several that the same windows are of."""
    return [(name, value, after.by_dataset[name]) for name, value in before.by_dataset.items()]


@dataclass(frozen=True)
class Generation:
    """A greedy continuation and how fast it came."""

    text: str
    tokens: int
    tokens_per_second: float


def generate_side_by_side(
    models: Sequence[PreTrainedModel], tokenizer: Any, prompt: str, new_tokens: int, rounds: int = 3
) -> list[Generation]:
    """Greedy continuations by several models, with speeds that can be compared.

    The models take turns, so that each sees the same machine; a speed is the median of the rounds.
    """
    turns = [[generate(m, tokenizer, prompt, new_tokens) for m in models] for _ in range(rounds)]
    return [
        replace(of_model[0], tokens_per_second=median(g.tokens_per_second for g in of_model))
        for of_model in zip(*turns, strict=True)
    ]


@torch.no_grad()
def generate(model: PreTrainedModel, tokenizer: Any, prompt: str, new_tokens: int) -> Generation:
    """Greedy continuation of a prompt; the speed counts prefill and decoding, after a warm-up."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = inputs.input_ids.shape[1]
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    model.generate(**inputs, max_new_tokens=2, **options)
    started = time.perf_counter()
    ids = model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **options)[
        0, length:
    ]
    seconds = time.perf_counter() - started
    return Generation(tokenizer.decode(ids, skip_special_tokens=True), len(ids), len(ids) / seconds)
