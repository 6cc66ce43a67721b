"""Budgets and recipes against a model's shapes, before the calibration: what they come to in FFN
channels, and whether any plan can meet them."""

from dataclasses import replace

import torch

from ..apportion import Steps, check_budget, total_cost
from ..errors import CfspError
from ..models.descriptions import Description
from ..models.detection.removable import check_removable
from ..models.loading import check_seqlen
from ..models.parts.attention import Attention
from ..models.parts.channels import check_expert_width
from ..models.pruned_classes import stock_model
from ..models.tensors import parameter_shapes
from ..pruning.allocation import equal_widths, even_widths
from ..pruning.budget import ChannelBudget, channel_budget, kv_limit, step_cost
from ..pruning.compaction import left_tensors, planned_tensors
from ..pruning.compensation import COMPENSATIONS
from ..pruning.plan import BlockPlan, PruningPlan, plan_of_all
from ..pruning.recipe import Recipe
from .flops import ModelCosts, model_costs
from .footprint import footprints
from .latency import LatencyLimit, LatencyTable


def _unit_costs(
    described: Description, costs: ModelCosts, kind: str, seqlen: int = 0
) -> tuple[int, ...]:
    """What one unit costs in every part, in all its experts: "params" with biases; "flops" of one
    token among ``seqlen``, which goes through a few of the experts; "kv" bytes of a token."""
    found = []
    for placed in described.parts:
        block, cost, part = costs.blocks[placed.block], 0.0, placed.part
        if isinstance(part, Attention) and kind == "flops":
            cost += block.heads.flops(seqlen) / block.heads.heads * part.heads
        if kind == "kv":
            keys = part.keys if isinstance(part, Attention) else 0
            cached = (block.heads.cached or 0) // block.heads.key_heads
            found.append(keys * cached * costs.itemsize)
            continue
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
    parts = [(placed.block, placed.units) for placed in described.parts]
    return recipe.steps(parts, len(described.units))


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
    whole = described.dense or described
    dense, kv = model_costs(whole, whole.parameters), None
    if (kv_budget := recipe.model_budgets[-1]).kind == "kv":
        own = _unit_costs(described, costs, "kv")
        kv = kv_limit(kv_budget, dense.kv_bytes or 0, steps, own)
    if budget.kind == "kv" and kv is not None:
        return ChannelBudget(1 - kv.capacity / total_cost(steps, kv.costs), kv.costs)
    if budget.kind == "latency" and recipe.experts is not None:
        raise CfspError(f"{recipe.budget}: latency is measured with all experts: drop `experts`")
    if budget.kind == "latency":
        if table is None:
            text = f"{recipe.budget} needs a latency table: `cfsp latency MODEL` makes one"
            raise CfspError(text)
        limit = LatencyLimit(table, budget.kept(table.dense_seconds), budget.text, kv)
        own = limit.costs([each.size for each in steps])
        return ChannelBudget(budget.fraction or 0.0, own, limit.fitted, kv)
    seqlen = budget.length + budget.context
    per_unit = _unit_costs(described, costs, budget.kind, seqlen)
    if budget.kind == "params":
        added = _added_parameters(described, recipe) + costs.parameters - dense.parameters
        found = channel_budget(budget, dense.parameters, steps, per_unit, added)
    else:
        check_seqlen(described.model, seqlen)
        total, left = dense.flops(seqlen), costs.flops(seqlen)
        found = channel_budget(budget, total, steps, per_unit, left - total)
    return replace(found, kv=kv)


def even_plan(
    described: Description, recipe: Recipe, table: LatencyTable | None = None
) -> PruningPlan:
    """A plan of about equal widths; the output of any other of this sparsity is as large."""
    if recipe.only_blocks:
        return plan_of_all(described.units, recipe)
    budget, steps = resolve(described, recipe, table), steps_of(described, recipe)

    def widths_at(sparsity: float) -> tuple[int, ...]:
        if recipe.uniform:
            keep = (1 - sparsity) * total_cost(steps, budget.costs)
            check_budget(steps, keep, budget.costs)
            return equal_widths(steps, sparsity)
        return even_widths(steps, sparsity, budget)

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


UNITS = {"params": "parameters", "flops": "flops", "latency": "seconds", "kv": "kv_bytes"}


def check_met(described: Description, plan: PruningPlan, table: LatencyTable | None) -> None:
    """Raise CfspError where a plan is not what its recipe's budget asks for; of two, the one of KV
    bytes may be more than met."""
    recipe, steps = plan.recipe, steps_of(described, plan.recipe)
    for number, budget in enumerate(recipe.model_budgets):
        found = footprints(described, plan, table)
        kept, total = (getattr(side, UNITS[budget.kind]) for side in (found.after, found.before))
        multiple, step = recipe.width_multiple, 0
        if budget.kind == "kv":
            costs = model_costs(described, described.parameters)
            step = step_cost(steps, _unit_costs(described, costs, "kv"))
            multiple = recipe.group_multiple
            kept = max(kept, budget.kept(total)) if number else kept
        elif len(recipe.model_budgets) > 1 and kept < budget.kept(total):
            counts = (count for block in plan.blocks for count in block.counts)
            pairs = zip(counts, steps, described.parts, strict=True)
            if all(count == x.most for count, x, own in pairs if own.units.are_channels):
                budget.check_beside(recipe.model_budgets[-1], kept, total)
        budget.check(kept, total, multiple, step)


def check_recipe(described: Description, recipe: Recipe, table: LatencyTable | None = None) -> None:
    """Raise CfspError where no plan for this model can be what the recipe asks for."""
    check_biases(described, recipe.resolved_compensation)
    if described.layout is not None:
        check_removable(described.model, described.layout, recipe.unit_kinds)
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
