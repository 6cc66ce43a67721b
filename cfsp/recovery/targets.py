"""What a recovery trains: the FFNs whole, or LoRA adapters whose ranks follow importance."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..apportion import Steps, apportion
from ..costs.flops import is_attention
from ..errors import CfspError
from ..models.layouts import Layout
from ..models.parts.experts import ExpertsFFN
from ..pruning.allocation import REFERENCE_TOKENS, importance_shares
from ..pruning.plan import PruningPlan
from .settings import Recovery

Projections = dict[str, tuple[int, ...]]
"""Shapes of a block's projections, Linear or Conv1D, by their names in the model."""


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
    """What settings make of a pruned model, which may be on meta; raises CfspError for FFNs that
    cannot have adapters, or a rank beyond what a projection has."""
    if settings.method != "lora":
        count = sum(value.numel() for value in ffn_parameters(model, layout))
        return Trained((), count, count)
    blocks = projections(model, layout, settings.targets)
    costs, largest = rank_costs(blocks), largest_ranks(blocks)
    if settings.allocation == "importance":
        importance = torch.tensor([block.importance for block in plan.blocks], dtype=torch.float64)
        ranks = importance_ranks(importance, settings.rank, costs, largest)
    else:
        ranks = uniform_ranks(settings.rank, largest)
    return Trained(tuple(ranks), sum(map(mul, ranks, costs)), settings.rank * sum(costs))


def ffn_parameters(model: nn.Module, layout: Layout) -> list[nn.Parameter]:
    """All parameters of all FFNs, of experts and biases too."""
    names = {
        f"{layout.prefix(number)}{name}"
        for number, _, ffn in layout.parts_of(model)
        for name in (*ffn.channels, ffn.down_bias)
    }
    return [value for name, value in model.named_parameters() if name in names]


def projections(model: nn.Module, layout: Layout, targets: str) -> list[Projections]:
    """The projections of every block that get adapters; attention is what lies in a module whose
    name says so. Raises CfspError for FFNs beside routed experts."""
    found = []
    for number, block in enumerate(layout.find_blocks(model)):
        paths: list[str] = []
        if targets != "attention":
            if any(isinstance(ffn, ExpertsFFN) for ffn in layout.block_ffns(block)):
                raise CfspError(  # peft takes their names for those of experts
                    f"no adapters for the FFNs of {type(model).__name__}, which has routed "
                    "experts: targets 'attention' adapts the rest, method 'ffn' trains them whole"
                )
            paths += [name.removesuffix(".weight") for name in layout.weight_names(block)]
        if targets != "ffn":
            paths += [
                path
                for path, module in block.named_modules()
                if isinstance(module, nn.Linear | Conv1D) and is_attention(path)
            ]
        shapes = {path: tuple(block.get_parameter(f"{path}.weight").shape) for path in paths}
        found.append({layout.prefix(number) + path: shape for path, shape in shapes.items()})
    return found


def rank_costs(blocks: Sequence[Projections]) -> list[int]:
    """Parameters of the adapters of every block for each unit of rank."""
    return [sum(map(sum, block.values())) for block in blocks]


def largest_ranks(blocks: Sequence[Projections]) -> list[int]:
    """The rank of every block beyond which an adapter adds nothing; 0 without projections."""
    return [min(map(min, block.values()), default=0) for block in blocks]


def uniform_ranks(rank: int, largest: Sequence[int]) -> list[int]:
    """[L] the same rank for every block that has projections, those with a largest rank; raises
    CfspError for a rank beyond what a projection has."""
    room = min(most for most in largest if most)
    if rank > room:
        raise CfspError(f"rank {rank} is beyond the {room} of the smallest projection")
    return [rank if most else 0 for most in largest]


def importance_ranks(
    importance: torch.Tensor, rank: int, costs: Sequence[int], largest: Sequence[int]
) -> list[int]:
    """[L] ranks in proportion to the coarse importance of the blocks; 0 without projections.

    With s_l = sigmoid((I_l - mean I) / 1e4), which the widths of the blocks follow too, the ideal
    is rank_l = c s_l, c such that there are as many parameters as with ``rank`` in every block.
    Ideals are rounded down and what is missing goes to those that lost most; a block gets 1 at
    least. The number of parameters is that of the uniform rank to half a unit of the costliest
    block.

    Args:
        importance: [L] fp64, mean influence per token of every block of the dense model.
        rank: the uniform rank.
        costs: [L], see :func:`rank_costs`.
        largest: [L], see :func:`largest_ranks`.

    Source: arXiv 2409.13199, which gives the principle; its code has no recovery.
    """
    ranks = uniform_ranks(rank, largest)
    blocks = [number for number, most in enumerate(largest) if most]
    cost = torch.tensor([costs[number] for number in blocks])
    share = importance_shares(importance.double() * REFERENCE_TOKENS)[blocks]
    budget = rank * int(cost.sum())
    found = apportion(
        share * (budget / float((share * cost).sum())),
        [Steps(largest[number]) for number in blocks],
        budget,
        importance[blocks],
        cost.tolist(),
    )
    for number, own in zip(blocks, found, strict=True):
        ranks[number] = own
    return ranks
