"""The compact texts of a plan's file: kept channels as ranges, an error curve as pairs."""

from itertools import pairwise

import torch

from ..calibration.curves import ErrorCurve


def to_ranges(kept: torch.Tensor) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    ranges: list[list[int]] = []
    for index in kept.tolist():
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def from_ranges(text: str) -> list[int]:
    """ "0-2,5" -> [0, 1, 2, 5]."""
    indices: list[int] = []
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        indices.extend(range(int(low), int(high or low) + 1))
    return indices


def to_pairs(curve: ErrorCurve) -> str:
    """ "0:8 24:2 48:0": the error, to 5 digits, at each width."""
    points = zip(curve.widths.tolist(), curve.errors.tolist(), strict=True)
    return " ".join(f"{width}:{error:.5g}" for width, error in points)


def from_pairs(text: str) -> ErrorCurve:
    """What :func:`to_pairs` wrote.

    Raises:
        ValueError: not pairs of numbers, or widths that do not ascend from 0.
    """
    points = [pair.split(":") for pair in text.split()]
    widths = [int(width) for width, _ in points]
    if len(widths) < 2 or widths[0] != 0 or any(low >= high for low, high in pairwise(widths)):
        raise ValueError(f"the widths of an error curve must ascend from 0: {text[:60]!r}")
    errors = torch.tensor([float(error) for _, error in points], dtype=torch.float64)
    return ErrorCurve(torch.tensor(widths), errors)
