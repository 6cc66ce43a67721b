"""A tiny config of every family: what its blocks are made of, at a thousandth of the size."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..conftest import TINY

BLOCKS = TINY["num_hidden_layers"]
FFN = {**TINY, "hidden_size": 32, "intermediate_size": 48, "tie_word_embeddings": False}
EXPERTS = {
    **FFN,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 48,
    "n_shared_experts": 2,
    "num_shared_experts": 2,
    "moe_num_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "num_dense_layers": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
"""Experts, and latent attention."""
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
"""Linear attention by the delta rule, as Qwen has it since 3-Next."""
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_expand": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
PER_LAYER_INPUT = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": TINY["vocab_size"],
}
ROPE_OF_THREE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
"""Positions in time, height and width."""


@dataclass(frozen=True)
class Family:
    """A family as people know it, and a tiny config of it."""

    title: str
    model_type: str
    config: Callable[[], PreTrainedConfig]
    multimodal: bool = False

    def model(self) -> PreTrainedModel:
        """A random one whose blocks all do something."""
        torch.manual_seed(0)
        auto = AutoModelForImageTextToText if self.multimodal else AutoModelForCausalLM
        model = auto.from_config(self.config(), dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0, 0.15)
                elif name.endswith("bias"):
                    parameter.normal_(0, 0.05)
        return model


def sized(model_type: str, values: Mapping[str, Any], **more: Any) -> PreTrainedConfig:
    """A family's config with those of the values that it knows, and ``more``."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    known = {*default.to_dict(), *kind.attribute_map}
    return kind(**{**{k: v for k, v in values.items() if k in known}, **more})


def family(
    title: str, model_type: str, values: Mapping[str, Any] = FFN, *, key: str = "", **more: Any
) -> tuple[str, Family]:
    """(what tests call it, a text model)."""
    return key or model_type, Family(title, model_type, lambda: sized(model_type, values, **more))


def wrapped(
    title: str,
    model_type: str,
    text: str,
    vision: Mapping[str, Any] = VISION,
    values: Mapping[str, Any] = FFN,
    *,
    key: str = "",
    outer: Mapping[str, Any] | None = None,
    **more: Any,
) -> tuple[str, Family]:
    """(what tests call it, a model with a vision tower); ``outer``: of the config that has both."""

    def config() -> PreTrainedConfig:
        return CONFIG_MAPPING[model_type](
            text_config=sized(text, values, **more).to_dict(),
            vision_config=dict(vision),
            **(outer or {}),
        )

    return key or model_type, Family(title, model_type, config, multimodal=True)


def alternating(first: str, second: str) -> list[str]:
    return [first, second] * (BLOCKS // 2)


SLIDING = alternating("sliding_attention", "full_attention")
PLAIN = (
    family("Llama 2, 3", "llama"),
    family("Mistral 7B", "mistral"),
    family("Qwen2, 2.5", "qwen2"),
    family("Qwen3", "qwen3"),
    family("Gemma", "gemma"),
    family("Gemma 2", "gemma2", sliding_window=8),
    family("Gemma 3 1B", "gemma3_text", sliding_window=8, layer_types=SLIDING),
    family(
        "Gemma 3n, text",
        "gemma3n_text",
        **PER_LAYER_INPUT,
        laurel_rank=8,
        num_kv_shared_layers=0,
        intermediate_size=[48] * BLOCKS,
        layer_types=SLIDING,
    ),
    family("Gemma 4, text", "gemma4_text", **PER_LAYER_INPUT, sliding_window=8),
    family("VaultGemma", "vaultgemma"),
    family("OLMo 2", "olmo2"),
    family("OLMo 3", "olmo3", sliding_window=8),
    family("Granite 3", "granite", mlp_bias=True, residual_multiplier=0.5),
    family("Cohere Command R", "cohere"),
    family("Cohere Command R7B", "cohere2", sliding_window=8),
    family("SmolLM3", "smollm3", mlp_bias=True),
    family("StableLM", "stablelm"),
    family("Phi-3, Phi-4", "phi3"),
    family("GLM-4", "glm4"),
    family("Phi-2", "phi"),
    family("StarCoder2", "starcoder2"),
    family("GPT-NeoX, Pythia", "gpt_neox"),
    family("Falcon", "falcon", ffn_hidden_size=48, bias=True),
    family("BLOOM", "bloom"),
    family("OPT", "opt", ffn_dim=48, word_embed_proj_dim=32),
    family("GPT-2", "gpt2", n_inner=48),
    family("Ministral 8B", "ministral"),
    family("Ministral 3, text", "ministral3"),
    family("EXAONE 4", "exaone4"),
    family("ERNIE 4.5", "ernie4_5"),
    family("HunYuan", "hunyuan_v1_dense"),
    family("Seed-OSS", "seed_oss"),
    family("Helium", "helium"),
    family("MiniCPM3", "minicpm3", LATENT),
    family("InternLM3", "internlm3"),
    family("Arcee AFM", "arcee"),
    family("Apertus", "apertus"),
    family("Nemotron 3, 4", "nemotron"),
    family("NanoChat", "nanochat"),
)
MIXTURES = (
    family("Mixtral 8x7B", "mixtral", EXPERTS),
    family("Qwen1.5-MoE, Qwen2-57B-A14B", "qwen2_moe", EXPERTS),
    family("Qwen3-235B-A22B, 30B-A3B", "qwen3_moe", EXPERTS, mlp_only_layers=[1]),
    family("DeepSeek-V2", "deepseek_v2", LATENT),
    family("DeepSeek-V3, R1, Kimi-K2", "deepseek_v3", LATENT),
    family("DeepSeek-V3.2", "deepseek_v32", LATENT, index_n_heads=2, index_head_dim=16),
    family("GLM-4.5, 4.6", "glm4_moe", EXPERTS, partial_rotary_factor=0.5),
    family("GLM-4.7-Flash", "glm4_moe_lite", LATENT),
    family("gpt-oss", "gpt_oss", EXPERTS, intermediate_size=24, sliding_window=8),
    family("Llama 4, text", "llama4_text", EXPERTS, intermediate_size=24, intermediate_size_mlp=48,
           interleave_moe_layer_step=2, moe_layers=[1, 3]),
    family("MiniMax-01", "minimax", EXPERTS, intermediate_size=24,
           layer_types=alternating("linear_attention", "full_attention")),
    family("MiniMax-M2", "minimax_m2", EXPERTS, intermediate_size=24, rotary_dim=8),
    family("OLMoE", "olmoe", EXPERTS, intermediate_size=24),
    family("FlexOlmo", "flex_olmo", EXPERTS, intermediate_size=24),
    family("Phi-3.5-MoE", "phimoe", EXPERTS, intermediate_size=24),
    family("Granite 3 MoE", "granitemoe", EXPERTS, intermediate_size=24),
    family("Granite 3 MoE, shared", "granitemoeshared", EXPERTS, intermediate_size=24,
           shared_intermediate_size=48),
    family("dots.llm1", "dots1", EXPERTS),
    family("ERNIE 4.5 MoE", "ernie4_5_moe", EXPERTS),
    family("EXAONE MoE", "exaone_moe", EXPERTS,
           mlp_layer_types=["dense", *["sparse"] * (BLOCKS - 1)]),
    family("HunYuan-A13B", "hunyuan_v1_moe", EXPERTS, moe_topk=[2] * BLOCKS, num_shared_expert=1),
    family("Trinity (AFMoE)", "afmoe", EXPERTS, sliding_window=8),
    family("LongCat-Flash", "longcat_flash", LATENT, num_layers=2, num_hidden_layers=4,
           ffn_hidden_size=48, expert_ffn_hidden_size=24, zero_expert_num=2, head_dim=8),
)  # fmt: skip
HYBRIDS = (
    family("Qwen3-Next-80B-A3B", "qwen3_next", {**EXPERTS, **DELTA}),
    family("Qwen3.5, text", "qwen3_5_text", {**FFN, **DELTA}),
    family("Qwen3.5-MoE, text", "qwen3_5_moe_text", {**EXPERTS, **DELTA}),
    family("Granite 4, dense", "granitemoehybrid", {**FFN, **MAMBA}, num_local_experts=0,
           shared_intermediate_size=48, layer_types=alternating("mamba", "attention")),
    family("Granite 4, experts", "granitemoehybrid", {**EXPERTS, **MAMBA}, key="granite4_moe",
           intermediate_size=24, shared_intermediate_size=48,
           layer_types=alternating("mamba", "attention")),
    family("Nemotron-H, Nano 2", "nemotron_h", hybrid_override_pattern="M-*-", mamba_num_heads=4,
           mamba_head_dim=8, n_groups=2, ssm_state_size=8),
    family("Falcon-H1", "falcon_h1", {**FFN, **MAMBA}),
    family("Bamba", "bamba", {**FFN, **MAMBA}, attn_layer_indices=[1]),
    family("Jamba", "jamba", EXPERTS, mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1,
           expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False),
    family("LFM2", "lfm2", layer_types=alternating("conv", "full_attention"), block_ff_dim=48,
           block_auto_adjust_ff_dim=False),
    family("LFM2-MoE", "lfm2_moe", EXPERTS, layer_types=alternating("conv", "full_attention")),
    family("Kimi-Linear", "kimi_linear", LATENT, linear_head_dim=8, linear_num_heads=2,
           layer_types=alternating("linear_attention", "full_attention")),
)  # fmt: skip
PIXTRAL = {"model_type": "pixtral", **VISION, "head_dim": 16}
DEEPSTACK = {**QWEN_VISION, "deepstack_visual_indexes": [0]}
MULTIMODAL = (
    wrapped("Qwen2.5-VL", "qwen2_5_vl", "qwen2_5_vl_text", QWEN_VISION,
            rope_parameters=ROPE_OF_THREE),
    wrapped("Qwen3-VL", "qwen3_vl", "qwen3_vl_text", DEEPSTACK),
    wrapped("Qwen3-VL-MoE", "qwen3_vl_moe", "qwen3_vl_moe_text", DEEPSTACK, EXPERTS),
    wrapped("Qwen3.5", "qwen3_5", "qwen3_5_text", DEEPSTACK, {**FFN, **DELTA}),
    wrapped("Qwen3.5-MoE", "qwen3_5_moe", "qwen3_5_moe_text", DEEPSTACK, {**EXPERTS, **DELTA}),
    wrapped("Gemma 3 4B and larger", "gemma3", "gemma3_text", sliding_window=8,
            layer_types=SLIDING, outer={"mm_tokens_per_image": 4}),
    wrapped("Gemma 4", "gemma4", "gemma4_text", **PER_LAYER_INPUT, sliding_window=8),
    wrapped("Mistral Small 3.1 and 3.2", "mistral3", "mistral", PIXTRAL),
    wrapped("Mistral Small 4", "mistral3", "mistral4", PIXTRAL, LATENT, key="mistral4",
            head_dim=16),
    wrapped("GLM-4.1V", "glm4v", "glm4v_text", QWEN_VISION, rope_parameters=ROPE_OF_THREE),
    wrapped("GLM-4.5V, 4.6V", "glm4v_moe", "glm4v_moe_text", QWEN_VISION, EXPERTS,
            rope_parameters=ROPE_OF_THREE, partial_rotary_factor=1.0),
    wrapped("Llama 4", "llama4", "llama4_text",
            {**VISION, "vision_output_dim": 32, "projector_input_dim": 32,
             "projector_output_dim": 32, "pixel_shuffle_ratio": 0.5},
            EXPERTS, intermediate_size=24, intermediate_size_mlp=48, moe_layers=[1, 3]),
    wrapped("LLaVA 1.5", "llava", "llama", {"model_type": "clip_vision_model", **VISION}),
    wrapped("InternVL 3", "internvl", "qwen2", {**VISION, "image_size": [28, 28],
                                                "patch_size": [14, 14]}),
)  # fmt: skip
FAMILIES: dict[str, Family] = dict((*PLAIN, *MIXTURES, *HYBRIDS, *MULTIMODAL))
