"""Experts: FFNs that each see the tokens routed to them, their weights in one tensor."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear

from cfsp_kernels import ChannelStatistics, channel_statistics, swiglu_statistics

from .channels import ChannelAxis, ChannelGroup, Collect, Compensate, FFNWeights, parameter
from .ffns import FFN
from .forwards import forward_instead
from .modeling_cfsp import set_parameter, set_width
from .shards import Room


@dataclass(frozen=True)
class ExpertsFFN(FFN):
    """Gated experts of one width: gate and up [E, 2F, D], gate first, and down [E, D, F].

    ``up`` and ``down`` are the paths of parameters; the module that has them is called with the
    hidden states [T, D], and for every token the numbers [T, K] and the shares [T, K] of its
    experts.
    """

    up: str = "mlp.experts.gate_up_proj"
    down: str = "mlp.experts.down_proj"
    gate: None = None
    width: str = "moe_intermediate_size"

    @property
    def is_gated(self) -> bool:
        """True."""
        return True

    @property
    def channels(self) -> dict[str, ChannelAxis]:
        """See :attr:`cfsp.ffns.FFN.channels`."""
        return {self.up: ChannelAxis(1, copies=2), self.down: ChannelAxis(2)}

    @property
    def down_bias(self) -> None:
        """None: experts have no biases."""
        return

    def group(self, block: nn.Module) -> ChannelGroup:
        """See :meth:`cfsp.ffns.FFN.group`."""
        experts, _, channels = block.get_parameter(self.down).shape
        return ChannelGroup(channels, experts)

    def weights(self, parameters: Mapping[str, torch.Tensor]) -> tuple[FFNWeights, ...]:
        """See :meth:`cfsp.ffns.FFN.weights`."""
        gates, ups = parameters[self.up].chunk(2, dim=1)
        experts = zip(gates, ups, parameters[self.down], strict=True)
        return tuple(FFNWeights(gate, up, down) for gate, up, down in experts)

    def observed(
        self, block: nn.Module, collect: Collect, fused: bool = True
    ) -> AbstractContextManager[None]:
        """See :meth:`cfsp.ffns.FFN.observed`: each expert's statistics are of its own tokens."""
        module = self.module(block)
        gate_up, down = (block.get_parameter(name).data for name in (self.up, self.down))
        activate = self._activate(block, fused)

        def forward(
            hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
        ) -> torch.Tensor:
            routed = top_k_index.T.flatten()
            by_expert = routed.argsort(stable=True)
            counts = routed.bincount(minlength=len(down)).tolist()
            shares = top_k_weights.T.flatten()
            total = torch.zeros_like(hidden_states)
            for expert, rows in enumerate(by_expert.split(counts)[: len(down)]):
                if len(rows):
                    tokens = rows % len(hidden_states)
                    both = linear(hidden_states[tokens], gate_up[expert])
                    product, part = activate(*both.chunk(2, dim=-1))
                    collect(expert, part, product, tokens)
                    output = linear(product, down[expert]) * shares[rows, None]
                    total.index_add_(0, tokens, output.to(total.dtype))
            return total

        return forward_instead([module], [forward])

    def _activate(
        self, block: nn.Module, fused: bool
    ) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ChannelStatistics]]:
        """(gate, up) -> their product and its statistics."""
        name = self.gated_activation(block) if fused else None
        if name is not None:
            return lambda gate, up: swiglu_statistics(gate, up, name)
        act = getattr(self.module(block), self.activation)

        def unfused(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ChannelStatistics]:
            product = act(gate) * up
            return product, channel_statistics(product)

        return unfused

    def cut_(
        self, block: nn.Module, kept: torch.Tensor, compensate: Compensate, room: Room | None
    ) -> None:
        """See :meth:`cfsp.ffns.FFN.cut_`. One expert at a time: the tensors are large."""
        gate_up, down = (block.get_parameter(name) for name in (self.up, self.down))
        experts, width = kept.shape
        place = room or (lambda shape, dtype: down.new_empty(shape, dtype=dtype))
        new_gate_up = place((experts, 2 * width, gate_up.shape[2]), gate_up.dtype)
        new_down = place((experts, down.shape[1], width), down.dtype)
        rows = ChannelAxis(0, copies=2)
        for expert in range(experts):
            rows.cut(gate_up.data[expert], kept[expert], new_gate_up[expert])
            if compensate(expert, down.data[expert], new_down[expert]).bias is not None:
                raise ValueError("experts have no bias to put a mean into")
        set_parameter(block, self.up, parameter(new_gate_up, gate_up))
        set_parameter(block, self.down, parameter(new_down, down))
        set_width(block, self.down, width)
