# SPDX-License-Identifier: Apache-2.0
"""Decoders whose FFN has a width of its own in every block.

Self-contained: this file lies beside the weights of a pruned model, so that
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` loads it anywhere, and it
is the module that the package ``cfsp`` registers with transformers.

``config.json`` carries the widths in transformers' own ``per_layer_config``, and under
``cfsp_config`` whether the down projections have a bias that the architecture has not.
"""

import copy

from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GemmaModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)


def rebuild_ffns(decoder, config):
    """Make every block's FFN anew, of its own class, at the width that ``config`` gives it."""
    with_bias = (getattr(config, "cfsp_config", None) or {}).get("down_proj_bias", False)
    for layer, layer_config in zip(decoder.layers, config.per_layer_config, strict=True):
        width = layer_config.intermediate_size
        one_width = copy.copy(config)
        one_width.per_layer_config = None
        one_width.intermediate_size = width
        layer.mlp = type(layer.mlp)(one_width)
        if with_bias and layer.mlp.down_proj.bias is None:
            layer.mlp.down_proj = nn.Linear(width, config.hidden_size, bias=True)


class PerBlockWidths:
    """Builds the stock model, then gives every block its own FFN width."""

    def __init__(self, config, *args, **kwargs):
        # The stock constructor reads one intermediate_size for all blocks; it is replaced below.
        config.allow_global_per_layer_attribute_access = True
        super().__init__(config, *args, **kwargs)
        rebuild_ffns(self.base_model, config)
        self.post_init()


class CFSPLlamaConfig(LlamaConfig):
    model_type = "cfsp_llama"


class CFSPLlamaModel(PerBlockWidths, LlamaModel):
    config_class = CFSPLlamaConfig


class CFSPLlamaForCausalLM(PerBlockWidths, LlamaForCausalLM):
    config_class = CFSPLlamaConfig


class CFSPMistralConfig(MistralConfig):
    model_type = "cfsp_mistral"


class CFSPMistralModel(PerBlockWidths, MistralModel):
    config_class = CFSPMistralConfig


class CFSPMistralForCausalLM(PerBlockWidths, MistralForCausalLM):
    config_class = CFSPMistralConfig


class CFSPQwen2Config(Qwen2Config):
    model_type = "cfsp_qwen2"


class CFSPQwen2Model(PerBlockWidths, Qwen2Model):
    config_class = CFSPQwen2Config


class CFSPQwen2ForCausalLM(PerBlockWidths, Qwen2ForCausalLM):
    config_class = CFSPQwen2Config


class CFSPQwen3Config(Qwen3Config):
    model_type = "cfsp_qwen3"


class CFSPQwen3Model(PerBlockWidths, Qwen3Model):
    config_class = CFSPQwen3Config


class CFSPQwen3ForCausalLM(PerBlockWidths, Qwen3ForCausalLM):
    config_class = CFSPQwen3Config


class CFSPGemmaConfig(GemmaConfig):
    model_type = "cfsp_gemma"


class CFSPGemmaModel(PerBlockWidths, GemmaModel):
    config_class = CFSPGemmaConfig


class CFSPGemmaForCausalLM(PerBlockWidths, GemmaForCausalLM):
    config_class = CFSPGemmaConfig
