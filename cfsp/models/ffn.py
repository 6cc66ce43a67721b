"""The FFN of a block: where its channels lie in the weights, how it is observed, how it is cut."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN

from cfsp_kernels import channel_statistics, swiglu_statistics

from ..errors import CfspError
from ..io.safetensors import Room
from .channels import ChannelAxis, ChannelGroup, Compensate, FFNWeights, Observer
from .modeling_cfsp import set_parameter, set_width
from .surgery import forward_instead, parameter

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
    def is_gated(self) -> bool:
        """Whether the up projection's output is multiplied by the activation of a gate's."""
        return self.gate is not None or self.fused

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

    def is_in(self, block: nn.Module) -> bool:
        """Whether a block has this FFN."""
        parameters = {name for name, _ in block.named_parameters()}
        return parameters.issuperset(self.weight_names)

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
        """The matrices of every expert (of the FFN itself, where it has none); no copies, unless
        they are transposed.

        ``parameters`` are those of a block by name, at least the ones in ``weight_names``.
        """
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
        """The name that ``cfsp_kernels.swiglu_statistics`` has for the FFN's activation, or None.

        None too without a gate, and where the ``forward`` of the FFN was replaced: what it
        computes is then not known.
        """
        module = self.module(block)
        if not self.is_gated or "forward" in module.__dict__:
            return None
        kind = type(getattr(module, self.activation, None))
        names = (op for op, name in FUSED_ACTIVATIONS.items() if type(ACT2FN[name]) is kind)
        return next(names, None)

    def gate_and_up(
        self, block: nn.Module
    ) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """x [..., D] -> gate(x), up(x), [..., F] each. For an FFN with a gate."""
        up = self.projection(block, self.up)
        if self.fused:
            return lambda x: up(x).chunk(2, dim=-1)
        if self.gate is None:
            raise ValueError("an FFN without a gate")
        gate = self.projection(block, self.gate)
        return lambda x: (gate(x), up(x))

    @contextmanager
    def _hooked(self, block: nn.Module, observer: Observer) -> Iterator[None]:
        def observe(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            channel_statistics(args[0], totals=observer.totals())
            observer.add(args[0])

        hook = self.projection(block, self.down).register_forward_pre_hook(observe)
        try:
            yield
        finally:
            hook.remove()

    def observed(
        self, block: nn.Module, observer: Observer, fused: bool = True
    ) -> AbstractContextManager[None]:
        """While it lasts, each run of the block hands its FFN activation and its statistics over.

        Where the FFN is gated by an activation that the fused op knows, the product and its
        statistics are made in one pass; elsewhere the input of down is read once more. Both
        round where the model does and give the same numbers.
        """
        activation = self.gated_activation(block) if fused else None
        if activation is None:
            return self._hooked(block, observer)
        gate_and_up, down = self.gate_and_up(block), self.projection(block, self.down)

        def forward(hidden_states: torch.Tensor) -> torch.Tensor:
            gate, up = gate_and_up(hidden_states)
            product, _ = swiglu_statistics(gate, up, activation, totals=observer.totals())
            observer.add(product)
            return down(product)

        return forward_instead([self.module(block)], [forward])

    def cut_(
        self, block: nn.Module, kept: torch.Tensor, compensate: Compensate, room: Room | None
    ) -> None:
        """Cut the FFN of a block in place to ``kept`` channels [experts, width] int64, ascending.

        ``compensate`` gives the new down projections, ``room`` the memory of the new matrices;
        None: it is new.
        """
        parameters = dict(block.named_parameters())
        down, width = f"{self.down}.weight", kept.shape[1]
        weight, added_bias = self._new_down(parameters, width, compensate, room)
        for name, axis in self.channels.items():
            old = parameters.get(name)
            if old is None:
                continue
            new = weight
            if name != down:
                shape = list(old.shape)
                shape[axis.dimension] = axis.copies * width
                out = room(tuple(shape), old.dtype) if room is not None and len(shape) > 1 else None
                new = axis.cut(old.data, kept[0], out)
            set_parameter(block, name, parameter(new, old))
        set_width(block, down, width)
        if added_bias is not None:
            bias = parameters.get(f"{self.down}.bias")
            total = added_bias if bias is None else bias.data + added_bias
            set_parameter(block, f"{self.down}.bias", parameter(total, parameters[down]))

    def _new_down(
        self,
        parameters: Mapping[str, torch.Tensor],
        width: int,
        compensate: Compensate,
        room: Room | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and added bias of the new down projection, as its module keeps them."""
        (weights,) = self.weights(parameters)
        hidden, dtype = len(weights.down), weights.down.dtype
        if not self.is_transposed:
            out = room((hidden, width), dtype) if room is not None else None
            return compensate(0, weights.down, out)
        weight, bias = compensate(0, weights.down, None)
        shape = (width, hidden)
        place = room(shape, dtype) if room is not None else weight.new_empty(shape)
        return place.copy_(weight.T), bias
