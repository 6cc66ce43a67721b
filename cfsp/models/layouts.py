"""Where an architecture keeps its decoder blocks and their FFNs. No other module knows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import CfspError
from .parts.attention import Attention
from .parts.channels import PartWeights, Units
from .parts.expert_removal import FewerExperts
from .parts.experts import ExpertsFFN
from .parts.ffn import FFN
from .parts.part import Part


@dataclass(frozen=True)
class Layout:
    """Paths of the blocks in a causal LM and of the parts that a block may have."""

    blocks: str = "model.layers"
    ffns: tuple[FFN, ...] = (FFN(),)
    attention: Attention | None = None
    """Where KV groups are units too."""

    def find_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The decoder blocks of a model, in order."""
        return model.get_submodule(self.blocks)  # type: ignore[return-value]

    def prefix(self, number: int) -> str:
        """What the names of a block's parameters begin with in the model."""
        return f"{self.blocks}.{number}."

    def place_of(self, name: str) -> tuple[int, str] | None:
        """(number of the block, name in it) of a parameter of the model; None outside blocks."""
        inside = name.removeprefix(f"{self.blocks}.")
        if inside == name:
            return None
        number, _, within = inside.partition(".")
        return int(number), within

    def number_of(self, name: str) -> int | None:
        """The block that a parameter of the model is in; None outside blocks."""
        place = self.place_of(name)
        return None if place is None else place[0]

    def parts_of(self, model: nn.Module) -> Iterator[tuple[int, nn.Module, Part]]:
        """(number of the block, block, part) of every part of a model, in order."""
        for number, block in enumerate(self.find_blocks(model)):
            for part in self.block_parts(block):
                yield number, block, part

    def block_parts(self, block: nn.Module) -> tuple[Part, ...]:
        """The parts that a block has, perhaps none, the attention last; its columns are theirs, one
        after the other."""
        attention = self.attention
        names = {name for name, _ in block.named_parameters()} if attention is not None else set()
        found = attention is not None and names.issuperset(attention.weight_names)
        return (*self.block_ffns(block), *((attention,) if attention and found else ()))

    def block_ffns(self, block: nn.Module) -> tuple[FFN, ...]:
        """The FFNs that a block has, perhaps none. Raises CfspError where the modules are there and
        their weights are not."""
        names = {name for name, _ in block.named_parameters()}
        found = tuple(ffn for ffn in self.ffns if names.issuperset(ffn.weight_names))
        modules = {name for name, _ in block.named_modules()}
        if not found and (known := [ffn.down for ffn in self.ffns if ffn.down in modules]):
            raise CfspError(
                f"no FFN in {type(block).__name__}: expected the weights of {', '.join(known)} "
                "(quantised models and adapters: prune the plain model first)"
            )
        return found

    @property
    def fewer_experts(self) -> FewerExperts | None:
        """What the routed experts of every block are cut to; None where they all stay."""
        return next((ffn.fewer for ffn in self.ffns if isinstance(ffn, ExpertsFFN)), None)

    def units(self, block: nn.Module) -> tuple[Units, ...]:
        """The units of each part of a block, read from the shapes of its weights."""
        return tuple(part.units(block) for part in self.block_parts(block))

    def part_weights(
        self, block: nn.Module, parameters: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[PartWeights, ...]:
        """The matrices of every part of a block, of every expert of each; ``parameters``: by name,
        where the block itself is without values."""
        if parameters is None:
            parameters = dict(block.named_parameters())
        return tuple(
            weights for part in self.block_parts(block) for weights in part.weights(parameters)
        )

    def weight_names(self, block: nn.Module) -> tuple[str, ...]:
        """Names of a block's FFN matrices."""
        return tuple(name for ffn in self.block_parts(block) for name in ffn.weight_names)

    def intermediate_sizes(self, model: nn.Module) -> tuple[int, ...]:
        """FFN channels of every block, in all its FFNs and experts."""
        return tuple(
            sum(ffn.units(block).total for ffn in self.block_ffns(block))
            for block in self.find_blocks(model)
        )

    def columns(self, model: nn.Module) -> tuple[int, ...]:
        """Columns of every block, in all its parts: what statistics are of."""
        return tuple(
            sum(own.total for own in self.units(block)) for block in self.find_blocks(model)
        )


def _ungated(
    blocks: str, up: str, down: str, width: str = "intermediate_size", linear: str = "Linear"
) -> Layout:
    return Layout(blocks, (FFN(up, down, gate=None, width=width, projection_class=linear),))


GATED = Layout()
FUSED = Layout(ffns=(FFN("mlp.gate_up_proj", gate=None, activation="activation_fn", fused=True),))
SHARED = FFN(
    "mlp.shared_experts.up_proj",
    "mlp.shared_experts.down_proj",
    "mlp.shared_experts.gate_proj",
    width="shared_intermediate_size",
)
H_TO_4H = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")

LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), GATED
    ),
    **dict.fromkeys(("olmo2", "granite", "cohere2", "smollm3", "stablelm"), GATED),
    **dict.fromkeys(("phi3", "glm4"), FUSED),
    "phi": _ungated("model.layers", "mlp.fc1", "mlp.fc2"),
    "starcoder2": _ungated("model.layers", "mlp.c_fc", "mlp.c_proj"),
    "gpt_neox": _ungated("gpt_neox.layers", *H_TO_4H),
    "falcon": _ungated("transformer.h", *H_TO_4H, "ffn_hidden_size", "FalconLinear"),
    "bloom": _ungated("transformer.h", *H_TO_4H),
    "opt": _ungated("model.decoder.layers", "fc1", "fc2", "ffn_dim"),
    "mixtral": Layout(ffns=(ExpertsFFN(width="intermediate_size"),)),
    "qwen3_moe": Layout(ffns=(ExpertsFFN(), FFN())),
    "deepseek_v3": Layout(ffns=(ExpertsFFN(), SHARED, FFN())),
    "gpt2": _ungated("transformer.h", "mlp.c_fc", "mlp.c_proj", "n_inner", "Conv1D"),
}
"""``model_type`` of a transformers config -> its layout."""

TEXT_PARTS: dict[str, Layout] = dict.fromkeys(("glm4v_text", "glm_ocr_text"), FUSED)
"""The same of text decoders that only multimodal models have; their blocks are at other paths."""

PRUNED_PREFIX = "cfsp_"
"""A pruned checkpoint with a width of its own per block has this before its ``model_type``."""

TUPLE_BLOCKS = frozenset(
    {
        "BambaDecoderLayer",
        "BloomBlock",
        "FalconDecoderLayer",
        "FalconH1DecoderLayer",
        "GPTNeoBlock",
        "GPTNeoXJapaneseLayer",
    }
)
"""Classes of blocks that return their hidden states in a tuple, perhaps with attention weights."""


def known_layout(model_type: str) -> Layout | None:
    """The layout that is written down here for an architecture, pruned or not."""
    return {**LAYOUTS, **TEXT_PARTS}.get(model_type.removeprefix(PRUNED_PREFIX))


def text_decoder(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """(path, module) of what decodes text in a model: its base model, or the part of a multimodal
    one that is built of the config's text config."""
    text = model.config.get_text_config()
    if text is model.config:
        return (model.base_model_prefix if model.base_model is not model else ""), model.base_model
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module.config is text:
            return name, module
    raise unsupported(model.config.model_type, "it is multimodal, with no text decoder of its own")


def unsupported(model_type: str, reason: str = "") -> CfspError:
    """The error for an architecture that cannot be pruned: why, and which can."""
    why = f": {reason}" if reason else ""
    return CfspError(
        f"unsupported architecture {model_type!r}{why}; supported: {', '.join(LAYOUTS)}, and any "
        "whose blocks have one FFN of two or three Linear, experts in 3-D parameters, or none"
    )


def as_block_output(block: nn.Module, hidden_states: torch.Tensor) -> Any:
    """Hidden states in the form in which a block of this class returns them."""
    return (hidden_states, None) if type(block).__name__ in TUPLE_BLOCKS else hidden_states


def pass_on(block: nn.Module, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
    """A run of a block that does nothing."""
    return as_block_output(block, hidden_states)


def hidden_states_of(output: Any) -> torch.Tensor:
    """The hidden states in what a block returned."""
    return output[0] if isinstance(output, tuple) else output
