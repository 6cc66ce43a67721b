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
from ..models.parts.attention import Attention as AttentionPart
from ..models.parts.expert_removal import TOP_K
from .attention import FP32, Attention, attention_left, attention_of

ATTENTION = ("attn", "attention")
COMPOSED = ("gelu_new", "gelu_fast", "gelu_python", "quick_gelu")
"""Activations made of several operations, each with a result of its own."""


def _is_expert(name: str) -> bool:
    """Whether a parameter belongs to routed experts, of which a token sees a few."""
    return "experts" in name.split(".")


def is_attention(name: str) -> bool:
    return any(word in name for word in ATTENTION)


@dataclass(frozen=True)
class BlockCosts:
    tensors: Tensors
    hidden_size: int
    active_experts: int
    """Experts that a token goes through."""
    composed: bool
    """Whether the activation is one of :data:`COMPOSED`."""
    heads: Attention
    """What its attention has, where it has one."""

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

    def scored_bytes(self, attention: bool) -> int:
        """Of what scorers read: the FFNs', and the ``attention``'s where it is cut too."""
        of_attention = (x.nbytes for name, x in self._matrices.items() if is_attention(name))
        return sum(x.nbytes for x in self.ffn.values()) + (sum(of_attention) if attention else 0)

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
    def attention(self) -> Attention | None:
        """None where nothing is left of it, or there never was one."""
        return self.heads if any(map(is_attention, self._matrices)) else None

    @cached_property
    def attends(self) -> Attention | None:
        """The attention where tokens see each other by scores; linear attention has none."""
        names = (n for n in self._matrices if is_attention(n) and "linear_attn" not in n)
        return self.heads if any(names) else None

    def flops(self, seqlen: int) -> float:
        """FLOPs of one token among ``seqlen``."""
        return self.linear_flops + (self.attends.flops(seqlen) if self.attends else 0.0)

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
        return sum(block.flops(seqlen) for block in self.blocks)

    @property
    def kv_bytes(self) -> int | None:
        """Bytes of a token's keys and values in a cache of all blocks; None: not known, or there
        are none. States of other kinds, of one size for any number of tokens, are not counted."""
        cached = [block.attends.cached for block in self.blocks if block.attends]
        known = [count for count in cached if count is not None]
        return sum(known) * self.itemsize if known and len(known) == len(cached) else None

    def head_flops(self) -> float:
        return 2.0 * self.hidden_size * self.vocab_size

    def flops(self, seqlen: int) -> float:
        """FLOPs of one token through the whole model."""
        return self.block_flops(seqlen) + self.head_flops()

    def working_bytes(self, windows: int, seqlen: int, device: str) -> int:
        """Bytes at the peak of a block's forward call, beside the block and its input: the output
        of the call before, the normalised state and the FFN's residual, or the norm in fp32."""
        state = self.hidden_size * self.itemsize
        heads = {block.attention for block in self.blocks if block.attention}
        own = (each.working_bytes(seqlen, self.itemsize, device) for each in heads)
        attention = 2 * state + max(own, default=0)
        values = max(block.ffn_working_values for block in self.blocks)
        norm = 2 * state + 2 * self.hidden_size * FP32
        return windows * seqlen * max(attention, 3 * state + values * self.itemsize, norm)

    def logits_bytes(self, seqlen: int, rows: int) -> int:
        """Logits of one window, and the fp32 temporaries of the loss over ``rows`` positions."""
        return self.vocab_size * (seqlen * self.itemsize + 2 * min(rows, seqlen) * FP32)


def costs_of(
    config: Any,
    tensors: Tensors,
    blocks: str,
    itemsize: int,
    attention: AttentionPart | None = None,
) -> ModelCosts:
    """The costs of a model with decoder blocks under a path and tied tensors listed once; where its
    ``attention`` is known, heads are those of the tensors, else those of the config."""
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
    eager, own = getattr(config, "_attn_implementation", None) == "eager", text.per_layer_config
    try:
        hidden_size, vocab_size = int(text.hidden_size), int(text.vocab_size)
        heads = {n: attention_of(own[min(n, len(own) - 1)], eager) for n in sorted(grouped)}
    except AttributeError as error:
        raise CfspError(f"{config.model_type}: cannot estimate: {reason(error)}") from None
    if attention is not None:
        heads = {n: attention_left(known, attention, grouped[n]) for n, known in heads.items()}
    composed, parameters = activation in COMPOSED, sum(x.numel for x in tensors.values())
    costs = [
        BlockCosts(grouped[n], hidden_size, active, composed, known) for n, known in heads.items()
    ]
    return ModelCosts(parameters, outer, costs, hidden_size, vocab_size, itemsize)


def model_costs(
    described: Description, tensors: Tensors, itemsize: int | None = None
) -> ModelCosts:
    """:func:`costs_of` a model that holds these tensors: its own, or what is left of them."""
    model, layout = described.model, described.layout
    attention = layout.attention if layout is not None else None
    size = itemsize or model.dtype.itemsize
    return costs_of(model.config, tensors, described.blocks, size, attention)
