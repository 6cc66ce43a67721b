"""Experts: FFNs that each see the tokens routed to them, their weights in one tensor."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import grouped_mm, linear

from cfsp_kernels import channel_statistics, swiglu_statistics

from ...io.memory import Room
from ..modeling_cfsp import set_parameter, set_width
from ..surgery import forward_instead, parameter
from .channels import (
    ChannelAxis,
    ChannelGroup,
    Compensate,
    FFNWeights,
    Observer,
    Routing,
    expert_offsets,
)
from .ffn import FFN


@dataclass(frozen=True)
class ExpertsFFN(FFN):
    """Gated experts of one width: parameters ``up`` [E, 2F, D], gate first, and ``down`` [E, D, F]
    of a module called with hidden states [T, D], and [T, K] numbers and shares of their experts.
    """

    up: str = "mlp.experts.gate_up_proj"
    down: str = "mlp.experts.down_proj"
    gate: None = None
    width: str = "moe_intermediate_size"
    fused: bool = True

    @property
    def channels(self) -> dict[str, ChannelAxis]:
        return {self.up: ChannelAxis(1, copies=2), self.down: ChannelAxis(2)}

    @property
    def down_bias(self) -> None:
        """None: experts have no biases."""
        return

    def group(self, block: nn.Module) -> ChannelGroup:
        experts, _, channels = block.get_parameter(self.down).shape
        return ChannelGroup(channels, experts)

    def weights(self, parameters: Mapping[str, torch.Tensor]) -> tuple[FFNWeights, ...]:
        gates, ups = parameters[self.up].chunk(2, dim=1)
        experts = zip(gates, ups, parameters[self.down], strict=True)
        return tuple(FFNWeights(gate, up, down) for gate, up, down in experts)

    def observed(
        self, block: nn.Module, observer: Observer, fused: bool = True
    ) -> AbstractContextManager[None]:
        """See :meth:`FFN.observed`: each expert's statistics are of its own tokens. The output is
        that of transformers' grouped matrix products; no launch waits for the device."""
        module = self.module(block)
        gate_up, down = (block.get_parameter(name).data for name in (self.up, self.down))
        experts = len(down)
        activation = self.gated_activation(block) if fused else None
        act = getattr(module, self.activation)

        def forward(
            hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
        ) -> torch.Tensor:
            chosen, order = top_k_index.flatten().sort(stable=True)
            tokens = order // top_k_index.shape[1]
            offsets = expert_offsets(chosen, experts)
            both = grouped_linear(hidden_states[tokens], gate_up, offsets)
            totals = observer.totals().unflatten(1, (experts, -1)).transpose(0, 1)
            gate, up = both.chunk(2, dim=-1)
            if activation is not None:
                product, _ = swiglu_statistics(gate, up, activation, offsets=offsets, totals=totals)
            else:
                product = act(gate) * up
                channel_statistics(product, offsets=offsets, totals=totals)
            observer.add(product, Routing(offsets, chosen, tokens))
            output = grouped_linear(product, down, offsets)
            output = output * top_k_weights.flatten()[order, None]
            output = output.masked_fill((chosen >= experts)[:, None], 0)  # of no expert here
            places = order.argsort()
            return output[places].unflatten(0, top_k_index.shape).sum(1).to(hidden_states.dtype)

        return forward_instead([module], [forward])

    def cut_(
        self, block: nn.Module, kept: torch.Tensor, compensate: Compensate, room: Room | None
    ) -> None:
        """See :meth:`FFN.cut_`. One expert at a time: the tensors are large."""
        gate_up, down = (block.get_parameter(name) for name in (self.up, self.down))
        experts, width = kept.shape
        place = room or (lambda shape, dtype: down.new_empty(shape, dtype=dtype))
        new_gate_up = place((experts, 2 * width, gate_up.shape[2]), gate_up.dtype)
        new_down = place((experts, down.shape[1], width), down.dtype)
        rows = ChannelAxis(0, copies=2)
        for expert in range(experts):
            rows.cut(gate_up.data[expert], kept[expert], new_gate_up[expert])
            _, added_bias = compensate(expert, down.data[expert], new_down[expert])
            if added_bias is not None:
                raise ValueError("experts have no bias to put a mean into")
        set_parameter(block, self.up, parameter(new_gate_up, gate_up))
        set_parameter(block, self.down, parameter(new_down, down))
        set_width(block, self.down, width)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """x [T, in] times the weights [E, out, in] of each expert, whose rows begin at ``offsets``
    [E + 1] int32; those after the last expert's are anything in the result [T, out]."""
    # Grouped products need rows of whole 16 bytes; without them, this waits for the device.
    whole = all(size * weight.itemsize % 16 == 0 for size in weight.shape[1:])
    if whole and (not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0)):
        return grouped_mm(x, weight.mT, offs=offsets[1:])
    output = x.new_zeros(len(x), weight.shape[1])
    for matrix, (start, end) in zip(weight, pairwise(offsets.tolist()), strict=True):
        output[start:end] = linear(x[start:end], matrix)
    return output
