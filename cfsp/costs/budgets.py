"""Budgets and recipes against a model's shapes, before the calibration: what they come to in FFN
channels, and whether any plan can meet them."""

from operator import mul

import torch

from ..apportion import apportion, check_budget
from ..errors import CfspError
from ..models.descriptions import Description
from ..models.ffns.channels import check_expert_width
from ..models.loading import check_seqlen
from ..models.pruned_classes import stock_model
from ..models.tensors import parameter_shapes
from ..pruning.allocation import equal_widths
from ..pruning.budget import ChannelBudget, channel_budget
from ..pruning.compaction import planned_tensors
from ..pruning.compensation import COMPENSATIONS
from ..pruning.plan import BlockPlan, PruningPlan
from ..pruning.recipe import Recipe
from .flops import ModelCosts, model_costs
from .footprint import footprints
from .latency import LatencyLimit, LatencyTable


def _channel_costs(described: Description, costs: ModelCosts, kind: str) -> tuple[int, ...]:
    """What one channel of width costs in every FFN, in all its experts: "params" with biases, or
    "flops" of one token, which goes through a few of the experts."""
    found = []
    for placed in described.ffns:
        block, cost = costs.blocks[placed.block], 0.0
        for name, axis in placed.ffn.channels.items():
            if name in block.tensors:
                info = block.tensors[name]
                whole = info.numel if kind == "params" else block.matrix_flops.get(name, 0.0)
                cost += whole / (info.shape[axis.dimension] // axis.copies)
        found.append(round(cost))
    return tuple(found)


def _added_parameters(described: Description, recipe: Recipe) -> int:
    """Biases that the compensation gives to FFNs without one."""
    if not COMPENSATIONS[recipe.resolved_compensation].adds_bias:
        return 0
    added, present = 0, described.parameters
    for placed in described.ffns:
        ffn, name = placed.ffn, f"{placed.ffn.down}.weight"
        if ffn.down_bias is not None and placed.prefix + ffn.down_bias not in present:
            added += present[placed.prefix + name].shape[1 - ffn.channels[name].dimension]
    return added


def resolve(described: Description, recipe: Recipe, table: LatencyTable | None) -> ChannelBudget:
    """What a recipe's sparsity or budget comes to in the FFN channels of a model."""
    groups = [placed.group for placed in described.ffns]
    budget = recipe.model_budget
    if budget is None:
        return ChannelBudget(recipe.sparsity, tuple(group.experts for group in groups))
    sizes, multiple = [group.channels for group in groups], recipe.width_multiple
    if budget.kind == "latency":
        if table is None:
            text = f"{recipe.budget} needs a latency table: `cfsp latency MODEL` makes one"
            raise CfspError(text)
        limit = LatencyLimit(table, budget.kept(table.dense_seconds), budget.text)
        return ChannelBudget(budget.fraction or 0.0, limit.costs(sizes), limit.fitted)
    costs = model_costs(described, described.parameters)
    per_channel = _channel_costs(described, costs, budget.kind)
    if budget.kind == "params":
        added = _added_parameters(described, recipe)
        return channel_budget(budget, costs.parameters, sizes, per_channel, multiple, added)
    check_seqlen(described.model, budget.length)
    return channel_budget(budget, costs.flops(budget.length), sizes, per_channel, multiple)


def even_plan(
    described: Description, recipe: Recipe, table: LatencyTable | None = None
) -> PruningPlan:
    """A plan of about equal widths; the output of any other of this sparsity is as large."""
    sizes = [placed.group.channels for placed in described.ffns]
    budget, multiple = resolve(described, recipe, table), recipe.width_multiple
    total, even = sum(map(mul, sizes, budget.costs)), torch.zeros(len(sizes), dtype=torch.float64)

    def widths_at(sparsity: float) -> tuple[int, ...]:
        keep = (1 - sparsity) * total
        if recipe.uniform:
            check_budget(sizes, keep, multiple, budget.costs)
            return equal_widths(sizes, sparsity, multiple)
        ideal = (1 - sparsity) * torch.tensor(sizes, dtype=torch.float64)
        return apportion(ideal, sizes, keep, multiple, even, budget.costs)

    widths = iter(budget.widths(widths_at, sizes, multiple, equal=recipe.uniform))
    plans = []
    for block in described.groups:
        kept = tuple(torch.arange(next(widths)).expand(g.experts, -1) for g in block)
        plans.append(BlockPlan(kept, 0.0, block))
    plan = PruningPlan(tuple(plans), "", recipe)
    check_met(described, plan, table)
    return plan


def check_met(described: Description, plan: PruningPlan, table: LatencyTable | None) -> None:
    """Raise CfspError where a plan is not what its recipe's budget asks for."""
    budget = plan.recipe.model_budget
    if budget is None:
        return
    found = footprints(described, plan, table)
    unit = {"params": "parameters", "flops": "flops", "latency": "seconds"}[budget.kind]
    kept, total = (getattr(side, unit) for side in (found.after, found.before))
    budget.check(kept, total, plan.recipe.width_multiple)


def check_recipe(described: Description, recipe: Recipe, table: LatencyTable | None = None) -> None:
    """Raise CfspError where no plan for this model can be what the recipe asks for."""
    check_biases(described, recipe.resolved_compensation)
    for placed in described.ffns:
        check_expert_width(recipe.width_multiple, placed.group.experts)
    plan = even_plan(described, recipe, table)
    if recipe.uniform:
        _check_stock(described, plan)


def check_processes(recipe: Recipe, ranks: int) -> None:
    """Raise CfspError where a plan takes the whole model, and there are several processes."""
    if recipe.searches and ranks > 1:
        raise CfspError("allocator 'search' is for one process: make a plan with `cfsp plan`")


def check_biases(described: Description, compensation: str) -> None:
    """Raise CfspError where a compensation adds a bias to a projection that can have none."""
    for placed in described.ffns if COMPENSATIONS[compensation].adds_bias else ():
        if placed.ffn.down_bias is None:
            other = "least-squares" if COMPENSATIONS[compensation].needs_gram else "none"
            raise CfspError(
                f"compensation {compensation!r} adds a bias, and {placed.ffn.down} can have none: "
                f"use compensation {other!r}"
            )


def _check_stock(described: Description, plan: PruningPlan) -> None:
    """Raise CfspError where the family's own class builds no model of the widths to be."""
    dense = described.tensors
    widths: list[dict[str, int]] = [{} for _ in plan.blocks]
    planned = (width for block in plan.blocks for width in block.ffn_widths)
    for placed, width in zip(described.ffns, planned, strict=True):
        widths[placed.block][placed.ffn.width] = width
    built = parameter_shapes(stock_model(described.model, widths))
    for name, info in planned_tensors(dense, described.ffns, plan).items():
        if (name in built or name not in dense) and built.get(name) != info.shape:
            stock = list(built[name]) if name in built else "nothing"
            raise CfspError(
                f"uniform widths: {name} would be {list(info.shape)} and the family's own class "
                f"has {stock} there; drop uniform"
                + (", or use compensation 'none'" if name not in dense else "")
            )
