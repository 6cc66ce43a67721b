"""Compact tensors into a live model: block by block, in place."""

from collections.abc import Mapping

import torch
from torch import nn
from tqdm import tqdm

from cfsp_kernels import gather_rows

from .compensation import ADD_BIAS, COMPENSATIONS, NEEDS_STATISTICS
from .errors import CfspError
from .layouts import Layout
from .plan import BlockPlan, PruningPlan
from .shards import Room, TensorInfo
from .statistics import BlockStatistics, Statistics, model_fingerprint


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
    if plan.model_fingerprint != (fingerprint or model_fingerprint(model, layout)):
        raise CfspError("the plan is for another model: same shapes, different weights")


def check_compensation(plan: PruningPlan, statistics: Statistics | None) -> None:
    """Raise CfspError where the plan's compensation needs statistics that are not there."""
    compensation = plan.recipe.resolved_compensation
    if compensation in NEEDS_STATISTICS and statistics is None:
        raise CfspError(f"compensation {compensation!r} needs the statistics of the calibration")


def _parameter(data: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=like.requires_grad)


@torch.no_grad()
def prune_block_(
    block: nn.Module,
    layout: Layout,
    plan: BlockPlan,
    compensation: str,
    statistics: BlockStatistics | None,
    room: Room | None = None,
) -> None:
    """Cut one block's FFN to the kept channels, in place; the new matrices are new memory, or
    what ``room`` gives."""
    gate, up, down = (layout.projection(block, p) for p in (layout.gate, layout.up, layout.down))
    kept = plan.kept.to(down.weight.device)

    def out(*shape: int) -> torch.Tensor | None:
        return room(shape, down.weight.dtype) if room is not None else None

    new_down = out(down.out_features, plan.width)
    cut = COMPENSATIONS[compensation](down.weight, kept, statistics, new_down)
    for projection in (gate, up):
        rows = gather_rows(projection.weight, kept, out=out(plan.width, projection.in_features))
        projection.weight = _parameter(rows, projection.weight)
        if projection.bias is not None:
            projection.bias = _parameter(projection.bias[kept], projection.bias)
        projection.out_features = plan.width
    if cut.bias is not None:
        total = cut.bias if down.bias is None else down.bias + cut.bias
        down.bias = _parameter(total, down.weight)
    down.weight = _parameter(cut.weight, down.weight)
    down.in_features = plan.width
    ffn = layout.ffn(block)
    if hasattr(ffn, "intermediate_size"):
        ffn.intermediate_size = plan.width  # type: ignore[assignment]


def prune_model_(
    model: nn.Module,
    layout: Layout,
    plan: PruningPlan,
    statistics: Statistics | None = None,
    *,
    progress: bool = True,
) -> None:
    """Cut every FFN of a live model to its plan, in place.

    Raises:
        CfspError: a plan for another model, or a compensation whose statistics are missing.
            Nothing is changed then.
    """
    check_plan(plan, model, layout)
    check_compensation(plan, statistics)
    compensation = plan.recipe.resolved_compensation
    blocks = layout.find_blocks(model)
    bar = tqdm(plan.blocks, desc="prune", unit="block", disable=not progress)
    for number, block_plan in enumerate(bar):
        block_statistics = statistics.blocks[number] if statistics is not None else None
        prune_block_(blocks[number], layout, block_plan, compensation, block_statistics)


def planned_tensors(
    tensors: Mapping[str, torch.Tensor], layout: Layout, plan: PruningPlan
) -> dict[str, TensorInfo]:
    """What the pruned model's checkpoint holds, in order, from what the dense one's does.

    Args:
        tensors: the dense checkpoint in order; only shapes and dtypes are read.
        layout: where the FFNs are.
        plan: what they keep.
    """
    widths: dict[str, tuple[int, int]] = {}
    down = {f"{layout.blocks}.{n}.{layout.down}" for n in range(len(plan.blocks))}
    for number, block in enumerate(plan.blocks):
        prefix = f"{layout.blocks}.{number}."
        for path in (layout.gate, layout.up):
            widths[f"{prefix}{path}.weight"] = widths[f"{prefix}{path}.bias"] = (0, block.width)
        widths[f"{prefix}{layout.down}.weight"] = (1, block.width)
    found: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        if name in widths:
            dimension, width = widths[name]
            shape[dimension] = width
        found[name] = TensorInfo(tensor.dtype, tuple(shape))
        module = name.removesuffix(".weight")
        if module in down and plan.recipe.resolved_compensation in ADD_BIAS:
            found[f"{module}.bias"] = TensorInfo(tensor.dtype, tuple(tensor.shape[:1]))
    return found
