"""Experts: FFNs that each see the tokens routed to them, their weights in one tensor."""

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise, starmap

import torch
from torch import nn
from torch.nn.functional import grouped_mm, linear

from cfsp_kernels import channel_statistics, swiglu_statistics

from ...io.memory import Room
from ..modeling_cfsp import set_parameter, set_width
from ..surgery import forward_instead, parameter
from .channels import (
    Compensate,
    Observer,
    PartWeights,
    Routing,
    UnitAxis,
    Units,
    expert_offsets,
    in_place,
)
from .expert_removal import FewerExperts
from .ffn import FFN


@dataclass(frozen=True)
class ExpertsFFN(FFN):
    """Experts of one width, in two parameters of a module: ``up`` [E, 2F, D], gate first, and
    ``down`` [E, D, F]; biases, where there are some, are ``up_bias`` [E, 2F] and ``down_bias``
    [E, D] under their names.

    The module is called with hidden states [T, D], and [T, K] numbers and shares of their experts.
    """

    up: str = "mlp.experts.gate_up_proj"
    down: str = "mlp.experts.down_proj"
    gate: None = None
    activation: str = "act_fn"
    """Attribute of the module; empty where its ``_apply_gate`` makes the whole product."""
    width: str = "moe_intermediate_size"
    fused: bool = True
    """Whether there is a gate; ``up`` is [E, F, D] without."""
    transposed: bool = False
    """Whether weights are [E, in, out]."""
    interleaved: bool = False
    """Whether the gate and the up of a channel lie side by side."""
    routed: bool = True
    """False: the module is called with the hidden states [E * T, D] of every expert in turn, which
    are scaled by the shares, and zero where a token does not go to that expert."""
    fewer: FewerExperts | None = None
    """Where only some of the experts are to stay."""

    @property
    def is_transposed(self) -> bool:
        return self.transposed

    @property
    def channels(self) -> dict[str, UnitAxis]:
        sections = (1,) if not self.fused else (2,) if self.interleaved else (1, 1)
        into, out = 2 - self.transposed, 1 + self.transposed
        return {
            self.up: UnitAxis(out, sections),
            f"{self.up}_bias": UnitAxis(1, sections),
            self.down: UnitAxis(into),
        }

    @property
    def weight_names(self) -> tuple[str, ...]:
        return self.up, self.down

    def set_count(self, block: nn.Module, count: int) -> None:
        set_width(block, self.down, count)

    @property
    def down_bias(self) -> None:
        """None: a compensation adds no bias to experts."""
        return

    def units(self, block: nn.Module) -> Units:
        shape = block.get_parameter(self.down).shape
        return Units(shape[self.channels[self.down].dimension], shape[0])

    def weights(self, parameters: Mapping[str, torch.Tensor]) -> tuple[PartWeights, ...]:
        both, down = (parameters[name] for name in self.weight_names)
        if self.transposed:
            both, down = both.mT, down.mT
        gates: Iterable[torch.Tensor | None]
        if not self.fused:
            gates, ups = [None] * len(down), both
        elif self.interleaved:
            gates, ups = both[:, ::2], both[:, 1::2]
        else:
            gates, ups = both.chunk(2, dim=1)
        return tuple(starmap(PartWeights, zip(gates, ups, down, strict=True)))

    def activated(self, module: nn.Module, both: torch.Tensor) -> torch.Tensor:
        """The input [..., F] of down, of what ``up`` gives [..., 2F], as the module has it."""
        if not self.activation:
            return module._apply_gate(both)  # type: ignore[operator]
        act = getattr(module, self.activation)
        if not self.fused:
            return act(both)
        gate, up = both.chunk(2, dim=-1)
        return act(gate) * up

    def observed(
        self, block: nn.Module, observer: Observer, fused: bool = True
    ) -> AbstractContextManager[None]:
        """See :meth:`FFN.observed`: each expert's statistics are of its own tokens. The output is
        that of transformers' grouped matrix products, or of the module itself where it is not
        handed the routing; only there a launch waits for the device."""
        module, parameters = self.module(block), dict(block.named_parameters())
        experts = len(parameters[self.down])
        activation = self.gated_activation(block) if fused else None
        own_forward = module.forward

        def project(x: torch.Tensor, name: str, routing: Routing) -> torch.Tensor:
            weight, bias = parameters[name].data, parameters.get(f"{name}_bias")
            weight = weight.mT if self.transposed else weight
            output = grouped_linear(x, weight, routing.offsets)
            if bias is None:
                return output
            return output.add_(bias.data[routing.experts.clamp(max=experts - 1)])

        def observe(x: torch.Tensor, routing: Routing) -> torch.Tensor:
            both, offsets = project(x, self.up, routing), routing.offsets
            totals = observer.totals().unflatten(1, (experts, -1)).transpose(0, 1)
            if activation is not None:
                gate, up = both.chunk(2, dim=-1)
                product, _ = swiglu_statistics(gate, up, activation, offsets=offsets, totals=totals)
            else:
                product = self.activated(module, both)
                channel_statistics(product, offsets=offsets, totals=totals)
            observer.add(product, routing)
            return product

        def observe_output(output: torch.Tensor, shares: torch.Tensor, routing: Routing) -> None:
            if experts == 1:
                return
            norms = torch.linalg.vector_norm(output, dim=1, keepdim=True, dtype=torch.float32)
            totals = observer.outputs().unflatten(1, (experts, 2)).transpose(0, 1)
            both = torch.cat([norms, norms * shares.float()], dim=1)
            channel_statistics(both, offsets=routing.offsets, totals=totals)

        def forward(
            hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
        ) -> torch.Tensor:
            chosen, order = top_k_index.flatten().sort(stable=True)
            tokens = order // top_k_index.shape[1]
            routing = Routing(expert_offsets(chosen, experts), chosen, tokens)
            output = project(observe(hidden_states[tokens], routing), self.down, routing)
            shares = top_k_weights.flatten()[order, None]
            observe_output(output, shares, routing)
            output = output * shares
            output = output.masked_fill((chosen >= experts)[:, None], 0)  # of no expert here
            places = order.argsort()
            return output[places].unflatten(0, top_k_index.shape).sum(1).to(hidden_states.dtype)

        def forward_scaled(hidden_states: torch.Tensor) -> torch.Tensor:
            rows, count = hidden_states.any(-1).nonzero().flatten(), len(hidden_states) // experts
            offsets = expert_offsets(rows // count, experts)
            routing = Routing(offsets, rows // count, rows % count)
            observe(hidden_states[rows], routing)
            output = own_forward(hidden_states)
            observe_output(output[rows], output.new_ones(1), routing)  # shares are in their input
            return output

        return forward_instead([module], [forward if self.routed else forward_scaled])

    def cut_(
        self, block: nn.Module, kept: torch.Tensor, compensate: Compensate, room: Room | None
    ) -> None:
        """See :meth:`FFN.cut_`. One expert at a time: the tensors are large."""
        parameters, width = dict(block.named_parameters()), kept.shape[1]
        for name, axis in self.channels.items():
            if name not in parameters:
                continue
            old, shape = parameters[name].data, list(parameters[name].shape)
            shape[axis.dimension] = axis.size(width)
            if room is in_place:
                new = old.reshape(-1)[: math.prod(shape)].view(shape)
            elif room is not None and old.dim() == 3:
                new = room(tuple(shape), old.dtype)
            else:
                new = old.new_empty(shape)
            of_one = replace(axis, dimension=axis.dimension - 1)
            for expert, channels in enumerate(kept):
                of_expert = old[expert].clone() if room is in_place else old[expert]
                if name == self.down:
                    self._cut_down(expert, of_expert, new[expert], compensate)
                else:
                    of_one.cut(of_expert, channels, new[expert])
            set_parameter(block, name, parameter(new, parameters[name]))
        self.set_count(block, width)

    def _cut_down(
        self, expert: int, old: torch.Tensor, new: torch.Tensor, compensate: Compensate
    ) -> None:
        if self.transposed:
            cut = compensate(expert, old.T.contiguous(), None)
            new.copy_(cut.weight.T)
        else:
            cut = compensate(expert, old, new)
        if cut.bias is not None:
            raise ValueError("experts have no bias to put a mean into")


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
