"""The pruning plan: which channels of which block stay. Small, printable, editable."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .allocation import AllocationProblem, allocate_widths
from .errors import CfspError
from .layouts import FFNWeights
from .recipe import Recipe, recipe_from_dict
from .scoring import SCORERS
from .selection import select_channels
from .statistics import Statistics

FORMAT = "cfsp-plan-1"


@dataclass(frozen=True)
class BlockPlan:
    """What one block keeps."""

    intermediate_size: int
    kept: torch.Tensor
    """[width] int64, ascending."""
    importance: float

    @property
    def width(self) -> int:
        """Channels kept."""
        return len(self.kept)

    @property
    def removed(self) -> torch.Tensor:
        """[F - width] int64, ascending."""
        stays = torch.zeros(self.intermediate_size, dtype=torch.bool)
        stays[self.kept] = True
        return (~stays).nonzero().flatten()


@dataclass(frozen=True)
class PruningPlan:
    """Kept channels of every block, with the recipe and the model they are for."""

    blocks: tuple[BlockPlan, ...]
    model_fingerprint: str
    recipe: Recipe

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels kept in every block."""
        return tuple(block.width for block in self.blocks)

    @property
    def sparsity(self) -> float:
        """Fraction of all FFN channels that goes."""
        return 1 - sum(self.widths) / sum(block.intermediate_size for block in self.blocks)

    def table(self) -> Table:
        """The plan as a table for a terminal."""
        table = Table(title=f"{self.recipe.scorer}: {self.sparsity:.2%} of FFN channels removed")
        for title in ("block", "importance", "channels", "kept", ""):
            table.add_column(title, justify="left" if title == "" else "right")
        for number, block in enumerate(self.blocks):
            share = block.width / block.intermediate_size
            table.add_row(
                str(number),
                f"{block.importance:.5f}",
                str(block.intermediate_size),
                f"{block.width} ({share:.1%})",
                "█" * round(share * 24),
            )
        return table


def make_plan(
    statistics: Statistics, weights: Callable[[int], FFNWeights], recipe: Recipe
) -> PruningPlan:
    """Score, allocate, select.

    Args:
        statistics: of the dense model.
        weights: block number -> its FFN matrices. Called only for scorers that read weights.
        recipe: the choices.

    Raises:
        CfspError: no widths meet the sparsity.
    """
    score = SCORERS[recipe.scorer].score
    scores = tuple(
        score(block, lambda number=number: weights(number))  # type: ignore[misc]
        for number, block in enumerate(statistics.blocks)
    )
    importance = statistics.importance(recipe.importance)
    problem = AllocationProblem(importance, scores, recipe.sparsity)
    widths = allocate_widths(problem, recipe.resolved_allocator, recipe.width_multiple)
    blocks = tuple(
        BlockPlan(len(block_scores), select_channels(block_scores, width), float(value))
        for block_scores, width, value in zip(scores, widths, importance, strict=True)
    )
    return PruningPlan(blocks, statistics.model_fingerprint, recipe)


def _to_ranges(kept: torch.Tensor) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    ranges: list[list[int]] = []
    for index in kept.tolist():
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def _from_ranges(text: str) -> list[int]:
    """ "0-2,5" -> [0, 1, 2, 5]."""
    indices: list[int] = []
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        indices.extend(range(int(low), int(high or low) + 1))
    return indices


def plan_to_dict(plan: PruningPlan) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        "format": FORMAT,
        "model_fingerprint": plan.model_fingerprint,
        "recipe": plan.recipe.to_dict(),
        "blocks": [
            {
                "block": number,
                "intermediate_size": block.intermediate_size,
                "width": block.width,
                "importance": block.importance,
                "kept": _to_ranges(block.kept),
            }
            for number, block in enumerate(plan.blocks)
        ],
    }


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(partial, path)


def save_plan(plan: PruningPlan, path: str | Path) -> None:
    """Write a plan as JSON; kept channels are ranges such as "0-5,7"."""
    try:
        write_json(Path(path), plan_to_dict(plan))
    except OSError as error:
        raise CfspError(f"cannot write plan {path}: {error}") from None


def _block_from_dict(number: int, entry: dict[str, Any]) -> BlockPlan:
    size, width = int(entry["intermediate_size"]), int(entry["width"])
    kept = sorted(_from_ranges(entry["kept"]))
    if len(set(kept)) != len(kept) or not kept or kept[0] < 0 or kept[-1] >= size:
        raise CfspError(
            f"plan, block {number}: kept must be distinct channels in [0, {size - 1}], one or more"
        )
    if len(kept) != width:
        raise CfspError(
            f"plan, block {number}: width is {width} but kept names {len(kept)} channels"
        )
    return BlockPlan(size, torch.tensor(kept), float(entry["importance"]))


def load_plan(path: str | Path) -> PruningPlan:
    """Read a plan, perhaps edited.

    Raises:
        CfspError: unreadable, or kept channels that are out of range, repeated or not ``width``.
    """
    try:
        document = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CfspError(f"cannot read plan {path}: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CfspError(f"{path} is not a plan of this version ({FORMAT})")
    try:
        blocks = tuple(
            _block_from_dict(number, entry) for number, entry in enumerate(document["blocks"])
        )
        return PruningPlan(
            blocks, document["model_fingerprint"], recipe_from_dict(document["recipe"])
        )
    except CfspError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CfspError(f"{path} is not a valid plan: {type(error).__name__}: {error}") from None
