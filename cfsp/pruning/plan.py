"""The pruning plan: which channels of which block stay. Small, printable, editable."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..calibration.curves import ErrorCurve, Ranking
from ..calibration.statistics import Statistics
from ..errors import CfspError
from ..io.files import write_json
from ..models.channels import ChannelGroup
from .allocation import AllocationProblem, allocate_widths, equal_widths
from .budget import ChannelBudget
from .plan_text import from_pairs, from_ranges, to_pairs, to_ranges
from .ranking import Weights, rank, scaled_curves
from .recipe import Recipe, recipe_from_dict
from .selection import score_quantiles, select_by_expert

FORMAT = "cfsp-plan-1"


WidthSearch = Callable[
    [Callable[[Sequence[int]], "PruningPlan"], tuple[int, ...], AllocationProblem], tuple[int, ...]
]
"""(plan of given widths, widths to begin with, the problem they solve) -> better widths."""


@dataclass(frozen=True)
class BlockPlan:
    """What one block keeps."""

    intermediate_size: int
    kept: torch.Tensor
    """[width] int64, ascending."""
    importance: float
    groups: tuple[ChannelGroup, ...] = ()
    """The FFNs whose channels these are, one after the other; () for a single one."""
    score_quantiles: tuple[float, ...] = ()
    """Of the scores of all its channels, see :func:`cfsp.pruning.selection.score_quantiles`."""
    error_curves: tuple[ErrorCurve, ...] = ()
    """Of every FFN, with the recipe's compensation; () where the ranking had none."""

    @property
    def kept_by_group(self) -> tuple[torch.Tensor, ...]:
        """Kept channels of every FFN: [experts, width of each] int64, counted in the expert."""
        groups = self.groups or (ChannelGroup(self.intermediate_size),)
        starts = [0, *accumulate(group.total for group in groups)]
        found = []
        for group, (start, end) in zip(groups, pairwise(starts), strict=True):
            kept = self.kept[(self.kept >= start) & (self.kept < end)] - start
            found.append(kept.view(group.experts, -1) % group.channels)
        return tuple(found)

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
    statistics: Statistics,
    weights: Weights,
    recipe: Recipe,
    budget: ChannelBudget | None = None,
    *,
    search: WidthSearch | None = None,
    progress: bool = False,
) -> PruningPlan:
    """Score, allocate, select.

    Args:
        statistics: of the dense model.
        weights: block number -> the matrices of its FFNs, of every expert. Called
            only for scorers that read weights, and for error curves.
        recipe: the choices.
        budget: what the recipe's comes to in this model, see
            :mod:`cfsp.costs.budgets`; None: the recipe has a sparsity.
        search: for allocator ``search``, see :func:`cfsp.pruning.live_search.width_search`.
        progress: show a bar on stderr where scoring takes long.

    Raises:
        CfspError: no widths meet the budget; Gram matrices that the scorer or the allocator needs
            are not there.
    """
    if budget is None and recipe.budget is not None:
        raise CfspError(f"budget {recipe.budget} is of a whole model: give the model itself")
    if recipe.searches and search is None:
        raise CfspError("allocator 'search' measures pruned models: give the model itself")
    ranking = rank(statistics, weights, recipe, progress=progress)
    importance = statistics.importance(recipe.importance)
    ffns = [
        (number, group)
        for number, block in enumerate(statistics.blocks)
        for group in block.groups or (ChannelGroup(len(block.sum)),)
    ]
    sizes, experts = zip(*((group.channels, group.experts) for _, group in ffns), strict=True)
    budget = budget or ChannelBudget(recipe.sparsity, experts)
    problem = AllocationProblem(
        importance[[number for number, _ in ffns]],
        ranking.scores,
        budget.sparsity,
        experts,
        budget.costs,
        recipe.width_multiple,
        () if recipe.uniform else scaled_curves(ranking, statistics, recipe),
    )

    def widths_at(sparsity: float) -> tuple[int, ...]:
        if recipe.uniform:
            return equal_widths(sizes, sparsity, recipe.width_multiple)
        asked = replace(problem, sparsity=sparsity)
        return allocate_widths(asked, recipe.resolved_allocator, recipe.width_multiple)

    widths = budget.widths(widths_at, sizes, recipe.width_multiple, equal=recipe.uniform)
    of_widths = partial(_select, statistics, ranking, recipe)
    return of_widths(search(of_widths, widths, problem) if search is not None else widths)


def _select(
    statistics: Statistics, ranking: Ranking, recipe: Recipe, widths: Sequence[int]
) -> PruningPlan:
    """The plan that gives every FFN its width."""
    ffn = iter(zip(ranking.scores, widths, strict=True))
    curves = iter(ranking.curves)
    importance = statistics.importance(recipe.importance).tolist()
    blocks = []
    for block, value in zip(statistics.blocks, importance, strict=True):
        groups = block.groups or (ChannelGroup(len(block.sum)),)
        own = list(islice(ffn, len(groups)))
        kept = [
            select_by_expert(scores, group.experts, width)
            for (scores, width), group in zip(own, groups, strict=True)
        ]
        quantiles = score_quantiles(torch.cat([scores for scores, _ in own]))
        channels = flat_channels(kept, block.groups)
        own_curves = tuple(islice(curves, len(groups)))
        blocks.append(
            BlockPlan(len(block.sum), channels, value, block.groups, quantiles, own_curves)
        )
    return PruningPlan(tuple(blocks), statistics.model_fingerprint, recipe)


def flat_channels(kept: Sequence[torch.Tensor], groups: Sequence[ChannelGroup]) -> torch.Tensor:
    """What :attr:`BlockPlan.kept_by_group` takes apart."""
    groups = groups or (ChannelGroup(0),)
    flat, start = [], 0
    for group, indices in zip(groups, kept, strict=True):
        first = start + torch.arange(group.experts)[:, None] * group.channels
        flat.append((indices + first).flatten())
        start += group.total
    return torch.cat(flat)


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
                "kept": to_ranges(block.kept),
                **_groups_to_dict(block.groups),
                "score_quantiles": " ".join(f"{q:.5g}" for q in block.score_quantiles),
                **_curves_to_dict(block.error_curves),
            }
            for number, block in enumerate(plan.blocks)
        ],
    }


def _groups_to_dict(groups: Sequence[ChannelGroup]) -> dict[str, Any]:
    """What a block with several FFNs or with experts says of them; nothing for a single FFN."""
    if all(group.experts == 1 for group in groups) and len(groups) < 2:
        return {}
    return {"ffns": [{"experts": g.experts, "intermediate_size": g.channels} for g in groups]}


def _curves_to_dict(curves: Sequence[ErrorCurve]) -> dict[str, Any]:
    return {"error_curves": [to_pairs(curve) for curve in curves]} if curves else {}


def save_plan(plan: PruningPlan, path: str | Path) -> None:
    """Write a plan as JSON; kept channels are ranges such as "0-5,7"."""
    try:
        write_json(Path(path), plan_to_dict(plan))
    except OSError as error:
        raise CfspError(f"cannot write plan {path}: {error}") from None


def _block_from_dict(number: int, entry: dict[str, Any]) -> BlockPlan:
    size, width = int(entry["intermediate_size"]), int(entry["width"])
    kept = sorted(from_ranges(entry["kept"]))
    if len(set(kept)) != len(kept) or not kept or kept[0] < 0 or kept[-1] >= size:
        raise CfspError(
            f"plan, block {number}: kept must be distinct channels in [0, {size - 1}], one or more"
        )
    if len(kept) != width:
        raise CfspError(
            f"plan, block {number}: width is {width} but kept names {len(kept)} channels"
        )
    groups = tuple(
        ChannelGroup(int(ffn["intermediate_size"]), int(ffn["experts"]))
        for ffn in entry.get("ffns", [])
    )
    quantiles = tuple(float(value) for value in entry.get("score_quantiles", "").split())
    curves = tuple(from_pairs(text) for text in entry.get("error_curves", []))
    importance = float(entry["importance"])
    block = BlockPlan(size, torch.tensor(kept), importance, groups, quantiles, curves)
    _check_experts(number, block)
    _check_curves(number, block)
    return block


def _check_curves(number: int, block: BlockPlan) -> None:
    sizes = [group.channels for group in block.groups] or [block.intermediate_size]
    ends = [int(curve.widths[-1]) for curve in block.error_curves]
    if ends and ends != sizes:
        raise CfspError(
            f"plan, block {number}: its error curves end at widths {ends}, its FFNs have {sizes}"
        )


def _check_experts(number: int, block: BlockPlan) -> None:
    start = 0
    for group in block.groups:
        inside = block.kept[(block.kept >= start) & (block.kept < start + group.total)] - start
        counts = torch.bincount(inside // group.channels, minlength=group.experts)
        if counts.min() < 1 or counts.min() != counts.max():
            raise CfspError(
                f"plan, block {number}: every expert of an FFN must keep the same number of "
                f"channels, one or more; got {counts.min()} to {counts.max()}"
            )
        start += group.total
    if block.groups and start != block.intermediate_size:
        raise CfspError(f"plan, block {number}: its ffns have {start} channels in all")


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
