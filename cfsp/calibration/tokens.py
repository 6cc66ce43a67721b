"""Text to tokens to windows: one stream of tokens, and the two ways to cut it."""

import random
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import CfspError

BOS_CHOICES = ("auto", "always", "never")
PIECE, OVERLAP, AGREED = 100_000, 4_000, 8
"""Characters that are tokenised at a time and that two pieces share, and the tokens on either side
of a seam that both must have."""
PLAIN = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
LONGEST = 1_000_000
"""A piece that has grown to so many characters without a seam, as one endless word does, is cut
where it ends."""


@contextmanager
def _as_it_was(tokenizer: Any) -> Iterator[None]:
    """Restore the truncation and padding of a tokenizer.json, which a call without them drops."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = getattr(backend, "truncation", None), getattr(backend, "padding", None)
    try:
        yield
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def bos_token(tokenizer: Any, bos: str) -> int | None:
    """The token that every window starts with, or None. "auto" asks the tokenizer whether it puts
    its BOS before text of its own accord."""
    token = tokenizer.bos_token_id
    if bos == "never" or (bos == "auto" and token is None):
        return None
    if token is None:
        raise CfspError("`bos='always'`: the tokenizer has no BOS token")
    with _as_it_was(tokenizer):
        puts_bos = bos == "always" or tokenizer("a").input_ids[:1] == [token]
    return int(token) if puts_bos else None


def tokenize(tokenizer: Any, text: str) -> torch.Tensor:
    """Tokens of a text as one stream, int64 [n], without special tokens, truncation or padding.

    A fast tokenizer gets a long text in pieces that overlap, for the whole takes hundreds of bytes
    a character. Two pieces are joined in the middle of what they share, where both have the same
    tokens at the same places on both sides of the seam; where they do not, the first is taken
    longer. So every two tokens that follow each other do so in a piece, and the result is that of
    the whole text. For BPE that is a proof: the first merge of the whole text that crossed a
    boundary between two tokens would have been made in their piece too. A split before BPE, and
    WordPiece, go from left to right and look ahead by a word; Unigram forgets in a few tokens.
    """
    fast = getattr(tokenizer, "is_fast", False)
    with _as_it_was(tokenizer):
        if fast and len(text) > PIECE:
            return torch.cat(list(_joined(tokenizer, text)))
        return torch.tensor(tokenizer(text, **PLAIN).input_ids, dtype=torch.int64)


@dataclass(frozen=True)
class _Piece:
    """The tokens of text[begin:end], with the characters that each is of, counted from begin."""

    begin: int
    end: int
    ids: list[int]
    spans: list[tuple[int, int]]

    def near(self, place: int) -> tuple[int, list[tuple[int, int, int]]]:
        """The first token that starts at this place of the text or after it; and it with those
        around it, with their places in the text."""
        index = bisect_left(self.spans, (place - self.begin, 0))
        found = range(max(0, index - AGREED), min(len(self.ids), index + AGREED))
        spans = (self.spans[i] for i in found)
        places = ((start + self.begin, end + self.begin) for start, end in spans)
        return index, [(self.ids[i], *place) for i, place in zip(found, places, strict=True)]


def _joined(tokenizer: Any, text: str) -> Iterator[torch.Tensor]:
    """The tokens of a text, a piece at a time."""

    def piece(begin: int, end: int) -> _Piece:
        found = tokenizer(
            text[begin:end],
            **PLAIN,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return _Piece(begin, min(end, len(text)), found["input_ids"], found["offset_mapping"])

    left, given, more = piece(0, PIECE), 0, PIECE
    while left.end < len(text):
        right = piece(left.end - OVERLAP, left.end + PIECE)
        middle = left.end - OVERLAP // 2
        (stop, mine), (start, others) = left.near(middle), right.near(middle)
        if mine == others and len(mine) == 2 * AGREED:
            yield torch.tensor(left.ids[given:stop], dtype=torch.int64)
            left, given, more = right, start, PIECE
        elif left.end - left.begin < LONGEST:
            left, more = piece(left.begin, left.end + more), 2 * more
        else:
            yield torch.tensor(left.ids[given:], dtype=torch.int64)
            left, given, more = piece(left.end, left.end + PIECE), 0, PIECE
    yield torch.tensor(left.ids[given:], dtype=torch.int64)


def check_tokens(model: PreTrainedModel, tokenizer: Any, windows: torch.Tensor) -> None:
    """Raise CfspError where windows have a token that the model has no embedding of."""
    rows = model.get_input_embeddings().weight.shape[0]
    token = int(windows.max()) if windows.numel() else -1
    if token >= rows:
        name = f" ({tokenizer.convert_ids_to_tokens(token)!r})" if tokenizer is not None else ""
        raise CfspError(
            f"token {token}{name} of the text is beyond the model's {rows} rows of embeddings: "
            "the tokenizer is not the model's, or tokens were added to it alone"
        )


def _with_bos(windows: torch.Tensor, bos: int | None) -> torch.Tensor:
    if bos is None:
        return windows
    return torch.cat([torch.full((len(windows), 1), bos), windows], dim=1)


def random_windows(
    tokens: torch.Tensor, samples: int, seqlen: int, seed: int, bos: int | None = None
) -> torch.Tensor:
    """Calibration windows [samples, seqlen] at random starts, as the released CFSP draws them; a
    BOS is the first of the ``seqlen`` tokens. CfspError for too few tokens."""
    places = len(tokens) - seqlen
    if places < 2:
        raise CfspError(
            f"the calibration text has {len(tokens)} tokens; "
            f"a window of {seqlen} needs {seqlen + 2} or more"
        )
    if samples > places:
        raise CfspError(
            f"samples {samples} is more than the {places} places where a window of {seqlen} can "
            f"start in the calibration text, which has {len(tokens)} tokens"
        )
    generator = random.Random(seed)
    length = seqlen if bos is None else seqlen - 1
    starts = [generator.randint(0, places - 1) for _ in range(samples)]
    return _with_bos(torch.stack([tokens[start : start + length] for start in starts]), bos)


def consecutive_windows(
    tokens: torch.Tensor, seqlen: int, limit: int | None = None, bos: int | None = None
) -> torch.Tensor:
    """Evaluation windows [n, seqlen]: non-overlapping, from the start; a short rest is dropped.
    CfspError for too few tokens for one window, or for ``limit`` of them."""
    if limit is not None and limit < 1:
        raise CfspError(f"windows must be 1 or more, got {limit}")
    length = seqlen if bos is None else seqlen - 1
    count = limit or max(1, len(tokens) // length)
    if len(tokens) < count * length:
        need = f"a window of {seqlen} needs" if count == 1 else f"{count} of {seqlen} need"
        raise CfspError(
            f"the evaluation text has {len(tokens)} tokens; {need} {count * length} or more"
        )
    return _with_bos(tokens[: count * length].view(count, length), bos)
