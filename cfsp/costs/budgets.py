"""Budgets and recipes against a model's shapes, before the calibration: what they come to in FFN
channels, and whether any plan can meet them."""

import torch

from ..apportion import Steps, apportion, check_budget, total_cost
from ..errors import CfspError
from ..models.descriptions import Description
from ..models.loading import check_seqlen
from ..models.parts.channels import check_expert_width
from ..models.pruned_classes import stock_model
from ..models.tensors import parameter_shapes
from ..pruning.allocation import equal_widths
from ..pruning.budget import ChannelBudget, channel_budget
from ..pruning.compaction import left_tensors, planned_tensors
from ..pruning.compensation import COMPENSATIONS
from ..pruning.plan import BlockPlan, PruningPlan, plan_of_all
from ..pruning.recipe import Recipe
from .flops import ModelCosts, model_costs
from .footprint import footprints
from .latency import LatencyLimit, LatencyTable


def _unit_costs(described: Description, costs: ModelCosts, kind: str) -> tuple[int, ...]:
    """What one unit costs in every part, in all its experts: "params" with biases, or "flops" of
    one token, which goes through a few of the experts."""
    found = []
    for placed in described.parts:
        block, cost = costs.blocks[placed.block], 0.0
        for name, axis in placed.part.channels.items():
            if name in block.tensors:
                info = block.tensors[name]
                whole = info.numel if kind == "params" else block.matrix_flops.get(name, 0.0)
                cost += whole * sum(axis.sections) / info.shape[axis.dimension]
        found.append(round(cost))
    return tuple(found)


def _added_parameters(described: Description, recipe: Recipe) -> int:
    """Biases that the compensation gives to FFNs without one."""
    if not COMPENSATIONS[recipe.resolved_compensation].adds_bias:
        return 0
    added, present = 0, described.parameters
    for placed in described.parts:
        ffn, name = placed.part, f"{placed.part.down}.weight"
        if ffn.down_bias is not None and placed.prefix + ffn.down_bias not in present:
            added += present[placed.prefix + name].shape[1 - ffn.channels[name].dimension]
    return added


def steps_of(described: Description, recipe: Recipe) -> tuple[Steps, ...]:
    """The numbers of units that every part may keep."""
    last = max((placed.block for placed in described.parts), default=0)
    return tuple(
        recipe.steps(placed.units, protected=placed.block in (0, last))
        for placed in described.parts
    )


def resolve(described: Description, recipe: Recipe, table: LatencyTable | None) -> ChannelBudget:
    """What a recipe's sparsity or budget comes to in the units of a model. A sparsity is of the
    number of channels where there are no others, else of the parameters of those that may go."""
    costs = model_costs(described, left_tensors(described.parameters, described.parts))
    budget, steps = recipe.model_budget, steps_of(described, recipe)
    if budget is None:
        if not (recipe.adds_kinds and recipe.cuts_channels):
            return ChannelBudget(recipe.sparsity, tuple(x.experts for x in described.parts))
        per_unit = _unit_costs(described, costs, "params")
        pairs = [pair for pair in zip(steps, per_unit, strict=True) if not pair[0].is_fixed]
        share = total_cost(*zip(*pairs, strict=True)) / total_cost(steps, per_unit)
        return ChannelBudget(recipe.sparsity * share, per_unit)
    if budget.kind == "latency" and recipe.experts is not None:
        raise CfspError(f"{recipe.budget}: latency is measured with all experts: drop `experts`")
    if budget.kind == "latency":
        if table is None:
            text = f"{recipe.budget} needs a latency table: `cfsp latency MODEL` makes one"
            raise CfspError(text)
        limit = LatencyLimit(table, budget.kept(table.dense_seconds), budget.text)
        return ChannelBudget(
            budget.fraction or 0.0, limit.costs([own.size for own in steps]), limit.fitted
        )
    per_unit = _unit_costs(described, costs, budget.kind)
    whole = described.dense or described
    dense = model_costs(whole, whole.parameters)
    if budget.kind == "params":
        added = _added_parameters(described, recipe) + costs.parameters - dense.parameters
        return channel_budget(budget, dense.parameters, steps, per_unit, added)
    check_seqlen(described.model, budget.length)
    total, left = dense.flops(budget.length), costs.flops(budget.length)
    return channel_budget(budget, total, steps, per_unit, left - total)


def even_plan(
    described: Description, recipe: Recipe, table: LatencyTable | None = None
) -> PruningPlan:
    """A plan of about equal widths; the output of any other of this sparsity is as large."""
    if recipe.only_blocks:
        return plan_of_all(described.units, recipe)
    budget, steps = resolve(described, recipe, table), steps_of(described, recipe)
    sizes = torch.tensor([own.size for own in steps], dtype=torch.float64)
    total = total_cost(steps, budget.costs)

    def widths_at(sparsity: float) -> tuple[int, ...]:
        keep = (1 - sparsity) * total
        if recipe.uniform:
            check_budget(steps, keep, budget.costs)
            return equal_widths(steps, sparsity)
        even = torch.zeros_like(sizes)
        return apportion((1 - sparsity) * sizes, steps, keep, even, budget.costs)

    widths = iter(budget.widths(widths_at, steps, equal=recipe.uniform))
    plans = []
    for number, block in enumerate(described.units):
        own = [placed for placed in described.parts if placed.block == number]
        kept = tuple(torch.arange(next(widths)).expand(placed.experts, -1) for placed in own)
        cut = [torch.arange(placed.experts) for placed in own if placed.fewer is not None]
        plans.append(BlockPlan(kept, 0.0, block, experts=next(iter(cut), None)))
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
    for placed in () if recipe.only_blocks else described.parts:
        check_expert_width(recipe.width_multiple, placed.units.experts)
    plan = even_plan(described, recipe, table)
    if recipe.uniform:
        _check_stock(described, plan)


def check_processes(recipe: Recipe, ranks: int) -> None:
    """Raise CfspError where a plan takes the whole model, and there are several processes."""
    if recipe.searches and ranks > 1:
        raise CfspError("allocator 'search' is for one process: make a plan with `cfsp plan`")
    if recipe.chooses_by_loss and ranks > 1:
        raise CfspError("block_choice 'loss' is for one process: take 'angle'")


def check_biases(described: Description, compensation: str) -> None:
    """Raise CfspError where a compensation adds a bias to a projection that can have none."""
    for placed in described.parts if COMPENSATIONS[compensation].adds_bias else ():
        if placed.part.down_bias is None:
            other = "least-squares" if COMPENSATIONS[compensation].needs_gram else "none"
            raise CfspError(
                f"compensation {compensation!r} adds a bias, and {placed.part.down} can have none: "
                f"use compensation {other!r}"
            )


def _check_stock(described: Description, plan: PruningPlan) -> None:
    """Raise CfspError where the family's own class builds no model of the widths to be."""
    dense = described.tensors
    sizes: list[dict[str, int]] = [{} for _ in plan.blocks]
    planned = (count for block in plan.blocks for count in block.counts)
    for placed, count in zip(described.parts, planned, strict=True):
        sizes[placed.block] |= placed.part.config_sizes(count)
    if described.layout is None:
        raise ValueError("the layout is not known")
    built = parameter_shapes(stock_model(described.model, described.layout, sizes))
    for name, info in planned_tensors(dense, described.parts, plan).items():
        if (name in built or name not in dense) and built.get(name) != info.shape:
            stock = list(built[name]) if name in built else "nothing"
            raise CfspError(
                f"uniform widths: {name} would be {list(info.shape)} and the family's own class "
                f"has {stock} there; drop uniform"
                + (", or use compensation 'none'" if name not in dense else "")
            )
