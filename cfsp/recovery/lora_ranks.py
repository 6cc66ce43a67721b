"""LoRA ranks of the blocks: more where a block matters more, as many parameters in all."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..apportion import apportion
from ..errors import CfspError
from ..models.layouts import Layout
from ..pruning.allocation import REFERENCE_TOKENS, importance_shares
from ..pruning.plan import PruningPlan
from .settings import Recovery
from .targets import ffn_parameters, largest_ranks, projections, rank_costs


def uniform_ranks(rank: int, largest: Sequence[int]) -> list[int]:
    """The same rank for every block that has projections.

    Args:
        rank: of each adapter.
        largest: [L] of :func:`cfsp.recovery.targets.largest_ranks`.

    Raises:
        CfspError: a rank beyond what a projection has.
    """
    room = min(most for most in largest if most)
    if rank > room:
        raise CfspError(f"rank {rank} is beyond the {room} of the smallest projection")
    return [rank if most else 0 for most in largest]


def importance_ranks(
    importance: torch.Tensor, rank: int, costs: Sequence[int], largest: Sequence[int]
) -> list[int]:
    """Ranks in proportion to the coarse importance of the blocks.

    With s_l = sigmoid((I_l - mean I) / 1e4), which the widths of the blocks follow too, the ideal
    is rank_l = c s_l, c such that there are as many parameters as with ``rank`` in every block.
    Ideals are rounded down and what is missing goes to those that lost most; a block gets 1 at
    least. The number of parameters is that of the uniform rank to half a unit of the costliest
    block.

    Args:
        importance: [L] fp64, mean influence per token of every block of the dense model.
        rank: the uniform rank.
        costs: [L] parameters of each block's adapters for a unit of rank.
        largest: [L] ranks beyond which adapters add nothing; 0 for blocks without projections.

    Returns:
        [L] ranks, 0 where there are no projections.

    Source: arXiv 2409.13199, which gives the principle; its code has no recovery.
    """
    uniform = uniform_ranks(rank, largest)
    blocks = [number for number, most in enumerate(largest) if most]
    cost = torch.tensor([costs[number] for number in blocks])
    share = importance_shares(importance.double() * REFERENCE_TOKENS)[blocks]
    budget = rank * int(cost.sum())
    found = apportion(
        share * (budget / float((share * cost).sum())),
        [largest[number] for number in blocks],
        budget,
        1,
        importance[blocks],
        cost.tolist(),
    )
    for number, own in zip(blocks, found, strict=True):
        uniform[number] = own
    return uniform


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
