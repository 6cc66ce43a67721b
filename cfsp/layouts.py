"""Where an architecture keeps its decoder blocks and their FFN. No other module knows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN

from .errors import CfspError

FUSED_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu2": "relu2",
}
"""Activation of ``cfsp_kernels.swiglu_statistics`` -> its name in transformers."""


@dataclass(frozen=True)
class FFNWeights:
    """The FFN matrices of one block, torch Linear layout. F channels, D hidden size."""

    gate: torch.Tensor | None
    """[F, D], or None where the FFN has no gate."""
    up: torch.Tensor
    """[F, D]."""
    down: torch.Tensor
    """[D, F]."""


@dataclass(frozen=True)
class Layout:
    """Paths of the blocks in a causal LM and of the three projections in a block."""

    family: str
    """Prefix of the transformers classes: Llama for LlamaForCausalLM."""
    blocks: str = "model.layers"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"

    def find_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The decoder blocks of a model, in order."""
        return model.get_submodule(self.blocks)  # type: ignore[return-value]

    def ffn_weights(self, block: nn.Module) -> FFNWeights:
        """The FFN matrices of a block; no copy."""
        return FFNWeights(
            self.projection(block, self.gate).weight,
            self.projection(block, self.up).weight,
            self.projection(block, self.down).weight,
        )

    def projection(self, block: nn.Module, path: str) -> nn.Linear:
        """The Linear at ``path`` in a block. Raises CfspError for any other kind of module."""
        module = block.get_submodule(path)
        if type(module) is not nn.Linear:
            raise CfspError(
                f"{path} is a {type(module).__name__}, expected Linear "
                "(quantised models and adapters: prune the plain model first)"
            )
        return module

    def ffn(self, block: nn.Module) -> nn.Module:
        """The module that holds the three projections."""
        return block.get_submodule(self.down.rpartition(".")[0])

    def gated_activation(self, block: nn.Module) -> str | None:
        """The name that ``cfsp_kernels.swiglu_statistics`` has for the FFN's activation, or None.

        None too where the FFN's ``forward`` was replaced: what it computes is then not known.
        """
        ffn = self.ffn(block)
        if "forward" in ffn.__dict__:
            return None
        kind = type(getattr(ffn, "act_fn", None))
        names = (op for op, name in FUSED_ACTIVATIONS.items() if type(ACT2FN[name]) is kind)
        return next(names, None)

    def intermediate_sizes(self, model: nn.Module) -> tuple[int, ...]:
        """FFN channels of every block, read from the shapes of the weights."""
        blocks = self.find_blocks(model)
        return tuple(self.projection(block, self.down).weight.shape[1] for block in blocks)


LAYOUTS: dict[str, Layout] = {
    "llama": Layout("Llama"),
    "mistral": Layout("Mistral"),
    "qwen2": Layout("Qwen2"),
    "qwen3": Layout("Qwen3"),
    "gemma": Layout("Gemma"),
}
"""``model_type`` of a transformers config -> its layout."""

PRUNED_PREFIX = "cfsp_"
"""A pruned checkpoint with a width of its own per block has this before its ``model_type``."""


def find_layout(model_type: str) -> Layout:
    """The layout of an architecture, pruned or not.

    Raises:
        CfspError: an architecture that is not supported; names it and those that are.
    """
    layout = LAYOUTS.get(model_type.removeprefix(PRUNED_PREFIX))
    if layout is None:
        raise CfspError(f"unsupported architecture {model_type!r}; supported: {', '.join(LAYOUTS)}")
    return layout
