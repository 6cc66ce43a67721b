"""Long texts are tokenised in pieces to the tokens of the whole; a tokenizer is left as it was; no
token is beyond the embedding."""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import cfsp
from cfsp.calibration import tokens
from cfsp.calibration.text import CALIBRATE, load_text
from cfsp.calibration.tokens import bos_token, check_tokens, random_windows, tokenize
from cfsp.calibration.windows import Calibration, calibration_windows
from cfsp.errors import CfspError
from cfsp.evaluation.quality import held_out_text, perplexity
from cfsp.models.opening import open_any

from ..cli.test_cli import run
from ..conftest import TEXT, make_tiny, make_tokenizer

WHOLE = {"add_special_tokens": False, "truncation": False, "padding": False}
GROUPS_OF_THREE = r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+|[^\s\p{L}\p{N}]+"


def byte_level(prefix: bool) -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, show_progress=False
    )


def like_llama_3() -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer, trainer = byte_level(False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GROUPS_OF_THREE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer, trainer


def like_llama_2() -> tuple[Tokenizer, trainers.Trainer]:
    """The whole text is one word to its BPE."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return tokenizer, trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, show_progress=False, max_token_length=16
    )


def metaspace_bpe() -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer, trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>"], show_progress=False, max_token_length=16
    )


def unigram() -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=500, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )


def word_piece() -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=["[UNK]"], show_progress=False
    )


KINDS: dict[str, Callable[[], tuple[Tokenizer, trainers.Trainer]]] = {
    "byte-level": lambda: byte_level(False),
    "byte-level with prefix space": lambda: byte_level(True),
    "like Llama 3": like_llama_3,
    "like Llama 2": like_llama_2,
    "metaspace BPE": metaspace_bpe,
    "unigram": unigram,
    "WordPiece": word_piece,
}


@cache
def prose() -> str:
    return load_text("builtin", CALIBRATE)


@cache
def trained(kind: str) -> PreTrainedTokenizerFast:
    tokenizer, trainer = KINDS[kind]()
    text = prose()[:40_000]
    tokenizer.train_from_iterator(
        [text[start : start + 500] for start in range(0, len(text), 500)], trainer
    )
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def whole(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, **WHOLE).input_ids)


def odd(seed: int) -> str:
    """Text of all that splits in its own way, shuffled."""
    draw = random.Random(seed)
    parts = [
        *("\n" * 40, " " * 60, "\r\n\r\n", "\t\t  \t", "\u00a0\u2003", "▁▁", "x" * 70, "ab" * 45),
        *("😀👩\u200d👧🏳\ufe0f\u200d🌈" * 3, "漢字仮名交じり文" * 8, "e\u0301a\u0308" * 5),
        *(
            "12345678901234567",
            "<|end|>",
            "<|en",
            "don't",
            "...!!!",
            *prose()[1000:3000].split(" "),
        ),
    ]
    return "".join(draw.choice(parts) + draw.choice(("", " ", "\n")) for _ in range(1500))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PIECE", 1500)
    monkeypatch.setattr(tokens, "OVERLAP", 400)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_tokens_of_the_whole(kind: str) -> None:
    tokenizer = trained(kind)
    crlf = prose()[5000:25_000].replace("\n", "\r\n")
    for text in (prose()[:60_000], crlf, *map(odd, range(4))):
        assert torch.equal(tokenize(tokenizer, text), whole(tokenizer, text))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    ["漢字仮名交じり文は空白なし" * 600, " " * 9000 + "end", "\n" * 9000, "a" * 9001, "7" * 9001],
    ids=["CJK", "spaces", "newlines", "a word", "digits"],
)
def test_where_no_seam_is_found_pieces_grow_until_there_is(kind: str, text: str) -> None:
    tokenizer = trained(kind)
    text = f"{prose()[:3000]}{text}{prose()[3000:6000]}"
    assert torch.equal(tokenize(tokenizer, text), whole(tokenizer, text))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(" \n\r\tab1.é漢😀<|end|>") | st.text(max_size=12), max_size=150),
    st.sampled_from(sorted(KINDS)),
)
def test_any_text_is_tokenised_as_the_whole(parts: list[str], kind: str) -> None:
    text = "".join(parts).encode("utf-8", "replace").decode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PIECE", 160)
        patch.setattr(tokens, "OVERLAP", 100)
        assert torch.equal(tokenize(trained(kind), text), whole(trained(kind), text).long())


@pytest.mark.parametrize("kind", ["byte-level", "like Llama 2", "unigram"])
def test_a_long_text_takes_a_few_pieces_of_its_length(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the sizes as they are: no seam of prose fails, so each character is read about once."""
    tokenizer, text, lengths = trained(kind), prose(), []
    call = type(tokenizer)._encode_plus

    def counted(self: object, text: str, *rest: object, **options: object) -> object:
        lengths.append(len(text))
        return call(self, text, *rest, **options)

    monkeypatch.setattr(type(tokenizer), "_encode_plus", counted)
    found = tokenize(tokenizer, text)
    assert max(lengths) <= tokens.PIECE + tokens.OVERLAP
    assert sum(lengths) <= 1.1 * len(text)
    monkeypatch.undo()
    assert torch.equal(found, whole(tokenizer, text))


def test_an_endless_word_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """WordPiece takes a word as a whole: here the text would be one."""
    monkeypatch.setattr(tokens, "PIECE", 1000)
    monkeypatch.setattr(tokens, "LONGEST", 4000)
    tokenizer = trained("WordPiece")
    found = tokenize(tokenizer, "x" * 100_000)
    assert 2 <= len(found) <= 25
    assert set(found.tolist()) == {tokenizer.convert_tokens_to_ids("[UNK]")}


class Slow:
    """A tokenizer without offsets."""

    is_fast = False
    bos_token_id = None

    def __call__(self, text: str, **options: object) -> object:
        assert "return_offsets_mapping" not in options
        return type("Encoding", (), {"input_ids": [ord(letter) for letter in text]})


def test_a_slow_tokenizer_gets_the_whole() -> None:
    text = prose()[:120_000]
    assert tokenize(Slow(), text).tolist() == [ord(letter) for letter in text]


@pytest.mark.smollm2
def test_smollm2s_own_tokenizer(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert torch.equal(tokenize(tokenizer, prose()), whole(tokenizer, prose()))
    monkeypatch.setattr(tokens, "PIECE", 1500)
    monkeypatch.setattr(tokens, "OVERLAP", 400)
    for seed in range(4):
        assert torch.equal(tokenize(tokenizer, odd(seed)), whole(tokenizer, odd(seed)))


def baked(
    tokenizer: PreTrainedTokenizerFast, truncation: int | None, padding: int | None
) -> PreTrainedTokenizerFast:
    backend = tokenizer.backend_tokenizer
    if truncation:
        backend.enable_truncation(truncation, stride=2, direction="left")
    if padding:
        backend.enable_padding(length=padding, pad_id=258, pad_token="<pad>", direction="left")
    return tokenizer


@pytest.mark.parametrize(("truncation", "padding"), [(16, None), (None, 64), (16, 64)])
@pytest.mark.parametrize("text", ["ab" * 100, "ab"], ids=["long", "short"])
def test_truncation_and_padding_of_the_file_are_ignored_and_kept(
    truncation: int | None, padding: int | None, text: str
) -> None:
    tokenizer = baked(make_tokenizer(puts_bos=True), truncation, padding)
    before = tokenizer.backend_tokenizer.to_str()
    found = tokenize(tokenizer, text)
    assert bos_token(tokenizer, "auto") == 256
    assert found.tolist() == make_tokenizer()(text).input_ids
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("command", ["prune", "live"])
def test_a_result_keeps_truncation_and_padding(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "dense"
    make_tiny().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    tokenizer = baked(make_tokenizer(), 16, 32)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    given = json.loads((folder / "tokenizer.json").read_text())
    assert given["truncation"]["max_length"] == 16
    if command == "live":
        recipe = cfsp.Recipe(width_multiple=1, calibration=Calibration(TEXT, 4, 32))
        model = cfsp.load(folder)
        loaded = AutoTokenizer.from_pretrained(folder)
        cfsp.prune(model, loaded, recipe, tmp_path / "out", eval_windows=1, progress=False)
    else:
        code, _, error = run(
            capsys, "prune", folder, "--out", tmp_path / "out", "--dataset", TEXT, "--samples", 4,
            "--seqlen", 32, "--width-multiple", 1, "--eval-windows", 1, "--quiet",
        )  # fmt: skip
        assert code == 0, error
    kept = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert (kept["truncation"], kept["padding"]) == (given["truncation"], given["padding"])
    assert kept == given


def with_names(count: int) -> PreTrainedTokenizerFast:
    """The byte tokenizer with tokens from 259 on."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<|x{number}|>" for number in range(count)])
    return tokenizer


def of_calibration(model: PreTrainedModel, file: str) -> None:
    calibration_windows(model, with_names(9), Calibration(file, 40, 64))


def of_evaluation(model: PreTrainedModel, file: str) -> None:
    opened = open_any(model, with_names(9))
    held_out_text(opened, Calibration(file, 40, 64), file, 4)


def of_a_caller(model: PreTrainedModel, file: str) -> None:
    perplexity(model, torch.tensor([[1, 262, 3]]), progress=False)


@pytest.mark.parametrize("make", [of_calibration, of_evaluation, of_a_caller])
def test_a_token_beyond_the_embedding_is_named_before_any_forward(
    make: Callable[[PreTrainedModel, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cfsp.models.opening.check_as_configured", lambda model: None)  # of no text
    model, file = make_tiny(), tmp_path / "t.txt"
    file.write_text("hello <|x0|> " * 20 + "<|x3|> " + "hello " * 20)
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("a forward"))
    with pytest.raises(CfspError, match=r"token 262.* of the text is beyond the model's 260 rows"):
        make(model, str(file))


def test_evaluate_and_recover_name_it_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = tmp_path / "dense", tmp_path / "t.txt"
    make_tiny().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    code, _, error = run(
        capsys, "prune", folder, "--out", tmp_path / "out", "--dataset", TEXT, "--samples", 4,
        "--seqlen", 32, "--width-multiple", 1, "--eval-windows", 0, "--quiet",
    )  # fmt: skip
    assert code == 0, error
    file.write_text("hello <|x3|> " * 80)
    with_names(9).save_pretrained(tmp_path / "out")
    told = "token 262 ('<|x3|>') of the text is beyond the model's 260 rows"
    for command in (
        ("evaluate", tmp_path / "out", "--dataset", file, "--seqlen", 32),
        ("recover", tmp_path / "out", "--out", tmp_path / "back", "--dataset", file,
         "--steps", 2),
    ):  # fmt: skip
        code, _, error = run(capsys, *command, "--quiet")
        assert (code, error.count("\n")) == (2, 1)
        assert told in error


def test_tokens_within_are_let_through() -> None:
    check_tokens(make_tiny(), make_tokenizer(), torch.tensor([[0, 259]]))
    check_tokens(make_tiny(), make_tokenizer(), torch.empty(0, 8, dtype=torch.int64))


@pytest.mark.parametrize("samples", [85, 10**6, 10**9])
def test_more_windows_than_there_are_places_are_refused_before_any_is_drawn(samples: int) -> None:
    with pytest.raises(CfspError, match=f"samples {samples} is more than the 84 places where a wi"):
        random_windows(torch.arange(100), samples, 16, 0)
    assert random_windows(torch.arange(100), 84, 16, 0).shape == (84, 16)
