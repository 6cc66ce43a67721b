"""Texts, windows and BOS."""

import json
import random
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from cfsp.calibration.text import CALIBRATE, DATASETS, EVALUATE, load_text
from cfsp.calibration.tokens import bos_token, consecutive_windows, random_windows, tokenize
from cfsp.errors import CfspError

from ..conftest import make_tokenizer

TEXTS = ["one two", "three", "four"]


@pytest.fixture(params=["parquet", "jsonl", "json", "arrow", "folder", "txt", "sentence"])
def local_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    table = Dataset.from_dict({"id": [1, 2, 3], "text": TEXTS})
    path = tmp_path / f"data.{request.param}"
    match request.param:
        case "parquet":
            table.to_parquet(path)
        case "jsonl":
            table.to_json(path)
        case "json":
            path.write_text(json.dumps([{"text": text} for text in TEXTS]))
        case "arrow":
            folder = tmp_path / "saved"
            table.save_to_disk(folder)
            return next(folder.glob("*.arrow"))
        case "folder":
            table.save_to_disk(path)
        case "txt":
            path.write_text(" ".join(TEXTS))
        case "sentence":
            path = tmp_path / "other-column.parquet"
            table.rename_column("text", "sentence").to_parquet(path)
    return path


def test_local_formats_are_read_and_joined_with_a_space(local_file: Path) -> None:
    assert load_text(str(local_file), CALIBRATE) == "one two three four"


def test_evaluation_joins_with_two_newlines(tmp_path: Path) -> None:
    Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "t.parquet")
    assert load_text(str(tmp_path / "t.parquet"), EVALUATE) == "one two\n\nthree\n\nfour"


def test_builtin_calibration_and_held_out_text_share_no_topic() -> None:
    calibrate, evaluate = (set(DATASETS["builtin"](purpose)) for purpose in (CALIBRATE, EVALUATE))
    assert not calibrate & evaluate
    assert sum(map(len, calibrate)) > 200_000
    assert sum(map(len, evaluate)) > 60_000


@pytest.mark.parametrize(
    ("name", "split", "column"),
    [
        ("wikitext2", {CALIBRATE: "train", EVALUATE: "test"}, "text"),
        ("ptb", {CALIBRATE: "train", EVALUATE: "test"}, "sentence"),
        ("c4", {CALIBRATE: "train", EVALUATE: "validation"}, "text"),
    ],
)
def test_hub_datasets_ask_for_the_right_split(
    name: str, split: dict[str, str], column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loading code runs as it is, with the hub replaced by local rows."""

    def load_dataset(path: str, config: str | None, **options: object) -> object:
        assert options["split"] in split.values()
        if "data_files" in options:
            assert list(options["data_files"]) == [options["split"]]
        rows = Dataset.from_dict({column: [f"{path} {options['split']}", "b"]})
        return rows.to_iterable_dataset() if options.get("streaming") else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for purpose, wanted in split.items():
        assert load_text(name, purpose).split()[1] == wanted


def test_unknown_and_unreadable_datasets_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(CfspError, match="unknown dataset 'nope'; valid: wikitext2, c4, ptb, buil"):
        load_text("nope", CALIBRATE)
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(CfspError, match="cannot load dataset"):
        load_text(str(tmp_path / "bad.parquet"), CALIBRATE)
    Dataset.from_dict({"n": [1]}).to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(CfspError, match="needs a column 'text' or a single column of strings"):
        load_text(str(tmp_path / "numbers.parquet"), CALIBRATE)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CfspError, match=r"latin.txt is not text in UTF-8, at byte 0$"):
        load_text(str(tmp_path / "latin.txt"), CALIBRATE)


def test_random_windows_start_where_the_released_code_starts_them() -> None:
    tokens = torch.arange(1000)
    random.seed(7)
    starts = [random.randint(0, 1000 - 16 - 1) for _ in range(5)]
    assert random_windows(tokens, 5, 16, seed=7)[:, 0].tolist() == starts
    assert torch.equal(random_windows(tokens, 5, 16, 7)[2], torch.arange(16) + starts[2])


def test_windows_with_bos_have_the_same_length_and_start_with_it() -> None:
    tokens = torch.arange(100)
    drawn = random_windows(tokens, 3, 8, seed=0, bos=999)
    assert drawn.shape == (3, 8)
    assert drawn[:, 0].tolist() == [999] * 3
    assert torch.equal(drawn[:, 1:], random_windows(tokens, 3, 8, seed=0)[:, :7])
    cut = consecutive_windows(tokens, 8, bos=999)
    assert cut.shape == (14, 8)
    assert torch.equal(cut[:, 1:].flatten(), torch.arange(98))


def test_consecutive_windows_do_not_overlap_and_drop_the_rest() -> None:
    assert torch.equal(consecutive_windows(torch.arange(19), 5), torch.arange(15).view(3, 5))
    assert consecutive_windows(torch.arange(19), 5, limit=2).shape == (2, 5)
    with pytest.raises(CfspError, match="windows must be 1 or more, got 0"):
        consecutive_windows(torch.arange(19), 5, limit=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda t: random_windows(t, 1, 16, 0),
        lambda t: consecutive_windows(t, 16),
        lambda t: consecutive_windows(t, 8, limit=3),
    ],
)
def test_too_few_tokens_are_refused_with_the_numbers(make: object) -> None:
    with pytest.raises(CfspError, match="has 15 tokens"):
        make(torch.arange(15))  # type: ignore[operator]


def test_bos_follows_the_tokenizer_unless_told() -> None:
    plain, with_bos = make_tokenizer(), make_tokenizer(puts_bos=True)
    assert bos_token(plain, "auto") is None
    assert bos_token(plain, "always") == 256
    assert bos_token(with_bos, "auto") == 256
    assert bos_token(with_bos, "never") is None
    nameless = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer)
    assert bos_token(nameless, "auto") is None
    with pytest.raises(CfspError, match="no BOS token"):
        bos_token(nameless, "always")


def test_tokenize_adds_no_special_tokens() -> None:
    assert 256 not in tokenize(make_tokenizer(puts_bos=True), "abc").tolist()


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb"])
@pytest.mark.parametrize("reached", [True, False])
def test_a_hub_that_cannot_be_reached_is_asked_once(
    name: str, reached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            if not reached:
                raise RuntimeError("no route to host")

    def load_dataset(*_: object, **__: object) -> None:
        assert datasets.config.HF_HUB_OFFLINE is not reached
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    told = (
        f"dataset '{name}': Couldn't reach it; 'builtin', or a file of your own, needs no network"
    )
    with pytest.raises(CfspError, match=f"^{told}$"):
        load_text(name, CALIBRATE)
    assert len(asked) == 1
    assert datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb"])
def test_offline_the_hub_is_not_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("asked"))
    with pytest.raises(
        CfspError, match=f"dataset '{name}': Couldn't reach '.*; 'builtin', or a fi"
    ):
        load_text(name, CALIBRATE)
