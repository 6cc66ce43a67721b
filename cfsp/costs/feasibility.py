"""Whether a recipe can be met by a model: found out from shapes, before the calibration."""

from operator import mul

import torch
from torch import nn
from transformers import PreTrainedModel

from ..apportion import apportion, check_budget
from ..errors import CfspError
from ..models.channels import check_expert_width
from ..models.layouts import Layout
from ..models.pruned_classes import parameter_shapes, stock_model
from ..pruning.allocation import equal_widths
from ..pruning.compaction import planned_tensors
from ..pruning.compensation import ADD_BIAS
from ..pruning.plan import BlockPlan, PruningPlan
from ..pruning.recipe import Recipe
from .footprint import check_met, groups_of, resolve_budget
from .latency import LatencyTable


def check_recipe(
    model: PreTrainedModel, layout: Layout, recipe: Recipe, table: LatencyTable | None = None
) -> None:
    """Raise CfspError where no plan for this model can be what the recipe asks for."""
    check_biases(model, layout, recipe.resolved_compensation)
    for group in groups_of(model, layout):
        check_expert_width(recipe.width_multiple, group.experts)
    plan = even_plan(model, layout, recipe, table)
    if recipe.uniform:
        _check_stock(model, layout, plan)


def check_biases(model: nn.Module, layout: Layout, compensation: str) -> None:
    """Raise CfspError where a compensation adds a bias to a projection that can have none."""
    if compensation in ADD_BIAS:
        for block in layout.find_blocks(model):
            for ffn in layout.block_ffns(block):
                if ffn.down_bias is None:
                    raise CfspError(
                        f"compensation {compensation!r} adds a bias, and {ffn.down} can have none: "
                        "use compensation 'none'"
                    )


def even_plan(
    model: PreTrainedModel, layout: Layout, recipe: Recipe, table: LatencyTable | None = None
) -> PruningPlan:
    """A plan of about equal widths; the output of any other of this sparsity is as large.

    Raises:
        CfspError: no widths meet the recipe's sparsity or budget.
    """
    blocks = [layout.groups(block) for block in layout.find_blocks(model)]
    sizes = [group.channels for block in blocks for group in block]
    budget, multiple = resolve_budget(model, layout, recipe, table), recipe.width_multiple
    total, even = sum(map(mul, sizes, budget.costs)), torch.zeros(len(sizes))

    def widths_at(sparsity: float) -> tuple[int, ...]:
        keep = (1 - sparsity) * total
        check_budget(sizes, keep, multiple, budget.costs)
        if recipe.uniform:
            return equal_widths(sizes, sparsity, multiple)
        ideal = (1 - sparsity) * torch.tensor(sizes, dtype=torch.float64)
        return apportion(ideal, sizes, keep, multiple, even, budget.costs)

    widths = budget.widths(widths_at, sizes, multiple, equal=recipe.uniform)
    plans, next_width = [], iter(widths)
    for block in blocks:
        kept = tuple(torch.arange(next(next_width)).expand(g.experts, -1) for g in block)
        plans.append(BlockPlan(kept, 0.0, block))
    plan = PruningPlan(tuple(plans), "", recipe)
    check_met(model, layout, plan, table)
    return plan


def _check_stock(model: PreTrainedModel, layout: Layout, plan: PruningPlan) -> None:
    """Raise CfspError where the family's own class builds no model of the widths to be."""
    dense = model.state_dict()
    planned = planned_tensors(dense, model, layout, plan)
    widths = [
        {ffn.width: width for ffn, width in zip(ffns, part.ffn_widths, strict=True)}
        for ffns, part in zip(
            map(layout.block_ffns, layout.find_blocks(model)), plan.blocks, strict=True
        )
    ]
    built = parameter_shapes(stock_model(model, widths))
    for name, info in planned.items():
        if (name in built or name not in dense) and built.get(name) != info.shape:
            stock = list(built[name]) if name in built else "nothing"
            raise CfspError(
                f"uniform widths: {name} would be {list(info.shape)} and the family's own class "
                f"has {stock} there; drop uniform"
                + (", or use compensation 'none'" if name not in dense else "")
            )
