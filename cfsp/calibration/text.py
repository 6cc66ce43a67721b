"""The text of a dataset: by name, of the hub or shipped with Python, or a local file or folder."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import CfspError, nearest, reason

CALIBRATE, EVALUATE = "calibrate", "evaluate"
SPLITS = {CALIBRATE: ("train",), EVALUATE: ("test", "validation")}
"""Which split of a local folder is read: the first that is there, else the only one."""
REACH_SECONDS = 10.0
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
        with _without_retries():
            if self.documents is None:
                return list(load_dataset(self.path, self.name, **options)[self.column])
            stream = load_dataset(self.path, self.name, streaming=True, **options)
            return [row[self.column] for row in islice(stream, self.documents)]


@contextmanager
def _without_retries() -> Iterator[None]:
    """Ask the hub once whether it is there; where it is not, datasets reads what it has on disk as
    if told that it is offline, or fails at once. Its own retries take half a minute."""
    from datasets import config
    from huggingface_hub import get_session

    offline = config.HF_HUB_OFFLINE
    try:
        if not offline:
            get_session().head(config.HF_ENDPOINT, timeout=REACH_SECONDS)
    except Exception:  # of the HTTP library that huggingface_hub uses, which changes
        config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = offline


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

LOCAL = "text, parquet, arrow, json, csv or tsv file, or of a folder of such"
PATH = r"\.(txt|md|parquet|arrow|(nd)?jsonl?|[ct]sv|gz|bz2|xz|zst)(:[\d.]+)?$"
"""Names that only a file can have, with or without a weight."""


def exists(dataset: str) -> bool:
    """Whether a dataset is a name or the path of something."""
    return dataset in DATASETS or os.path.exists(dataset)


def check_dataset(dataset: str) -> None:
    """Raise CfspError where a dataset is neither a name nor the path of a file or folder."""
    if dataset in DATASETS or os.path.isfile(dataset) or os.path.isdir(dataset):
        return
    if os.path.exists(dataset):
        raise CfspError(f"dataset {dataset!r} is neither a file nor a folder")
    if os.sep in dataset or re.search(PATH, dataset, re.IGNORECASE):
        raise CfspError(f"dataset {dataset!r}: no such file")
    names, near = ", ".join(DATASETS), nearest(dataset, DATASETS)
    raise CfspError(f"unknown dataset {dataset!r}{near}; valid: {names}, or the path of a {LOCAL}")


def load_text(dataset: str, purpose: str, column: str | None = None, tokenizer: Any = None) -> str:
    """One string: a named dataset's split for ``purpose``, or that of a local file or folder, see
    :func:`local_texts`, of its column ``column``. Chats need the tokenizer. CfspError where it is
    unknown, unreadable or without text."""
    from .local_text import local_texts  # pyarrow, which not every command needs

    check_dataset(dataset)
    try:
        if dataset in DATASETS:
            texts = DATASETS[dataset](purpose)
        else:
            texts = list(local_texts(Path(dataset), SPLITS[purpose], column, tokenizer))
    except CfspError:
        raise
    except ConnectionError as error:
        raise CfspError(
            f"dataset {dataset!r}: {error}; 'builtin', or a file of your own, needs no network"
        ) from error
    except ImportError as error:
        needed = repr(error.name) if error.name else str(error)
        raise CfspError(f"dataset {dataset!r} needs the package {needed}") from None
    except Exception as error:  # datasets and its readers raise of many kinds
        why = f"{type(error).__name__}: {reason(error)}"
        raise CfspError(f"cannot load dataset {dataset!r}: {why}") from error
    texts = [text for text in texts if text is not None]
    if not texts:
        raise CfspError(f"dataset {dataset!r} has no text: all its rows are null")
    return SEPARATORS[purpose].join(texts)
