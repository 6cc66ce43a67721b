"""Several datasets in one: ``wikitext2:3,c4:1`` read, windows shared out and mixed evenly."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..apportion import Steps, apportion
from ..errors import CfspError, shown
from .text import DATASETS, check_dataset, exists, load_text
from .tokens import bos_token, tokenize

Mixture = Mapping[str, float]
"""Dataset -> weight, in the order in which they were named."""
MAX_PARTS = 200
"""Between commas, of which any run may be the name of a file."""


def parse_mixture(text: str) -> dict[str, float]:
    """Dataset -> weight, of ``NAME|PATH[:WEIGHT],...``; without a weight it is 1.

    What exists is never split: the longest run of parts that is a name or a path, with or without
    a weight, is one dataset. What is unknown goes through as it is, for a recipe may be read where
    its files are not. CfspError for an empty or repeated name, or a weight not above 0 and finite.
    """
    if not isinstance(text, str):
        raise CfspError(f"dataset must be text such as wikitext2:3,c4:1, got {text!r}")
    if text.count(",") >= MAX_PARTS:
        raise CfspError(f"dataset {shown(text)} has more than {MAX_PARTS} parts")
    found: dict[str, float] = {}
    for dataset, weight in _entries(text.split(",")):
        if not dataset:
            raise CfspError(f"dataset {text!r} has an empty name")
        if dataset in found:
            raise CfspError(f"dataset {dataset!r} is named twice in {text!r}")
        if not 0 < weight < math.inf:
            raise CfspError(
                f"dataset {dataset!r}: the weight must be above 0 and finite, got {weight}"
            )
        found[dataset] = weight
    return found


def _entries(parts: list[str]) -> Iterator[tuple[str, float]]:
    """Each dataset with its weight; parts that are unknown are one as long as they follow each
    other."""
    unknown: list[str] = []
    while parts:
        runs = ((count, _known(",".join(parts[:count]))) for count in range(len(parts), 0, -1))
        count, entry = next(((count, found) for count, found in runs if found), (1, None))
        if entry is None:
            unknown.append(parts[0])
        else:
            if unknown:
                yield ",".join(unknown), 1.0
            yield entry
            unknown = []
        parts = parts[count:]
    if unknown:
        yield ",".join(unknown), 1.0


def _known(text: str) -> tuple[str, float] | None:
    """(dataset, weight) where the text names something that exists, with or without a weight."""
    if exists(text):
        return text, 1.0
    dataset, _, weight = text.rpartition(":")
    try:
        return (dataset, float(weight)) if exists(dataset) else None
    except ValueError:
        return None


def dataset_paths(*texts: str | None) -> list[str]:
    """What mixtures read from paths: their datasets that have no name, where they exist."""
    named = [dataset for text in texts if text for dataset in parse_mixture(text)]
    return [dataset for dataset in named if dataset not in DATASETS and exists(dataset)]


def format_mixture(mixture: Mixture) -> str:
    """The text of a mixture, without weights that are 1 or of a dataset alone."""
    if len(mixture) == 1:
        return next(iter(mixture))
    return ",".join(
        dataset if weight == 1 else f"{dataset}:{weight:g}" for dataset, weight in mixture.items()
    )


def share_out(mixture: Mixture, windows: int, what: str = "samples") -> dict[str, int]:
    """Windows of each dataset, by weight: the largest-remainder method, at least one each.
    CfspError for fewer windows than datasets; ``what`` is the setting to blame."""
    if windows < len(mixture):
        raise CfspError(
            f"{what} must be {len(mixture)} or more, one for each dataset of "
            f"{format_mixture(mixture)!r}, got {windows}"
        )
    weights = torch.tensor(list(mixture.values()), dtype=torch.float64)
    weights /= weights.max()
    quotas = weights * (windows / weights.sum())
    most = [Steps(windows)] * len(mixture)
    counts = apportion(quotas, most, windows, torch.zeros_like(quotas))
    return dict(zip(mixture, counts, strict=True))


def interleaved(counts: Sequence[int]) -> list[int]:
    """A position for every window, of those of the first dataset, then the second and so on.

    Window i of n of a dataset is at (i + 1/2) / n of the whole, among equals that of the first
    dataset: any stretch has windows of every dataset in about the proportions of all.
    """
    whole = math.lcm(*counts)
    steps = [whole // count for count in counts]
    places = [
        (2 * window + 1) * step
        for count, step in zip(counts, steps, strict=True)
        for window in range(count)
    ]
    return sorted(range(len(places)), key=places.__getitem__)


def windows_of_each(
    tokenizer: Any,
    counts: Mapping[str, int],
    purpose: str,
    bos: str,
    cut: Callable[[torch.Tensor, int, int | None], torch.Tensor],
    column: str | None = None,
) -> list[torch.Tensor]:
    """Windows [count, S] of every dataset, which ``cut`` makes from its tokens, their number and
    the token that they start with. ``column`` is that of the text in local files. CfspError for a
    dataset that is unknown or has too few."""
    for dataset in counts:
        check_dataset(dataset)
    start = bos_token(tokenizer, bos)
    found = []
    for dataset, count in counts.items():
        tokens = tokenize(tokenizer, load_text(dataset, purpose, column, tokenizer))
        try:
            found.append(cut(tokens, count, start))
        except CfspError as error:
            raise CfspError(f"dataset {dataset!r}: {error}") from None
    return found


def held_out_mixture(mixture: Mixture) -> dict[str, float]:
    """The datasets of a mixture that have a held-out part of their own, as local files have not;
    the text that ships with Python where none has."""
    named = {name: weight for name, weight in mixture.items() if name in DATASETS}
    return named or {"builtin": 1.0}
