"""What a model costs, from the names and shapes of its parameters: no weights, any architecture.

Matrix products are 2 * parameters per token; of an expert's, only the share that is active. A
parameter belongs to the attention, the router or the FFN by its name and shape, so that
architectures that cannot be pruned are counted too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import CfspError, reason
from ..io.safetensors import TensorInfo, Tensors
from ..models.descriptions import Description
from ..models.layouts import Layout
from ..models.parts.expert_removal import TOP_K

ATTENTION = ("attn", "attention")
COMPOSED = ("gelu_new", "gelu_fast", "gelu_python", "quick_gelu")
"""Activations made of several operations, each with a result of its own."""
FP32 = 4


def _is_expert(name: str) -> bool:
    """Whether a parameter belongs to routed experts, of which a token sees a few."""
    return "experts" in name.split(".")


def is_attention(name: str) -> bool:
    return any(word in name for word in ATTENTION)


@dataclass(frozen=True)
class Attention:
    heads: int
    key_heads: int
    key_size: int
    value_size: int
    eager: bool
    """Whether scores [heads, S, S] lie in memory, by transformers' own attention."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Values of a token's queries, keys and values."""
        keys = self.key_heads * self.key_size
        return self.heads * self.key_size, keys, self.key_heads * self.value_size

    def flops(self, seqlen: int) -> float:
        """FLOPs per token of scores and weighted values; kernels that skip the mask do half."""
        return 2.0 * seqlen * self.heads * (self.key_size + self.value_size)

    def working_bytes(self, seqlen: int, itemsize: int, device: str) -> int:
        """Bytes per token at the peak: while queries or keys are rotated, or with the scores."""
        q, k, v = self.sizes
        rotated = max(4 * q + k + v, 2 * q + 4 * k + v) * itemsize
        if self.eager:
            copies = itemsize + FP32 + (FP32 if itemsize < FP32 else 0)
        elif device == "cpu" and self.key_size != self.value_size:  # which cannot be fused there
            copies = 3 * FP32
        else:
            return rotated
        repeated = (q + 2 * self.heads * max(self.key_size, self.value_size)) * itemsize
        return max(rotated, repeated + (k + v) * itemsize + self.heads * seqlen * copies)


def attention_of(config: Any) -> Attention:
    # Where blocks differ, the last one's heads are largest.
    *_, text = config.get_text_config().per_layer_config
    heads = int(text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    latent = getattr(text, "kv_lora_rank", None) is not None
    key_size = int(getattr(text, "qk_head_dim", None) or size) if latent else size
    value_size = int(getattr(text, "v_head_dim", None) or size) if latent else size
    key_heads = heads if latent else int(getattr(text, "num_key_value_heads", None) or heads)
    eager = getattr(config, "_attn_implementation", None) == "eager"
    return Attention(heads, key_heads, key_size, value_size, eager)


@dataclass(frozen=True)
class BlockCosts:
    tensors: Tensors
    hidden_size: int
    active_experts: int
    """Experts that a token goes through."""
    composed: bool
    """Whether the activation is one of :data:`COMPOSED`."""

    @cached_property
    def _experts(self) -> int:
        names = [name.split(".") for name in self.tensors if _is_expert(name)]
        listed = {part[part.index("experts") + 1] for part in names}
        numbers = sum(number.isdigit() for number in listed)
        stacked = (x.shape[0] for n, x in self.tensors.items() if _is_expert(n) and x.shape)
        return numbers or next(stacked, 0)

    @cached_property
    def _matrices(self) -> dict[str, TensorInfo]:
        return {
            name: info
            for name, info in self.tensors.items()
            if len(info.shape) == 2 or (len(info.shape) == 3 and _is_expert(name))
        }

    @cached_property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def nbytes_but_experts(self) -> int:
        return sum(info.nbytes for name, info in self.tensors.items() if not _is_expert(name))

    @cached_property
    def ffn(self) -> dict[str, TensorInfo]:
        """The matrices that pruning shrinks: those of no attention and no router."""
        return {
            name: info
            for name, info in self._matrices.items()
            if not is_attention(name) and (_is_expert(name) or info.shape[0] != self._experts)
        }

    @cached_property
    def matrix_flops(self) -> dict[str, float]:
        """FLOPs per token of the product with each matrix; of an expert the active share."""
        share = min(1.0, self.active_experts / self._experts) if self._experts else 1.0
        return {
            name: 2.0 * info.numel * (share if _is_expert(name) else 1.0)
            for name, info in self._matrices.items()
        }

    @cached_property
    def linear_flops(self) -> float:
        return sum(self.matrix_flops.values())

    @cached_property
    def has_attention(self) -> bool:
        """Whether tokens see each other by scores; linear attention has none."""
        return any(is_attention(name) and "linear_attn" not in name for name in self.tensors)

    @cached_property
    def ffn_working_values(self) -> int:
        """Values per token at the peak: what enters a matrix or leaves one."""
        dense = routed = widest = 0
        for name, info in self.ffn.items():
            *_, out, into = info.shape
            inner = out if into == self.hidden_size else into
            if not _is_expert(name):
                dense += inner
                widest = max(widest, inner)
            elif len(info.shape) == 3:
                copies = 1 if into == self.hidden_size else 2  # its input, and act(gate)
                routed += copies * inner * self.active_experts
        if self.composed:
            dense += 2 * widest
        if routed:  # tokens sorted by expert, before and after
            sorted_tokens = self.active_experts * self.hidden_size
            routed = sorted_tokens + max(routed, 3 * sorted_tokens)
        return max(dense, routed)


@dataclass(frozen=True)
class ModelCosts:
    parameters: int
    """Tied ones once."""
    outer: Tensors
    """Embeddings, final norm, head: what stays in memory."""
    blocks: Sequence[BlockCosts]
    attention: Attention
    hidden_size: int
    vocab_size: int
    itemsize: int
    """Bytes of a value of the hidden states."""

    @property
    def outer_bytes(self) -> int:
        return sum(info.nbytes for info in self.outer.values())

    @property
    def block_bytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    @property
    def largest_block(self) -> int:
        return max(block.nbytes for block in self.blocks)

    @property
    def ffn_bytes(self) -> int:
        return sum(x.nbytes for block in self.blocks for x in block.ffn.values())

    def block_flops(self, seqlen: int) -> float:
        """FLOPs of one token through all blocks."""
        attending = sum(block.has_attention for block in self.blocks)
        linear = sum(block.linear_flops for block in self.blocks)
        return linear + attending * self.attention.flops(seqlen)

    def head_flops(self) -> float:
        return 2.0 * self.hidden_size * self.vocab_size

    def flops(self, seqlen: int) -> float:
        """FLOPs of one token through the whole model."""
        return self.block_flops(seqlen) + self.head_flops()

    def working_bytes(self, windows: int, seqlen: int, device: str) -> int:
        """Bytes at the peak of a block's forward call, beside the block and its input: the output
        of the call before, the normalised state and the FFN's residual, or the norm in fp32."""
        state = self.hidden_size * self.itemsize
        attention = 2 * state + self.attention.working_bytes(seqlen, self.itemsize, device)
        values = max(block.ffn_working_values for block in self.blocks)
        norm = 2 * state + 2 * self.hidden_size * FP32
        return windows * seqlen * max(attention, 3 * state + values * self.itemsize, norm)

    def logits_bytes(self, seqlen: int, rows: int) -> int:
        """Logits of one window, and the fp32 temporaries of the loss over ``rows`` positions."""
        return self.vocab_size * (seqlen * self.itemsize + 2 * min(rows, seqlen) * FP32)


def costs_of(config: Any, tensors: Tensors, blocks: str, itemsize: int) -> ModelCosts:
    """The costs of a model with decoder blocks under a path and tied tensors listed once."""
    text = config.get_text_config()
    activation = getattr(text, "hidden_act", getattr(text, "activation_function", None))
    active = next((int(n) for k in TOP_K if (n := getattr(text, k, None))), 1)
    layout = Layout(blocks)
    outer: dict[str, TensorInfo] = {}
    grouped: dict[int, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        if place := layout.place_of(name):
            number, within = place
            grouped.setdefault(number, {})[within] = info
        else:
            outer[name] = info
    try:
        hidden_size, vocab_size = int(text.hidden_size), int(text.vocab_size)
        attention = attention_of(config)
    except AttributeError as error:
        raise CfspError(f"{config.model_type}: cannot estimate: {reason(error)}") from None
    composed, parameters = activation in COMPOSED, sum(x.numel for x in tensors.values())
    parts = [part for _, part in sorted(grouped.items())]
    costs = [BlockCosts(part, hidden_size, active, composed) for part in parts]
    return ModelCosts(parameters, outer, costs, attention, hidden_size, vocab_size, itemsize)


def model_costs(
    described: Description, tensors: Tensors, itemsize: int | None = None
) -> ModelCosts:
    """:func:`costs_of` a model that holds these tensors: its own, or what is left of them."""
    model = described.model
    return costs_of(model.config, tensors, described.blocks, itemsize or model.dtype.itemsize)
