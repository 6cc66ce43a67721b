"""The FFN of a block: where its channels lie in the weights, how it is observed, how it is cut."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers.activations import ACT2FN

from cfsp_kernels import swiglu_statistics

from ..modeling_cfsp import set_width
from ..surgery import forward_instead
from .channels import Observer, PartWeights, UnitAxis
from .part import Part

FUSED_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu2": "relu2",
}
"""Activation of ``cfsp_kernels.swiglu_statistics`` -> its name in transformers."""


@dataclass(frozen=True)
class FFN(Part):
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
    fused: bool = False
    """Whether gate and up are one projection [2F, D], at ``up``, gate first."""
    skipped_as: ClassVar[str] = "mlp"

    @property
    def path(self) -> str:  # type: ignore[override]
        return self.down.rpartition(".")[0]

    @property
    def channels(self) -> dict[str, UnitAxis]:
        sections = (1, 1) if self.fused else (1,)
        found = {}
        for path in (self.gate, self.up):
            if path is not None:
                found[f"{path}.weight"] = UnitAxis(int(self.is_transposed), sections)
                found[f"{path}.bias"] = UnitAxis(0, sections)
        return {**found, f"{self.down}.weight": UnitAxis(int(not self.is_transposed))}

    @property
    def count_name(self) -> str:
        return self.width

    def set_count(self, block: nn.Module, count: int) -> None:
        set_width(block, f"{self.down}.weight", count)

    def weights(self, parameters: Mapping[str, torch.Tensor]) -> tuple[PartWeights, ...]:
        gate = parameters[f"{self.gate}.weight"] if self.gate is not None else None
        up, down = (parameters[f"{path}.weight"] for path in (self.up, self.down))
        if self.is_transposed:
            up, down = up.T.contiguous(), down.T.contiguous()
        if self.fused:
            gate, up = up.chunk(2)
        return (PartWeights(gate, up, down),)

    def module(self, block: nn.Module) -> nn.Module:
        """The module that holds the projections."""
        return block.get_submodule(self.path)

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
        activation = self.gated_activation(block) if fused else None
        if activation is None:
            return super().observed(block, observer)
        down = self.projection(block, self.down)
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
