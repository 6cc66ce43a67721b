"""Whole experts taken out of a block: rows of its router, and what else is of every expert."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...io.memory import Room
from ...io.safetensors import TensorInfo
from ..modeling_cfsp import set_parameter
from ..surgery import parameter, set_buffers_

TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")
"""What configs call the number of experts that a token goes through."""


@dataclass(frozen=True)
class FewerExperts:
    """How many of its experts a block keeps, and what of it follows from their number."""

    count: int
    """Of every block: a family's own class has one number."""
    name: str
    """What the config calls it."""
    axes: tuple[tuple[str, int], ...]
    """Parameters and buffers of a block, each with the dimension that is of its experts."""
    attributes: tuple[tuple[str, str, int], ...]
    """(path of a module in the block, attribute, what it is then)."""
    groups: int = 1
    """A router that chooses among groups of experts first keeps as many of each."""

    def of(self, name: str, info: TensorInfo) -> TensorInfo:
        """What is left of a tensor of a block."""
        sizes = {dimension: self.count for axis, dimension in self.axes if axis == name}
        shape = tuple(sizes.get(dimension, size) for dimension, size in enumerate(info.shape))
        return TensorInfo(info.dtype, shape)

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """[count] int64, ascending: the experts of the highest scores [E] of every group; equal
        scores go to the lower number."""
        of_group = scores.unflatten(0, (self.groups, -1))
        order = of_group.sort(dim=1, descending=True, stable=True).indices
        first = torch.arange(0, len(scores), len(scores) // self.groups)[:, None]
        return (order[:, : self.count // self.groups] + first).flatten().sort().values


def keep_experts_(
    block: nn.Module, fewer: FewerExperts, kept: torch.Tensor, room: Room | None = None
) -> None:
    """Leave only ``kept`` experts [n] int64, ascending, of a block, in place. Where what is cut has
    a ``room`` elsewhere, or in place, those that stay move up in their own memory, which is large;
    None: they get new memory."""
    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    for name, dimension in fewer.axes:
        old = tensors[name]
        if room is not None and old.dim() == 3:
            new = old.data[: len(kept)]
            for place, expert in enumerate(kept.tolist()):
                if place < expert:
                    new[place].copy_(old.data[expert])
        else:
            new = old.data.index_select(dimension, kept.to(old.device))
        if isinstance(old, nn.Parameter):
            set_parameter(block, name, parameter(new, old))
        else:
            set_buffers_(block, {name: new})
    for path, name, value in fewer.attributes:
        setattr(block.get_submodule(path), name, value)


def with_fewer(
    tensors: Mapping[str, TensorInfo], cuts: Sequence[tuple[str, FewerExperts]]
) -> dict[str, TensorInfo]:
    """What is left of a model's tensors; ``cuts``: prefix of a block's names, and what it keeps."""
    found = dict(tensors)
    for prefix, fewer in cuts:
        for axis, _ in fewer.axes:
            if (name := prefix + axis) in found:
                found[name] = fewer.of(axis, found[name])
    return found
