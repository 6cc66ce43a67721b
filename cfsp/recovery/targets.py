"""What a recovery trains: projections that get adapters, or the parameters of the FFNs."""

from collections.abc import Iterator, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..costs.flops import is_attention
from ..errors import CfspError
from ..models.experts import ExpertsFFN
from ..models.layouts import Layout

BlockProjections = dict[str, nn.Module]
"""Projections of a block, Linear or Conv1D, by their names in the model."""


def projections(model: nn.Module, layout: Layout, targets: str) -> list[BlockProjections]:
    """The projections of every block that get adapters.

    Args:
        model: a causal LM of transformers, perhaps on meta.
        layout: says where the FFNs are.
        targets: "ffn", "attention" or "all". Attention is what lies in a module whose name says so.

    Raises:
        CfspError: FFNs beside routed experts, whose names peft takes for those of experts.
    """
    blocks = layout.find_blocks(model)
    if targets != "attention" and any(_has_experts(block, layout) for block in blocks):
        raise CfspError(
            f"no adapters for the FFNs of {type(model).__name__}, which has routed experts: "
            "targets 'attention' adapts the rest, method 'ffn' trains them whole"
        )
    found = []
    for number, block in enumerate(blocks):
        paths: list[str] = []
        if targets != "attention":
            paths.extend(ffn_projections(block, layout))
        if targets != "ffn":
            paths.extend(attention_projections(block))
        prefix = f"{layout.blocks}.{number}"
        found.append({f"{prefix}.{path}": block.get_submodule(path) for path in paths})
    return found


def _has_experts(block: nn.Module, layout: Layout) -> bool:
    return any(isinstance(ffn, ExpertsFFN) for ffn in layout.block_ffns(block))


def ffn_projections(block: nn.Module, layout: Layout) -> Iterator[str]:
    """Paths of the projections of a block's FFN."""
    for ffn in layout.block_ffns(block):
        for name in ffn.weight_names:
            yield name.removesuffix(".weight")


def attention_projections(block: nn.Module) -> Iterator[str]:
    """Paths of the projections of a block's attention."""
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and is_attention(path):
            yield path


def ffn_parameters(model: nn.Module, layout: Layout) -> dict[str, nn.Parameter]:
    """All parameters of all FFNs, of experts and biases too, by their names in the model."""
    found = {}
    for number, block in enumerate(layout.find_blocks(model)):
        prefix = f"{layout.blocks}.{number}"
        own = dict(block.named_parameters())
        for ffn in layout.block_ffns(block):
            for name in (*ffn.channels, ffn.down_bias):
                if name in own:
                    found[f"{prefix}.{name}"] = own[name]
    return found


def rank_costs(blocks: Sequence[BlockProjections]) -> list[int]:
    """Parameters of the adapters of every block for each unit of rank."""
    return [sum(sum(_shape(module)) for module in block.values()) for block in blocks]


def largest_ranks(blocks: Sequence[BlockProjections]) -> list[int]:
    """The rank of every block beyond which an adapter adds nothing; 0 without projections."""
    return [min((min(_shape(module)) for module in block.values()), default=0) for block in blocks]


def _shape(projection: nn.Module) -> tuple[int, ...]:
    return tuple(projection.get_parameter("weight").shape)
