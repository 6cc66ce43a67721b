"""The file of a plan: JSON, with kept channels as ranges and error curves as pairs."""

import json
from collections.abc import Sequence
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any

import torch

from ..calibration.curves import ErrorCurve
from ..errors import CfspError
from ..io.files import write_json
from ..io.places import check_replaceable
from ..models.channels import ChannelGroup
from .plan import BlockPlan, PruningPlan
from .recipe import recipe_from_dict

FORMAT = "cfsp-plan-1"


def save_plan(plan: PruningPlan, path: str | Path) -> None:
    """Write a plan as JSON; kept channels are ranges such as "0-5,7"."""
    try:
        check_replaceable(Path(path), Path(path), overwrite=True, kind="file")
        write_json(Path(path), plan_to_dict(plan))
    except OSError as error:
        raise CfspError(f"cannot write plan {path}: {error}") from None


def load_plan(path: str | Path) -> PruningPlan:
    """Read a plan, perhaps edited.

    Raises:
        CfspError: unreadable, or kept channels that are out of range, repeated or not ``width``.
    """
    try:
        document = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise CfspError(f"cannot read plan {path}: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CfspError(f"{path} is not a plan of this version ({FORMAT})")
    try:
        blocks = tuple(starmap(_block_from_dict, enumerate(document["blocks"])))
        recipe = recipe_from_dict(document["recipe"])
        return PruningPlan(blocks, document["model_fingerprint"], recipe)
    except CfspError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CfspError(f"{path} is not a valid plan: {type(error).__name__}: {error}") from None


def plan_to_dict(plan: PruningPlan) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        "format": FORMAT,
        "model_fingerprint": plan.model_fingerprint,
        "recipe": plan.recipe.to_dict(),
        "blocks": list(starmap(_block_to_dict, enumerate(plan.blocks))),
    }


def _block_to_dict(number: int, block: BlockPlan) -> dict[str, Any]:
    """A single FFN without experts is not described any further."""
    entry: dict[str, Any] = {
        "block": number,
        "intermediate_size": block.intermediate_size,
        "width": block.width,
        "importance": block.importance,
        "kept": to_ranges(block.flat_kept),
    }
    if len(block.groups) > 1 or block.groups[0].experts > 1:
        entry["ffns"] = [
            {"experts": g.experts, "intermediate_size": g.channels} for g in block.groups
        ]
    entry["score_quantiles"] = " ".join(f"{value:.5g}" for value in block.score_quantiles)
    if block.error_curves:
        entry["error_curves"] = [to_pairs(curve) for curve in block.error_curves]
    return entry


def _block_from_dict(number: int, entry: dict[str, Any]) -> BlockPlan:
    at = f"plan, block {number}:"
    size, width = int(entry["intermediate_size"]), int(entry["width"])
    kept = sorted(from_ranges(entry["kept"]))
    if len(set(kept)) != len(kept) or not kept or kept[0] < 0 or kept[-1] >= size:
        raise CfspError(f"{at} kept must be distinct channels in [0, {size - 1}], one or more")
    if len(kept) != width:
        raise CfspError(f"{at} width is {width} but kept names {len(kept)} channels")
    ffns = entry.get("ffns", [])
    groups = tuple(ChannelGroup(int(f["intermediate_size"]), int(f["experts"])) for f in ffns)
    groups = groups or (ChannelGroup(size),)
    for group in groups:
        if min(group.experts, group.channels) < 1:
            raise CfspError(
                f"{at} each of its ffns must have 1 or more experts of 1 or more channels, "
                f"got {group.experts} of {group.channels}"
            )
    quantiles = tuple(float(value) for value in entry.get("score_quantiles", "").split())
    curves = tuple(from_pairs(text) for text in entry.get("error_curves", []))
    by_ffn = _by_ffn(at, torch.tensor(kept), groups)
    block = BlockPlan(by_ffn, float(entry["importance"]), groups, quantiles, curves)
    if block.intermediate_size != size:
        raise CfspError(f"{at} its ffns have {block.intermediate_size} channels in all")
    sizes = [group.channels for group in groups]
    ends = [int(curve.widths[-1]) for curve in curves]
    if ends and ends != sizes:
        raise CfspError(f"{at} its error curves end at widths {ends}, its FFNs have {sizes}")
    return block


def _by_ffn(
    at: str, flat: torch.Tensor, groups: Sequence[ChannelGroup]
) -> tuple[torch.Tensor, ...]:
    """What :attr:`BlockPlan.flat_kept` puts together."""
    found, start = [], 0
    for group in groups:
        inside = flat[(flat >= start) & (flat < start + group.total)] - start
        counts = torch.bincount(inside // group.channels, minlength=group.experts)
        if counts.min() < 1 or counts.min() != counts.max():
            raise CfspError(
                f"{at} every expert of an FFN must keep the same number of channels, one or more; "
                f"got {counts.min()} to {counts.max()}"
            )
        found.append(inside.view(group.experts, -1) % group.channels)
        start += group.total
    return tuple(found)


def to_ranges(kept: torch.Tensor) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    first, last = kept.diff(prepend=kept[:1] - 2) > 1, kept.diff(append=kept[-1:] + 2) > 1
    ranges = zip(kept[first].tolist(), kept[last].tolist(), strict=True)
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def from_ranges(text: str) -> list[int]:
    """ "0-2,5" -> [0, 1, 2, 5]."""
    ends = (part.strip().partition("-")[::2] for part in text.split(","))
    return [index for low, high in ends for index in range(int(low), int(high or low) + 1)]


def to_pairs(curve: ErrorCurve) -> str:
    """ "0:8 24:2 48:0": the error, to 5 digits, at each width."""
    points = zip(curve.widths.tolist(), curve.errors.tolist(), strict=True)
    return " ".join(f"{width}:{error:.5g}" for width, error in points)


def from_pairs(text: str) -> ErrorCurve:
    """What :func:`to_pairs` wrote; ValueError for anything else."""
    points = [pair.split(":") for pair in text.split()]
    widths = [int(width) for width, _ in points]
    if len(widths) < 2 or widths[0] != 0 or any(low >= high for low, high in pairwise(widths)):
        raise ValueError(f"the widths of an error curve must ascend from 0: {text[:60]!r}")
    errors = torch.tensor([float(error) for _, error in points], dtype=torch.float64)
    return ErrorCurve(torch.tensor(widths), errors)
