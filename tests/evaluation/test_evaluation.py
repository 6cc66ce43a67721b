"""Perplexity against its definition."""

import math
import weakref

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from cfsp.calibration.text import EVALUATE, load_text
from cfsp.calibration.tokens import tokenize
from cfsp.distributed import ALONE
from cfsp.evaluation.quality import HeldOut, evaluation_windows, perplexity
from cfsp.models.blockwise import RidingWindows

from ..conftest import make_tiny, make_tokenizer


@torch.no_grad()
def test_perplexity_is_exp_of_the_mean_over_all_predicted_tokens(windows: torch.Tensor) -> None:
    model = make_tiny()
    logits = model(input_ids=windows).logits.double().log_softmax(-1)
    likelihood = logits[:, :-1].gather(-1, windows[:, 1:, None])
    measured = perplexity(model, windows, progress=False)
    assert measured.perplexity == pytest.approx(math.exp(-float(likelihood.mean())), rel=1e-5)
    assert (measured.windows, measured.tokens, measured.seqlen) == (6, 6 * 23, 24)


@torch.no_grad()
def test_logits_of_one_window_are_there_at_a_time(windows: torch.Tensor) -> None:
    model, made, alive = make_tiny(), [], []

    def seen(module: torch.nn.Module, args: object, logits: torch.Tensor) -> None:
        alive.append(sum(known() is not None for known in made))
        made.append(weakref.ref(logits))

    model.lm_head.register_forward_hook(seen)
    whole = perplexity(model, windows, progress=False)
    blocks = list(model.model.layers)
    riding = RidingWindows(model, blocks, windows)
    for number in range(len(blocks)):
        riding.ride(number)
    found = HeldOut(windows).of_logits(riding.logits(), ALONE)
    assert found.perplexity == whole.perplexity
    assert alive == [0] * 2 * len(windows)


def test_long_windows_are_summed_over_all_their_chunks() -> None:
    windows = torch.randint(0, 256, (1, 700))
    model = make_tiny(max_position_embeddings=1024)
    loss = model(input_ids=windows, labels=windows).loss
    assert perplexity(model, windows, progress=False).perplexity == pytest.approx(
        math.exp(float(loss)), rel=1e-5
    )


def test_windows_follow_the_tokenizers_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenize(tokenizer, load_text("builtin", EVALUATE))
    plain = evaluation_windows(tokenizer, "builtin", 32, 3, "auto")
    assert torch.equal(plain.flatten(), ids[:96])
    with_bos = evaluation_windows(make_tokenizer(puts_bos=True), "builtin", 32, 3, "auto")
    assert with_bos[:, 0].tolist() == [256] * 3
    assert torch.equal(with_bos[:, 1:].flatten(), ids[:93])
