"""vLLM's own decoders with blocks of different sizes. Only vLLM imports this."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from inspect import getclosurevars
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import RowParallelLinear

from ..errors import CfspError
from ..vllm_plugin import NATIVE_FAMILIES
from .modeling_cfsp import PREFIX, sizes_of

MAKERS = {"mistral": "llama", "qwen3": "qwen2", "qwen3_vl": "qwen2"}
"""The module of vLLM that makes a family's blocks, where it is not the family's own."""


class Nothing(nn.Module):
    """In the place of an attention or FFN that is gone: adds nothing."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


@contextmanager
def temporarily(thing: Any, values: dict[str, Any]) -> Iterator[None]:
    """Have a config or module say these values."""
    before = {name: getattr(thing, name) for name in values}
    try:
        for name, value in values.items():
            setattr(thing, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(thing, name, value)


def make_blocks(
    stock: Callable[..., Any],
    vllm_config: Any,
    count: int,
    make_block: Callable[..., nn.Module],
    prefix: str,
) -> Any:
    """vLLM's ``make_layers``, but while a block is made the config says that block's sizes."""
    held = getclosurevars(make_block).nonlocals  # of a multimodal model it is a copy of the text's
    config = held.get("config", vllm_config.model_config.hf_text_config)
    settings = config.cfsp_config
    names = {name for name, *_ in sizes_of(settings).values()}
    names |= {name for name in settings.get("heads", ()) if name}

    def make_own(prefix: str) -> nn.Module:
        own = config.per_layer_config[int(prefix.rpartition(".")[2])]
        if config.model_type.endswith("qwen2") and (
            own.num_attention_heads != config.num_attention_heads
        ):
            raise CfspError("vLLM's Qwen2 has no heads per block; run the folder in transformers")
        with temporarily(config, {name: getattr(own, name) for name in names}):
            block = make_block(prefix=prefix)
        for path in settings["added_bias"]:
            if path in dict(block.named_modules()):
                block.set_submodule(path, with_bias(block.get_submodule(path)))
        for kind in getattr(own, "skip", None) or ():
            forget(f"{prefix}.{settings[kind]}.", vllm_config.compilation_config)
            block.set_submodule(settings[kind], Nothing())
        return block

    return stock(count, make_own, prefix)


def with_bias(linear: Any) -> nn.Module:
    """The same projection, with a bias that its class has no argument for."""
    return RowParallelLinear(
        linear.input_size,
        linear.output_size,
        bias=True,
        quant_config=linear.quant_config,
        prefix=linear.prefix,
    )


def forget(prefix: str, known: Any) -> None:
    """Have vLLM keep no KV cache, and know no experts, of modules whose names begin so."""
    for name in [name for name in known.static_forward_context if name.startswith(prefix)]:
        del known.static_forward_context[name]
        if name in known.static_all_moe_layers:
            known.static_all_moe_layers.remove(name)


class PerBlockSizes(nn.Module):
    """Builds the stock model, each block at its own sizes."""

    makes_blocks: Any
    """The module of vLLM that does."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        maker = self.makes_blocks
        own = partial(make_blocks, maker.make_layers, vllm_config)
        with temporarily(maker, {"make_layers": own}):
            super().__init__(vllm_config=vllm_config, prefix=prefix)


def __getattr__(name: str) -> type:
    """The class of vLLM of the same name without the prefix, with per-block sizes. Made when vLLM
    asks for it: the modules of some need packages that others do without."""
    families = {f"{PREFIX}{stock}": (family, stock) for family, stock in NATIVE_FAMILIES.items()}
    if name not in families:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    family, stock = families[name]
    names = (family, MAKERS.get(family, family))
    module, maker = (import_module(f"vllm.model_executor.models.{of}") for of in names)
    values = {"__module__": __name__, "makes_blocks": maker}
    own = globals()[name] = type(name, (PerBlockSizes, getattr(module, stock)), values)
    return own
