"""What the demo generates with both models."""

import pytest
from transformers import PreTrainedTokenizerFast

from cfsp.cli.demo import generate, generate_side_by_side

from ..conftest import make_tiny


def test_generation_is_greedy_and_as_long_as_asked(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = (generate(make_tiny(), tokenizer, "abc", 8) for _ in range(2))
    assert first.text == second.text
    assert first.tokens == 8
    assert first.tokens_per_second > 0


def test_side_by_side_takes_turns_and_keeps_each_models_text(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [make_tiny(seed=0), make_tiny(seed=1)]
    turns: list[int] = []

    def recorded(model: object, *rest: object) -> object:
        turns.append(models.index(model))
        return generate(model, *rest)

    monkeypatch.setattr("cfsp.cli.demo.generate", recorded)
    found = generate_side_by_side(models, tokenizer, "abc", 8, rounds=2)
    assert turns == [0, 1, 0, 1]
    assert [g.text for g in found] == [generate(m, tokenizer, "abc", 8).text for m in models]
