"""Perplexity by the usual protocol, and generation with its speed."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel

from .text import EVALUATE, bos_token, consecutive_windows, load_text, tokenize

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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, windows: torch.Tensor, *, dataset: str = "", progress: bool = True
) -> Perplexity:
    """exp of the mean negative log likelihood over all predicted tokens.

    Args:
        model: a causal LM in eval mode.
        windows: [N, S] int64; each is read on its own, and predicts its last S - 1 tokens.
        dataset: kept with the result.
        progress: show a bar on stderr.
    """
    started = time.perf_counter()
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    bar = tqdm(
        total=windows.numel(), desc="evaluate", unit="tok", unit_scale=True, disable=not progress
    )
    with bar:
        for window in windows:
            ids = window.to(device)
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            for rows, targets in zip(
                logits.split(ROWS_PER_LOSS), ids[1:].split(ROWS_PER_LOSS), strict=True
            ):
                total += functional.cross_entropy(rows.float(), targets, reduction="sum").double()
            bar.update(len(window))
    count, seqlen = windows.shape
    tokens = count * (seqlen - 1)
    return Perplexity(
        math.exp(min(float(total) / tokens, 700.0)) if not math.isnan(float(total)) else math.nan,
        count,
        tokens,
        seqlen,
        dataset,
        time.perf_counter() - started,
    )


def evaluation_windows(
    tokenizer: Any, dataset: str, seqlen: int, windows: int | None, bos: str
) -> torch.Tensor:
    """Non-overlapping windows [N, S] of a dataset's held-out text."""
    tokens = tokenize(tokenizer, load_text(dataset, EVALUATE))
    return consecutive_windows(tokens, seqlen, windows, bos_token(tokenizer, bos))


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
