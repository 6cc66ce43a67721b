"""Compact tensors into a live model: block by block, in place."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from tqdm import tqdm

from ..calibration.grams import StoredGram
from ..calibration.statistics import BlockStatistics, Statistics, check_grams
from ..errors import CfspError
from ..io.safetensors import Room, TensorInfo
from ..models.channels import check_expert_width
from ..models.fingerprints import model_fingerprint
from ..models.layouts import Layout
from .compensation import ADD_BIAS, COMPENSATIONS, NEEDS_GRAM, NEEDS_STATISTICS, FitRecord
from .plan import BlockPlan, PruningPlan
from .recipe import Recipe
from .refit import Refitting


def check_plan(
    plan: PruningPlan, model: nn.Module, layout: Layout, fingerprint: str | None = None
) -> None:
    """Raise CfspError where the plan is for another model.

    ``fingerprint`` is the model's, where its weights are not in memory to make it from.
    """
    sizes = layout.intermediate_sizes(model)
    planned = tuple(block.intermediate_size for block in plan.blocks)
    if planned != sizes:
        raise CfspError(
            f"the plan is for another model: {len(planned)} blocks with up to {max(planned)} "
            f"channels, the model has {len(sizes)} with up to {max(sizes)}"
        )
    for number, block in enumerate(plan.blocks):
        for kept in block.kept_by_group:
            check_expert_width(kept.shape[1], len(kept), f"plan, block {number}: width")
    if plan.model_fingerprint != (fingerprint or model_fingerprint(model, layout)):
        raise CfspError("the plan is for another model: same shapes, different weights")


TOKENS_PER_CHANNEL = 4
"""Below it least squares fit noise too."""


def check_compensation(plan: PruningPlan, statistics: Statistics | None) -> None:
    """Raise CfspError where the plan's compensation needs statistics that are not there; warn where
    these are of few tokens."""
    compensation = plan.recipe.resolved_compensation
    if compensation in NEEDS_STATISTICS and statistics is None:
        raise CfspError(f"compensation {compensation!r} needs the statistics of the calibration")
    if compensation in NEEDS_GRAM and statistics is not None:
        check_grams(statistics, f"compensation {compensation!r}")
        _warn_of_few_tokens([gram for block in statistics.blocks for gram in block.grams])


def _warn_of_few_tokens(grams: Sequence[StoredGram]) -> None:
    few = [gram for gram in grams if gram.tokens[0] < TOKENS_PER_CHANNEL * gram.channels]
    if few:
        worst = min(few, key=lambda gram: gram.tokens[0] / gram.channels)
        warnings.warn(
            f"least squares: {len(few)} of {len(grams)} FFNs have fewer than {TOKENS_PER_CHANNEL} "
            f"tokens per channel, block {worst.block} {worst.tokens[0]} for {worst.channels}: "
            "calibrate on more windows",
            stacklevel=3,
        )


@torch.no_grad()
def prune_block_(
    block: nn.Module,
    layout: Layout,
    plan: BlockPlan,
    recipe: Recipe,
    statistics: BlockStatistics | None,
    room: Room | None = None,
) -> tuple[FitRecord, ...]:
    """Cut the FFNs of one block to the kept channels, in place; the new matrices are new memory,
    or what ``room`` gives.

    Returns:
        For compensations that fit, what came of it in each FFN and expert.
    """
    cut = COMPENSATIONS[recipe.resolved_compensation]
    known = statistics.ffns() if statistics is not None else None
    records: list[FitRecord] = []
    first = 0
    for ffn, kept in zip(layout.block_ffns(block), plan.kept_by_group, strict=True):
        own = known[first : first + len(kept)] if known is not None else [None] * len(kept)

        def compensate(
            expert: int,
            down: torch.Tensor,
            out: torch.Tensor | None,
            kept: torch.Tensor = kept,
            own: Sequence[BlockStatistics | None] = own,
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            found = cut(down, kept[expert].to(down.device), own[expert], recipe.damping, out)
            if found.record is not None:
                records.append(found.record)
            return found.weight, found.bias

        ffn.cut_(block, kept, compensate, room)
        first += len(kept)
    return tuple(records)


def prune_model_(
    model: nn.Module,
    layout: Layout,
    plan: PruningPlan,
    statistics: Statistics | None = None,
    *,
    refitting: Refitting | None = None,
    progress: bool = True,
) -> tuple[tuple[FitRecord, ...], ...]:
    """Cut every FFN of a live model to its plan, in place; ``refitting`` fits each block after it.

    Returns:
        What :func:`prune_block_` does, for each block.

    Raises:
        CfspError: a plan for another model, or a compensation whose statistics are missing.
            Nothing is changed then.
    """
    check_plan(plan, model, layout)
    check_compensation(plan, statistics)
    blocks = layout.find_blocks(model)
    records = []
    bar = tqdm(plan.blocks, desc="prune", unit="block", disable=not progress)
    for number, block_plan in enumerate(bar):
        block_statistics = statistics.blocks[number] if statistics is not None else None
        if refitting is not None:
            refitting.run_dense(number)
        records.append(
            prune_block_(blocks[number], layout, block_plan, plan.recipe, block_statistics)
        )
        if refitting is not None:
            refitting.run_pruned(number)
    return tuple(records)


def planned_tensors(
    tensors: Mapping[str, torch.Tensor], model: nn.Module, layout: Layout, plan: PruningPlan
) -> dict[str, TensorInfo]:
    """What the pruned model's checkpoint holds, in order, from what the dense one's does.

    Args:
        tensors: the dense checkpoint in order; only shapes and dtypes are read.
        model: the dense model, of which no values are read.
        layout: where the FFNs are.
        plan: what they keep.
    """
    adds_bias = plan.recipe.resolved_compensation in ADD_BIAS
    cut: dict[str, tuple[int, int]] = {}
    new: dict[str, str] = {}
    for number, (block, block_plan) in enumerate(
        zip(layout.find_blocks(model), plan.blocks, strict=True)
    ):
        prefix = f"{layout.blocks}.{number}."
        for ffn, kept in zip(layout.block_ffns(block), block_plan.kept_by_group, strict=True):
            for name, axis in ffn.channels.items():
                cut[prefix + name] = (axis.dimension, axis.copies * kept.shape[1])
            if adds_bias and ffn.down_bias is not None:
                new[f"{prefix}{ffn.down}.weight"] = prefix + ffn.down_bias
    found: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        if name in cut:
            dimension, size = cut[name]
            shape[dimension] = size
        found[name] = TensorInfo(tensor.dtype, tuple(shape))
        bias = new.get(name)
        if bias is not None and bias not in tensors:
            found[bias] = TensorInfo(tensor.dtype, tuple(tensor.shape[:1]))
    return found
