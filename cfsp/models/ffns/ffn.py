"""The FFN of a block: where its channels lie in the weights, how it is observed, how it is cut."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN

from cfsp_kernels import channel_statistics, swiglu_statistics

from ...errors import CfspError
from ...io.memory import Room
from ..modeling_cfsp import set_parameter, set_width
from ..surgery import forward_instead, parameter
from .channels import ChannelAxis, ChannelGroup, Compensate, FFNWeights, Observer, in_place

FUSED_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu2": "relu2",
}
"""Activation of ``cfsp_kernels.swiglu_statistics`` -> its name in transformers."""


@dataclass(frozen=True)
class FFN:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate.

    All paths are those of modules in a block.
    """

    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    gate: str | None = "mlp.gate_proj"
    activation: str = "act_fn"
    """Attribute of the module that holds the projections."""
    width: str = "intermediate_size"
    """What the config calls the number of channels."""
    projection_class: str = "Linear"
    """Of transformers' Conv1D, weights are [in, out]."""
    fused: bool = False
    """Whether gate and up are one projection [2F, D], at ``up``, gate first."""

    @property
    def is_transposed(self) -> bool:
        """Whether weights are [in, out]."""
        return self.projection_class == "Conv1D"

    @property
    def channels(self) -> dict[str, ChannelAxis]:
        """Every parameter of a block with channels in it; biases that may be absent included."""
        copies = 2 if self.fused else 1
        found = {}
        for path in (self.gate, self.up):
            if path is not None:
                found[f"{path}.weight"] = ChannelAxis(int(self.is_transposed), copies)
                found[f"{path}.bias"] = ChannelAxis(0, copies)
        return {**found, f"{self.down}.weight": ChannelAxis(int(not self.is_transposed))}

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The parameters that :meth:`weights` reads."""
        return tuple(name for name in self.channels if not name.endswith(".bias"))

    @property
    def down_bias(self) -> str | None:
        """The parameter that a compensation may add to or create; None where there can be none."""
        return f"{self.down}.bias"

    def projection(self, block: nn.Module, path: str) -> nn.Linear:
        """The projection at ``path``. Raises CfspError for a module of another class."""
        module = block.get_submodule(path)
        kind = type(module)
        known = kind.__module__.startswith(("torch.nn.", "transformers."))
        if kind.__name__ != self.projection_class or not known:
            raise CfspError(
                f"{path} is a {kind.__name__}, expected {self.projection_class} "
                "(quantised models and adapters: prune the plain model first)"
            )
        return module  # type: ignore[return-value]

    def group(self, block: nn.Module) -> ChannelGroup:
        """The FFN's channels, read from the shapes of its weights, which may be on meta."""
        axis = self.channels[f"{self.down}.weight"]
        return ChannelGroup(self.projection(block, self.down).weight.shape[axis.dimension])

    def weights(self, parameters: Mapping[str, torch.Tensor]) -> tuple[FFNWeights, ...]:
        """The matrices of every expert (of the FFN itself, where it has none), from a block's
        parameters by name; no copies, unless they are transposed."""
        gate = parameters[f"{self.gate}.weight"] if self.gate is not None else None
        up, down = (parameters[f"{path}.weight"] for path in (self.up, self.down))
        if self.is_transposed:
            up, down = up.T.contiguous(), down.T.contiguous()
        if self.fused:
            gate, up = up.chunk(2)
        return (FFNWeights(gate, up, down),)

    def module(self, block: nn.Module) -> nn.Module:
        """The module that holds the projections."""
        return block.get_submodule(self.down.rpartition(".")[0])

    def gated_activation(self, block: nn.Module) -> str | None:
        """What ``cfsp_kernels.swiglu_statistics`` calls the FFN's activation; None without a gate,
        and where the ``forward`` was replaced: what it computes is then not known."""
        module = self.module(block)
        is_gated = self.gate is not None or self.fused
        if not is_gated or "forward" in module.__dict__:
            return None
        kind = type(getattr(module, self.activation, None))
        names = (op for op, name in FUSED_ACTIVATIONS.items() if type(ACT2FN[name]) is kind)
        return next(names, None)

    def observed(
        self, block: nn.Module, observer: Observer, fused: bool = True
    ) -> AbstractContextManager[None]:
        """While it lasts, each run of the block hands its FFN activation and its statistics over.

        Where the fused op knows the gate's activation, the product and its statistics are made in
        one pass; elsewhere the input of down is read once more. Both give the same numbers.
        """
        down = self.projection(block, self.down)
        activation = self.gated_activation(block) if fused else None
        if activation is None:
            down_forward = down.forward

            def observing(product: torch.Tensor) -> torch.Tensor:
                channel_statistics(product, totals=observer.totals())
                observer.add(product)
                return down_forward(product)

            return forward_instead([down], [observing])
        up_proj = self.projection(block, self.up)
        gate_proj = self.projection(block, self.gate) if self.gate is not None else None

        def forward(hidden_states: torch.Tensor) -> torch.Tensor:
            if gate_proj is None:
                gate, up = up_proj(hidden_states).chunk(2, dim=-1)
            else:
                gate, up = gate_proj(hidden_states), up_proj(hidden_states)
            product, _ = swiglu_statistics(gate, up, activation, totals=observer.totals())
            observer.add(product)
            return down(product)

        return forward_instead([self.module(block)], [forward])

    def cut_(
        self, block: nn.Module, kept: torch.Tensor, compensate: Compensate, room: Room | None
    ) -> None:
        """Cut the FFN of a block in place to ``kept`` channels [experts, width] int64, ascending;
        ``room`` gives the memory of new matrices, None: it is new."""
        room = None if room is in_place else room
        parameters = dict(block.named_parameters())
        (weights,) = self.weights(parameters)
        down, width = f"{self.down}.weight", kept.shape[1]
        out = None
        if room is not None and not self.is_transposed:
            out = room((len(weights.down), width), weights.down.dtype)
        weight, added_bias = compensate(0, weights.down, out)
        if self.is_transposed:
            weight = weight.T.contiguous()
        set_parameter(block, down, parameter(weight, parameters[down]))
        for name, axis in self.channels.items():
            if name == down or name not in parameters:
                continue
            old = parameters[name]
            shape = list(old.shape)
            shape[axis.dimension] = axis.copies * width
            out = room(tuple(shape), old.dtype) if room is not None and len(shape) > 1 else None
            set_parameter(block, name, parameter(axis.cut(old.data, kept[0], out), old))
        set_width(block, down, width)
        if added_bias is not None:
            bias = parameters.get(f"{self.down}.bias")
            total = added_bias if bias is None else bias.data + added_bias
            set_parameter(block, f"{self.down}.bias", parameter(total, parameters[down]))
