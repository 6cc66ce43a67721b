"""What the attention of a block costs: FLOPs, working memory, values in a cache."""

from dataclasses import dataclass
from typing import Any

from ..io.safetensors import Tensors
from ..models.parts.attention import Attention as AttentionPart

FP32 = 4


@dataclass(frozen=True)
class Attention:
    """The attention of one block."""

    heads: int
    key_heads: int
    key_size: int
    value_size: int
    eager: bool
    """Whether scores [heads, S, S] lie in memory, by transformers' own attention."""
    caches: bool = True
    """Whether keys and values are what a cache holds: not so where they are made of a smaller
    latent, or are those of another block."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Values of a token's queries, keys and values."""
        keys = self.key_heads * self.key_size
        return self.heads * self.key_size, keys, self.key_heads * self.value_size

    def flops(self, seqlen: int) -> float:
        """FLOPs per token of scores and weighted values of ``seqlen`` keys, their cache included;
        kernels that skip the mask do half."""
        return 2.0 * seqlen * self.heads * (self.key_size + self.value_size)

    @property
    def cached(self) -> int | None:
        """Values of a token in the cache, in or out of a sliding window; None: not known."""
        return sum(self.sizes[1:]) if self.caches else None

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


def attention_of(text: Any, eager: bool) -> Attention:
    """As the config of a block says; AttributeError where it says nothing of heads."""
    heads = int(text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    latent = getattr(text, "kv_lora_rank", None) is not None
    key_size = int(getattr(text, "qk_head_dim", None) or size) if latent else size
    value_size = int(getattr(text, "v_head_dim", None) or size) if latent else size
    keys = (getattr(text, name, None) for name in ("num_key_value_heads", "num_kv_heads"))
    key_heads = next((int(count) for count in keys if count), heads)
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        key_heads = 1
    shared = getattr(text, "num_kv_shared_layers", 0)
    caches = not latent and not shared
    return Attention(heads, heads if latent else key_heads, key_size, value_size, eager, caches)


def attention_left(known: Attention, part: AttentionPart, tensors: Tensors) -> Attention:
    """With the heads that the shapes of a block's tensors say."""
    down = f"{part.down}.weight"
    if down not in tensors:
        return known
    axis = part.channels[down]
    count = axis.count(tensors[down].shape[axis.dimension])
    size = part.head_size
    return Attention(count * part.heads, count * part.keys or 1, size, size, known.eager)
