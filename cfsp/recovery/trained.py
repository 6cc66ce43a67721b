"""How much a recovery trains: ranks of the blocks and numbers of parameters."""

from dataclasses import dataclass

import torch
from torch import nn

from ..models.layouts import Layout
from ..pruning.plan import PruningPlan
from .lora_ranks import importance_ranks, uniform_ranks
from .settings import Recovery
from .targets import ffn_parameters, largest_ranks, projections, rank_costs


@dataclass(frozen=True)
class Trained:
    """What learns."""

    ranks: tuple[int, ...]
    """Of the adapters of every block; () without adapters."""
    parameters: int
    uniform_parameters: int
    """What adapters of the uniform rank would have; ``parameters`` without adapters."""


def what_is_trained(
    plan: PruningPlan, model: nn.Module, layout: Layout, settings: Recovery
) -> Trained:
    """What settings make of a pruned model, which may be on meta.

    Raises:
        CfspError: nothing to adapt, or a rank beyond what a projection has.
    """
    if settings.method != "lora":
        count = sum(value.numel() for value in ffn_parameters(model, layout).values())
        return Trained((), count, count)
    blocks = projections(model, layout, settings.targets)
    costs, largest = rank_costs(blocks), largest_ranks(blocks)
    uniform = ranks = uniform_ranks(settings.rank, largest)
    if settings.allocation == "importance":
        importance = torch.tensor([block.importance for block in plan.blocks], dtype=torch.float64)
        ranks = importance_ranks(importance, settings.rank, costs, largest)
    counts = [sum(r * c for r, c in zip(found, costs, strict=True)) for found in (ranks, uniform)]
    return Trained(tuple(ranks), *counts)
