"""vLLM's own decoders with an FFN width per block. Only vLLM imports this."""

from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM


def rebuild_ffns(model: Any, widths: list[int], vllm_config: Any) -> None:
    """Make the FFN of every block on this rank anew, of its own class, at its own width."""
    config, quantization = vllm_config.model_config.hf_config, vllm_config.quant_config
    down_bias = bool(config.cfsp_config["added_bias"])
    bias = {"bias": True} if getattr(config, "mlp_bias", False) else {}
    for number in range(model.start_layer, model.end_layer):
        layer, width = model.layers[number], widths[number]
        prefix = layer.mlp.down_proj.prefix.removesuffix(".down_proj")
        layer.mlp = type(layer.mlp)(
            hidden_size=config.hidden_size,
            intermediate_size=width,
            hidden_act=config.hidden_act,
            quant_config=quantization,
            prefix=prefix,
            **bias,
        )
        if down_bias:
            layer.mlp.down_proj = RowParallelLinear(
                width,
                config.hidden_size,
                bias=True,
                quant_config=quantization,
                prefix=f"{prefix}.down_proj",
            )


class PerBlockWidths(nn.Module):
    """Builds the stock model at the smallest width, then gives every block its own."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        widths = [layer.intermediate_size for layer in config.per_layer_config]
        before = config.intermediate_size
        config.intermediate_size = min(widths)  # no room is taken for channels that will go
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        finally:
            config.intermediate_size = before
        rebuild_ffns(self.model, widths, vllm_config)


class CFSPLlamaForCausalLM(PerBlockWidths, LlamaForCausalLM):
    """Llama."""


class CFSPMistralForCausalLM(PerBlockWidths, MistralForCausalLM):
    """Mistral."""


class CFSPQwen2ForCausalLM(PerBlockWidths, Qwen2ForCausalLM):
    """Qwen2."""


class CFSPQwen3ForCausalLM(PerBlockWidths, Qwen3ForCausalLM):
    """Qwen3."""
