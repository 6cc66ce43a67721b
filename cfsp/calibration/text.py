"""Text in, token windows out: the datasets by name, local files, and the two ways to cut."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..errors import CfspError

CALIBRATE, EVALUATE = "calibrate", "evaluate"
BOS_CHOICES = ("auto", "always", "never")
SEPARATORS = {CALIBRATE: " ", EVALUATE: "\n\n"}
"""What joins a dataset's texts into one stream: as the released CFSP calibrates, and as the
usual perplexity protocol evaluates."""


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face hub: its train split, and the one that is held out."""

    path: str
    column: str
    held_out: str
    name: str | None = None
    data_files: dict[str, str] | None = None
    revision: str | None = None
    documents: int | None = None
    """Read only so many, without downloading the rest."""

    def texts(self, purpose: str) -> list[str]:
        from datasets import load_dataset

        split = "train" if purpose == CALIBRATE else self.held_out
        options: dict[str, Any] = {"split": split, "revision": self.revision}
        if self.data_files is not None:
            options["data_files"] = {split: self.data_files[split]}
        if self.documents is None:
            return list(load_dataset(self.path, self.name, **options)[self.column])
        stream = load_dataset(self.path, self.name, streaming=True, **options)
        return [row[self.column] for row in islice(stream, self.documents)]


def _builtin_texts(purpose: str) -> list[str]:
    """English prose that ships with Python, by topic; a quarter of it is held out."""
    from pydoc_data.topics import topics

    parts: dict[str, list[str]] = {CALIBRATE: [], EVALUATE: []}
    lengths = {CALIBRATE: 0, EVALUATE: 0}
    for name in sorted(topics):
        part = EVALUATE if 3 * lengths[EVALUATE] < lengths[CALIBRATE] else CALIBRATE
        parts[part].append(topics[name])
        lengths[part] += len(topics[name])
    return parts[purpose]


DATASETS: dict[str, Callable[[str], list[str]]] = {
    "wikitext2": HubDataset("Salesforce/wikitext", "text", "test", name="wikitext-2-raw-v1").texts,
    "c4": HubDataset(
        "allenai/c4",
        "text",
        "validation",
        data_files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        documents=10_000,
    ).texts,
    "ptb": HubDataset(
        "ptb-text-only/ptb_text_only", "sentence", "test", revision="refs/convert/parquet"
    ).texts,
    "builtin": _builtin_texts,
}
"""Dataset name -> function from purpose ("calibrate" or "evaluate") to texts."""

FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}


def exists(dataset: str) -> bool:
    """Whether a dataset is a name or the path of something."""
    return dataset in DATASETS or os.path.exists(dataset)


def check_dataset(dataset: str) -> None:
    """Raise CfspError where a dataset is neither a name nor the path of something."""
    if not exists(dataset):
        raise CfspError(
            f"unknown dataset {dataset!r}; valid: {', '.join(DATASETS)}, or the path of a text, "
            f"parquet, json or arrow file"
        )


def load_text(dataset: str, purpose: str) -> str:
    """One string: a named dataset's split for ``purpose``, or the whole of a local file or of a
    folder that ``datasets`` saved. CfspError where it is unknown, unreadable or without text."""
    check_dataset(dataset)
    try:
        named = dataset in DATASETS
        texts = DATASETS[dataset](purpose) if named else _local_texts(Path(dataset))
    except CfspError:
        raise
    except ImportError as error:
        raise CfspError(f"dataset {dataset!r} needs the package {error.name!r}") from None
    except Exception as error:  # datasets and its readers raise of many kinds
        reason = " ".join(str(error).split())[:300]
        message = f"cannot load dataset {dataset!r}: {type(error).__name__}: {reason}"
        raise CfspError(message) from error
    return SEPARATORS[purpose].join(texts)


def _local_texts(path: Path) -> list[str]:
    builder = FORMATS.get(path.suffix.lower())
    if builder is None and path.is_file():
        return [path.read_text(encoding="utf-8")]
    from datasets import Dataset, load_dataset, load_from_disk

    if path.is_dir():
        table = load_from_disk(str(path))
    else:
        table = load_dataset(builder, data_files=str(path), split="train")
    if not isinstance(table, Dataset):
        raise CfspError(f"{path} holds several splits; give the folder of one: {', '.join(table)}")
    texts = [name for name, feature in table.features.items() if feature.dtype == "string"]
    if not texts or (len(texts) > 1 and "text" not in texts):
        raise CfspError(
            f"{path} needs a column 'text' or a single column of strings, "
            f"got {', '.join(table.column_names)}"
        )
    return list(table["text" if "text" in texts else texts[0]])


def bos_token(tokenizer: Any, bos: str) -> int | None:
    """The token that every window starts with, or None. "auto" asks the tokenizer whether it puts
    its BOS before text of its own accord."""
    token = tokenizer.bos_token_id
    if bos == "never" or (bos == "auto" and token is None):
        return None
    if token is None:
        raise CfspError("`bos='always'`: the tokenizer has no BOS token")
    puts_bos = bos == "always" or tokenizer("a").input_ids[:1] == [token]
    return int(token) if puts_bos else None


def tokenize(tokenizer: Any, text: str) -> torch.Tensor:
    """Tokens of a text as one stream, int64 [n], without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids, dtype=torch.int64)


def _with_bos(windows: torch.Tensor, bos: int | None) -> torch.Tensor:
    if bos is None:
        return windows
    return torch.cat([torch.full((len(windows), 1), bos), windows], dim=1)


def random_windows(
    tokens: torch.Tensor, samples: int, seqlen: int, seed: int, bos: int | None = None
) -> torch.Tensor:
    """Calibration windows [samples, seqlen] at random starts, as the released CFSP draws them; a
    BOS is the first of the ``seqlen`` tokens. CfspError for too few tokens."""
    if len(tokens) < seqlen + 2:
        raise CfspError(
            f"the calibration text has {len(tokens)} tokens; "
            f"a window of {seqlen} needs {seqlen + 2} or more"
        )
    generator = random.Random(seed)
    length = seqlen if bos is None else seqlen - 1
    starts = [generator.randint(0, len(tokens) - seqlen - 1) for _ in range(samples)]
    return _with_bos(torch.stack([tokens[start : start + length] for start in starts]), bos)


def consecutive_windows(
    tokens: torch.Tensor, seqlen: int, limit: int | None = None, bos: int | None = None
) -> torch.Tensor:
    """Evaluation windows [n, seqlen]: non-overlapping, from the start; a short rest is dropped.
    CfspError for too few tokens for one window, or for ``limit`` of them."""
    if limit is not None and limit < 1:
        raise CfspError(f"windows must be 1 or more, got {limit}")
    length = seqlen if bos is None else seqlen - 1
    available = len(tokens) // length
    if available < (limit or 1):
        raise CfspError(
            f"the evaluation text has {len(tokens)} tokens: {available} windows of {seqlen}, "
            f"{limit or 1} needed"
        )
    count = limit or available
    return _with_bos(tokens[: count * length].view(count, length), bos)
