"""vLLM's own decoders with an FFN width per block. Only vLLM imports this."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear

from ..vllm_plugin import NATIVE_FAMILIES
from .modeling_cfsp import PREFIX

WIDTHS = ("intermediate_size", "moe_intermediate_size")
"""What configs call the width of an FFN, and of an expert."""


@contextmanager
def of_all_blocks(config: Any, widths: dict[str, int]) -> Iterator[None]:
    """Have a config say these widths, whatever the block."""
    before = {name: getattr(config, name) for name in widths}
    try:
        for name, width in widths.items():
            setattr(config, name, width)
        yield
    finally:
        for name, width in before.items():
            setattr(config, name, width)


def rebuild_ffns(decoder: Any, vllm_config: Any) -> None:
    """Make the FFN of every block on this rank anew, of its own class, at its own width."""
    config = vllm_config.model_config.hf_text_config
    for number in range(decoder.start_layer, decoder.end_layer):
        layer, sizes = decoder.layers[number], config.per_layer_config[number]
        linear = next(part for part in layer.mlp.modules() if isinstance(part, LinearBase))
        prefix = linear.prefix.rpartition(".")[0]
        if hasattr(layer.mlp, "experts"):
            forget(f"{prefix}.experts", vllm_config)
            with of_all_blocks(config, {WIDTHS[1]: sizes.moe_intermediate_size}):
                layer.mlp = type(layer.mlp)(vllm_config=vllm_config, prefix=prefix)
        else:
            layer.mlp = dense_ffn(type(layer.mlp), sizes.intermediate_size, prefix, vllm_config)


def forget(prefix: str, vllm_config: Any) -> None:
    """Have vLLM know no experts of this name, which it does not let be made twice."""
    known = vllm_config.compilation_config
    del known.static_forward_context[prefix]
    known.static_all_moe_layers.remove(prefix)


def dense_ffn(kind: Any, width: int, prefix: str, vllm_config: Any) -> Any:
    """An FFN of a class of vLLM, with a bias on its down projection where pruning added one."""
    config, quantization = vllm_config.model_config.hf_text_config, vllm_config.quant_config
    mlp = kind(
        hidden_size=config.hidden_size,
        intermediate_size=width,
        hidden_act=config.hidden_act,
        quant_config=quantization,
        prefix=prefix,
        **({"bias": True} if getattr(config, "mlp_bias", False) else {}),
    )
    if config.cfsp_config["added_bias"]:
        mlp.down_proj = RowParallelLinear(
            width,
            config.hidden_size,
            bias=True,
            quant_config=quantization,
            prefix=f"{prefix}.down_proj",
        )
    return mlp


class PerBlockWidths(nn.Module):
    """Builds the stock model at the smallest widths, then gives every block its own."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_text_config
        smallest = {
            name: min(getattr(layer, name) for layer in config.per_layer_config)
            for name in WIDTHS
            if hasattr(config, name)
        }
        with of_all_blocks(config, smallest):  # no room is taken for channels that will go
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        decoder: Any = getattr(self, "language_model", self).model
        rebuild_ffns(decoder, vllm_config)
        if hasattr(self, "moe_layers"):
            blocks = decoder.layers[decoder.start_layer : decoder.end_layer]
            self.moe_layers = [b.mlp.experts for b in blocks if hasattr(b.mlp, "experts")]


def __getattr__(name: str) -> type:
    """The class of vLLM of the same name without the prefix, with per-block widths. Made when vLLM
    asks for it: the modules of some need packages that others do without."""
    families = {f"{PREFIX}{stock}": (family, stock) for family, stock in NATIVE_FAMILIES.items()}
    if name not in families:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    family, stock = families[name]
    base = getattr(import_module(f"vllm.model_executor.models.{family}"), stock)
    own = globals()[name] = type(name, (PerBlockWidths, base), {"__module__": __name__})
    return own
