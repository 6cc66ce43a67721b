"""The file of a plan: JSON, with kept channels as ranges and error curves as pairs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, starmap
from pathlib import Path
from typing import Annotated, Any

import torch

from ..calibration.curves import ErrorCurve
from ..errors import CfspError, reason, shown
from ..io.documents import read_as
from ..io.files import json_text, saved_file
from ..models.parts.channels import Units, sizes_of
from ..typed import Bound, Count, Natural, between, decode
from .plan import QUANTILES, BlockPlan, Depth, PruningPlan
from .recipe import recipe_from_dict

FORMAT = "cfsp-plan-1"
MAX_CHANNELS = 1 << 27
"""Of all blocks: 1 GiB of indices. A model of a trillion parameters has 48 million."""
MAX_BLOCKS = 10_000
RANGE = re.compile(r"\s*([0-9]{1,10})(?:-([0-9]{1,10}))?\s*")


def save_plan(plan: PruningPlan, path: str | Path) -> None:
    """Write a plan as JSON; kept channels are ranges such as "0-5,7"."""
    with saved_file(path, "plan") as partial:
        partial.write_text(json_text(plan_to_dict(plan)), encoding="utf-8")


@dataclass(frozen=True)
class _FFN:
    experts: Count
    intermediate_size: Count


@dataclass(frozen=True)
class _Attention:
    groups: Count
    columns: Count
    """Of a group, in the output projection."""
    kept: str
    """Groups; empty: the attention goes."""


@dataclass(frozen=True)
class _Block:
    intermediate_size: Annotated[int, between(0, MAX_CHANNELS)]
    """0 of a block without an FFN."""
    width: Natural
    importance: float
    kept: str
    block: int | None = None
    ffns: tuple[_FFN, ...] = ()
    experts: str | None = None
    """Those that stay; ``kept`` counts through them. Absent: all."""
    attention: _Attention | None = None
    score_quantiles: str = ""
    error_curves: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Depth:
    kept: str
    """Numbers of blocks."""
    of: Annotated[int, between(1, MAX_BLOCKS)]


@dataclass(frozen=True)
class _Document:
    model_fingerprint: str
    recipe: dict[str, Any]
    blocks: Annotated[
        tuple[_Block, ...],
        Bound(
            f"1 to {MAX_BLOCKS} blocks of 1 to {MAX_CHANNELS} channels in all",
            lambda blocks: (
                1 <= len(blocks) <= MAX_BLOCKS
                and 1 <= sum(block.intermediate_size for block in blocks) <= MAX_CHANNELS
            ),
        ),
    ]
    depth: _Depth | None = None


def load_plan(path: str | Path) -> PruningPlan:
    """Read a plan, perhaps edited.

    Raises:
        CfspError: unreadable, a field of another type, or kept channels that are out of range,
            repeated or not ``width``.
    """
    document = read_as(_Document, path, "plan", FORMAT)
    try:
        blocks = tuple(starmap(_block_of, enumerate(document.blocks)))
        depth = _depth_of(document.depth, "plan") if document.depth is not None else None
        if depth is not None and len(depth.kept) != len(blocks):
            raise CfspError(f"plan: depth.kept names {len(depth.kept)} blocks, not {len(blocks)}")
        recipe = recipe_from_dict(document.recipe)
        return PruningPlan(blocks, document.model_fingerprint, recipe, depth)
    except CfspError as error:
        raise CfspError(f"{path}: {error}") from None


def plan_to_dict(plan: PruningPlan) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        "format": FORMAT,
        "model_fingerprint": plan.model_fingerprint,
        "recipe": plan.recipe.to_dict(),
        **({"depth": depth_to_dict(plan.depth)} if plan.depth is not None else {}),
        "blocks": list(starmap(_block_to_dict, enumerate(plan.blocks))),
    }


def depth_to_dict(depth: Depth) -> dict[str, Any]:
    """Plain values: kept blocks as ranges, of how many."""
    return {"kept": to_ranges(torch.tensor(depth.kept)), "of": depth.total}


def depth_from_dict(values: Any, what: str) -> Depth:
    """What :func:`depth_to_dict` gave; CfspError for anything else."""
    return _depth_of(decode(_Depth, values, what, "depth"), what)


def _depth_of(found: _Depth, what: str) -> Depth:
    return Depth(tuple(from_ranges(found.kept, found.of, f"{what}: depth.kept").tolist()), found.of)


def _block_to_dict(number: int, block: BlockPlan) -> dict[str, Any]:
    """A single FFN without experts is not described any further."""
    ffns = [own for own in block.units if own.are_channels]
    entry: dict[str, Any] = {
        "block": number,
        "intermediate_size": block.intermediate_size,
        "width": block.width,
        "importance": block.importance,
        "kept": to_ranges(replace(block, units=block.left_units, experts=None).flat_kept),
    }
    if block.experts is not None:
        entry["experts"] = to_ranges(block.experts)
    if len(sizes_of(ffns)) > 1:
        entry["ffns"] = [{"experts": g.experts, "intermediate_size": g.count} for g in ffns]
    if block.groups is not None:
        kept, count = block.groups
        columns = block.units[-1].columns
        entry["attention"] = {"groups": count, "columns": columns, "kept": to_ranges(kept)}
    entry["score_quantiles"] = " ".join(f"{value:.5g}" for value in block.score_quantiles)
    if block.error_curves:
        entry["error_curves"] = [to_pairs(curve) for curve in block.error_curves]
    return entry


def _block_of(number: int, entry: _Block) -> BlockPlan:
    at, size = f"plan, block {number}:", entry.intermediate_size
    if entry.block not in (None, number):
        raise CfspError(f"{at} it says that it is block {entry.block}")
    units = tuple(Units(ffn.intermediate_size, ffn.experts) for ffn in entry.ffns)
    units = units or ((Units(size),) if size else ())
    if (channels := sum(own.total for own in units)) != size:
        raise CfspError(f"{at} its ffns have {channels} channels in all, not {size}")
    if not size and entry.kept:
        raise CfspError(f"{at} it has no FFN, so kept must be empty, got {shown(entry.kept)}")
    experts, left = None, units
    if entry.experts is not None:
        most = max((own.experts for own in units), default=1)
        experts = from_ranges(entry.experts, most, f"{at} experts")
        if most == 1 or not len(experts):
            raise CfspError(f"{at} experts must name some of several, got {shown(entry.experts)}")
        left = tuple(
            replace(own, experts=len(experts)) if own.experts > 1 else own for own in units
        )
    flat = from_ranges(entry.kept, sum(own.total for own in left), f"{at} kept")
    if len(flat) != entry.width:
        raise CfspError(f"{at} width is {entry.width} but kept names {len(flat)} channels")
    quantiles = _floats(entry.score_quantiles.split(), f"{at} score_quantiles")
    if len(quantiles) not in (0, QUANTILES) or list(quantiles) != sorted(quantiles):
        raise CfspError(f"{at} score_quantiles must be {QUANTILES} ascending numbers, or none")
    kept = _by_ffn(at, flat, left)
    if (own := entry.attention) is not None:
        units = (*units, Units(own.groups, columns=own.columns))
        kept = (*kept, from_ranges(own.kept, own.groups, f"{at} attention.kept")[None])
    curves = tuple(from_pairs(text, f"{at} error_curves") for text in entry.error_curves)
    counts = [each.count for each in units]
    ends = [int(curve.widths[-1]) for curve in curves]
    if ends and ends != counts:
        raise CfspError(f"{at} its error curves end at widths {ends}, its parts have {counts}")
    return BlockPlan(kept, entry.importance, units, quantiles, curves, experts)


def _by_ffn(at: str, flat: torch.Tensor, units: Sequence[Units]) -> tuple[torch.Tensor, ...]:
    """What :attr:`BlockPlan.flat_kept` puts together; an FFN without experts may keep nothing."""
    found, start = [], 0
    for own in units:
        inside = flat[(flat >= start) & (flat < start + own.total)] - start
        counts = torch.bincount(inside // own.count, minlength=own.experts)
        if counts.min() != counts.max() or (counts.min() < 1 < own.experts):
            raise CfspError(
                f"{at} every expert of an FFN must keep the same number of channels, one or more; "
                f"got {counts.min()} to {counts.max()}"
            )
        found.append(inside.view(own.experts, -1) % own.count)
        start += own.total
    return tuple(found)


def to_ranges(kept: torch.Tensor) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    first, last = kept.diff(prepend=kept[:1] - 2) > 1, kept.diff(append=kept[-1:] + 2) > 1
    ranges = zip(kept[first].tolist(), kept[last].tolist(), strict=True)
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def from_ranges(text: str, size: int, what: str = "kept") -> torch.Tensor:
    """ "0-2,5" -> [0, 1, 2, 5], int64 and ascending, "" -> none; CfspError for what is not distinct
    channels in [0, size - 1], before they take memory."""
    if not text.strip():
        return torch.arange(0)
    parts = [RANGE.fullmatch(part) for part in text.split(",")]
    ends = sorted((int(found[1]), int(found[2] or found[1])) for found in parts if found)
    after = [low for low, _ in ends[1:]] + [size]
    ascend = all(low <= high < more for (low, high), more in zip(ends, after, strict=False))
    if None in parts or not ascend:
        raise CfspError(
            f"{what} must be distinct channels in [0, {size - 1}], such as 0-5,7; got {shown(text)}"
        )
    return torch.cat([torch.arange(low, high + 1) for low, high in ends])


def to_pairs(curve: ErrorCurve) -> str:
    """ "0:8 24:2 48:0": the error, to 5 digits, at each width."""
    points = zip(curve.widths.tolist(), curve.errors.tolist(), strict=True)
    return " ".join(f"{width}:{error:.5g}" for width, error in points)


def from_pairs(text: str, what: str = "an error curve") -> ErrorCurve:
    """What :func:`to_pairs` wrote; CfspError for anything else."""
    pairs = [pair.partition(":") for pair in text.split()]
    points = _floats([part for width, _, error in pairs for part in (width, error)], what)
    widths = [int(width) for width in points[::2]]
    if (
        len(widths) < 2
        or tuple(widths) != points[::2]
        or widths[0] != 0
        or any(low >= high for low, high in pairwise(widths))
    ):
        raise CfspError(f"{what}: widths must ascend from 0, got {shown(text)}")
    return ErrorCurve(torch.tensor(widths), torch.tensor(points[1::2], dtype=torch.float64))


def _floats(texts: Sequence[str], what: str) -> tuple[float, ...]:
    try:
        found = [float(text) for text in texts]
    except ValueError as error:
        raise CfspError(f"{what}: {reason(error)}") from None
    return decode(tuple[float, ...], found, what)
