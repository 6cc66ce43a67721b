"""What a model takes before and after pruning: channels, parameters, FLOPs and, measured, time."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration.statistics import Statistics
from ..errors import CfspError
from ..io.shards import Tensors
from ..models.channels import ChannelGroup
from ..models.layouts import Layout
from ..models.loading import check_seqlen
from ..models.tensors import kept_tensors, tensor_infos
from ..pruning.budget import BATCH, LENGTH, ChannelBudget, channel_budget
from ..pruning.compaction import planned_tensors
from ..pruning.compensation import ADD_BIAS
from ..pruning.plan import PruningPlan, WidthSearch, make_plan
from ..pruning.ranking import Weights
from ..pruning.recipe import Recipe
from .flops import ModelCosts, costs_of
from .latency import LatencyLimit, LatencyTable


@dataclass(frozen=True)
class Footprint:
    """What one model takes."""

    channels: int
    """Of all FFNs and experts."""
    parameters: int
    """Tied ones once."""
    flops: float
    """Of a forward call; a multiplication and an addition are two."""
    seconds: float | None = None
    """Of a forward call, by a measured table; None: there was none."""


@dataclass(frozen=True)
class Footprints:
    """A model before and after, in the four units that budgets have."""

    before: Footprint
    after: Footprint
    batch: int
    length: int
    """FLOPs and seconds are of a forward call over [batch, length] tokens."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str, str]]:
        """(title, before, after with what is left of it) for tables."""
        shape = f"{self.batch} x {self.length} tokens"
        before, after = self.before, self.after
        rows = [
            _row("FFN channels", before.channels, after.channels, "{:,}"),
            _row("parameters", before.parameters, after.parameters, "{:,}"),
            _row(f"FLOPs, {shape}", before.flops, after.flops, "{:.4g}"),
        ]
        if before.seconds is None or after.seconds is None:
            return [*rows, (f"latency, {shape}", "not measured", "not measured")]
        return [*rows, _row(f"latency, {shape}", before.seconds, after.seconds, "{:.4g} s")]


def _row(title: str, before: float, after: float, form: str) -> tuple[str, str, str]:
    return title, form.format(before), f"{form.format(after)} ({after / before:.1%})"


def groups_of(model: PreTrainedModel, layout: Layout) -> list[ChannelGroup]:
    """The channels of every FFN of every block, in order."""
    return [group for block in layout.find_blocks(model) for group in layout.groups(block)]


def dense_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters of a model, perhaps on meta; tied ones once."""
    return kept_tensors(dict(model.named_parameters(remove_duplicate=False)), model)


def _costs(model: PreTrainedModel, layout: Layout, tensors: Tensors) -> ModelCosts:
    return costs_of(model.config, tensors, layout.blocks, model.dtype.itemsize)


def channel_costs(
    model: PreTrainedModel, layout: Layout, costs: ModelCosts
) -> dict[str, tuple[int, ...]]:
    """What one channel of width costs in every FFN, in all its experts.

    Args:
        model: dense, perhaps on meta.
        layout: its layout.
        costs: its costs.

    Returns:
        Under "params" parameters, biases included; under "flops" FLOPs of one token, which goes
        through a few of the experts.
    """
    params, flops = [], []
    for block, block_costs in zip(layout.find_blocks(model), costs.blocks, strict=True):
        products = block_costs.matrix_flops()
        for ffn in layout.block_ffns(block):
            found = [0.0, 0.0]
            for name, axis in ffn.channels.items():
                if name in block_costs.tensors:
                    info = block_costs.tensors[name]
                    width = info.shape[axis.dimension] // axis.copies
                    found[0] += info.numel / width
                    found[1] += products.get(name, 0.0) / width
            params.append(round(found[0]))
            flops.append(round(found[1]))
    return {"params": tuple(params), "flops": tuple(flops)}


def _added_parameters(model: PreTrainedModel, layout: Layout, recipe: Recipe) -> int:
    """Biases that the compensation gives to FFNs without one."""
    if recipe.resolved_compensation not in ADD_BIAS:
        return 0
    added = 0
    for block in layout.find_blocks(model):
        present = dict(block.named_parameters())
        for ffn in layout.block_ffns(block):
            if ffn.down_bias is not None and ffn.down_bias not in present:
                weight = present[f"{ffn.down}.weight"]
                channels = ffn.channels[f"{ffn.down}.weight"].dimension
                added += weight.shape[1 - channels]
    return added


def resolve_budget(
    model: PreTrainedModel, layout: Layout, recipe: Recipe, table: LatencyTable | None = None
) -> ChannelBudget:
    """What a recipe's sparsity or budget comes to in the FFN channels of a model.

    Args:
        model: dense, perhaps on meta.
        layout: its layout.
        recipe: its sparsity or budget, compensation and width multiple are read.
        table: of the model, where the budget is a latency.

    Raises:
        CfspError: no widths meet the budget; says what they could. No table, where it needs one.
    """
    groups = groups_of(model, layout)
    experts = tuple(group.experts for group in groups)
    budget = recipe.model_budget
    if budget is None:
        return ChannelBudget(recipe.sparsity, experts)
    sizes, multiple = [group.channels for group in groups], recipe.width_multiple
    if budget.kind == "latency":
        if table is None:
            raise CfspError(
                f"{recipe.budget} needs a latency table: `cfsp latency MODEL` makes one"
            )
        limit = LatencyLimit(table, budget.kept(table.dense_seconds), budget.text)
        return ChannelBudget(budget.fraction or 0.0, limit.costs(sizes), limit.fitted)
    costs = _costs(model, layout, tensor_infos(dense_tensors(model)))
    per_channel = channel_costs(model, layout, costs)[budget.kind]
    if budget.kind == "params":
        added = _added_parameters(model, layout, recipe)
        return channel_budget(budget, costs.parameters, sizes, per_channel, multiple, added)
    check_seqlen(model, budget.length)
    return channel_budget(budget, costs.flops(budget.length), sizes, per_channel, multiple)


def footprints(
    model: PreTrainedModel, layout: Layout, plan: PruningPlan, table: LatencyTable | None = None
) -> Footprints:
    """What a plan makes of a model, at the batch and length of the table or its recipe's budget.

    Args:
        model: dense, perhaps on meta.
        layout: its layout.
        plan: what every block keeps.
        table: of the model, where one was measured.
    """
    budget = plan.recipe.model_budget
    limit = getattr(model.config, "max_position_embeddings", None) or LENGTH
    shaped = table or budget
    batch, length = (shaped.batch, shaped.length) if shaped else (BATCH, min(LENGTH, limit))
    tensors = dense_tensors(model)
    left = planned_tensors(tensors, model, layout, plan)
    channels = sum(block.intermediate_size for block in plan.blocks), sum(plan.widths)
    seconds: tuple[float | None, float | None] = (None, None)
    if table is not None:
        widths = [width for block in plan.blocks for width in block.ffn_widths]
        seconds = table.dense_seconds, table.predicted(widths)
    before, after = (
        Footprint(kept, costs.parameters, costs.flops(length) * batch * length, time)
        for kept, costs, time in zip(
            channels,
            (_costs(model, layout, part) for part in (tensor_infos(tensors), left)),
            seconds,
            strict=True,
        )
    )
    return Footprints(before, after, batch, length)


def plan_within(
    statistics: Statistics,
    weights: Weights,
    recipe: Recipe,
    model: PreTrainedModel,
    layout: Layout,
    table: LatencyTable | None = None,
    *,
    search: WidthSearch | None = None,
    progress: bool = False,
) -> PruningPlan:
    """:func:`cfsp.pruning.plan.make_plan` under the recipe's budget of this very model.

    Raises:
        CfspError: no widths meet the budget.
    """
    budget = resolve_budget(model, layout, recipe, table)
    plan = make_plan(statistics, weights, recipe, budget, search=search, progress=progress)
    check_met(model, layout, plan, table)
    return plan


def check_met(
    model: PreTrainedModel, layout: Layout, plan: PruningPlan, table: LatencyTable | None = None
) -> None:
    """Raise CfspError where a plan is not what its recipe's budget asks for."""
    budget = plan.recipe.model_budget
    if budget is None:
        return
    found = footprints(model, layout, plan, table)
    unit = {"params": "parameters", "flops": "flops", "latency": "seconds"}[budget.kind]
    kept, total = (getattr(side, unit) for side in (found.after, found.before))
    budget.check(kept, total, plan.recipe.width_multiple)
