"""Tiny models of many families cut to other KV groups in every block, and the masked ones."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from cfsp.checkpoints.folder import write_model
from cfsp.models.blocks import LiveBlocks
from cfsp.models.detection.attention import with_attention
from cfsp.models.detection.trial import checked_layout
from cfsp.models.layouts import Layout
from cfsp.models.opening import OpenModel
from cfsp.models.parts.attention import Attention
from cfsp.models.parts.channels import CutDown
from cfsp.models.pruned_classes import become_pruned_

from ..families.tiny import (
    DEEPSTACK,
    DELTA,
    EXPERTS,
    FFN,
    LATENT,
    MAMBA,
    PER_LAYER_INPUT,
    PIXTRAL,
    SLIDING,
    Family,
    alternating,
    family,
    wrapped,
)

FOUR = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
"""Groups, of two query heads each."""
WIDE, WIDE_EXPERTS = {**FFN, **FOUR}, {**EXPERTS, **FOUR}
LINEAR = alternating("linear_attention", "full_attention")
ALIKE = """llama mistral ministral ministral3 qwen2 qwen3 gemma gemma2 gemma3_text vaultgemma
    granite smollm3 cohere2 helium ernie4_5 glm4 starcoder2 hunyuan_v1_dense exaone4 seed_oss phi3
    stablelm gpt_neox nemotron internlm3"""
CASES: dict[str, Family] = dict(
    (
        *(family("", name, WIDE) for name in ALIKE.split() if name in CONFIG_MAPPING),
        family("", "cohere", WIDE, use_qk_norm=True),
        family("", "opt", WIDE, ffn_dim=48, word_embed_proj_dim=64),
        family("", "gpt2", WIDE, n_inner=48),
        family("", "falcon", WIDE, ffn_hidden_size=48, bias=True),
        family("", "falcon", WIDE, key="falcon-new", new_decoder_architecture=True, num_kv_heads=4,
               ffn_hidden_size=48, num_ln_in_parallel_attn=2),
        family("", "llama", WIDE, key="multi-query", num_key_value_heads=1),
        family("", "phi3", WIDE, key="phi3-multi-query", num_key_value_heads=1),
        family("", "mixtral", WIDE_EXPERTS),
        family("", "qwen3_moe", WIDE_EXPERTS, mlp_only_layers=[1]),
        family("", "gpt_oss", WIDE_EXPERTS, intermediate_size=24, sliding_window=8),
        family("", "afmoe", WIDE_EXPERTS, sliding_window=8),
        family("", "lfm2", WIDE, layer_types=alternating("conv", "full_attention"),
               block_ff_dim=48, block_auto_adjust_ff_dim=False),
        family("", "qwen3_next", {**WIDE_EXPERTS, **DELTA}, layer_types=LINEAR),
        family("", "qwen3_5_text", {**WIDE, **DELTA}, layer_types=LINEAR),
        family("", "jamba", WIDE_EXPERTS, mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1,
               expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False),
        family("", "granitemoehybrid", {**WIDE, **MAMBA}, mamba_d_head=16, num_local_experts=0,
               shared_intermediate_size=48, layer_types=alternating("mamba", "attention")),
        family("", "nemotron_h", WIDE, hybrid_override_pattern="*M*-", mamba_num_heads=4,
               mamba_head_dim=8, n_groups=2, ssm_state_size=8),
        wrapped("", "gemma3", "gemma3_text", values=WIDE, sliding_window=8, layer_types=SLIDING,
                outer={"mm_tokens_per_image": 4}),
        wrapped("", "qwen3_vl", "qwen3_vl_text", {**DEEPSTACK, "out_hidden_size": 64}, WIDE),
        wrapped("", "mistral3", "mistral", PIXTRAL, WIDE),
    )
)  # fmt: skip
REFUSED: dict[str, tuple[Family, str]] = {
    key: (model, message)
    for (key, model), message in (
        (family("", "olmo2", WIDE), "its norms span its heads"),
        (family("", "olmo3", WIDE, sliding_window=8), "its norms span its heads"),
        (family("", "minimax_m2", WIDE_EXPERTS, rotary_dim=8), "its norms span its heads"),
        (family("", "stablelm", WIDE, qk_layernorm=True), "its norms span its heads"),
        (family("", "bloom", WIDE), "a trial with some of its heads fails"),
        (family("", "deepseek_v3", LATENT), "its attention is of no known form"),
        (family("", "minicpm3", LATENT), "its attention is of no known form"),
        (family("", "gemma4_text", WIDE, **PER_LAYER_INPUT), "attention of 2 forms"),
        (family("", "gemma4_text", WIDE, key="gemma4-shared", **PER_LAYER_INPUT,
                layer_types=SLIDING, num_kv_shared_layers=2), "blocks share their keys"),
    )
}  # fmt: skip
Kept = Callable[[int, int], Sequence[int]]
"""(number of a block, its units) -> those that it keeps."""


def others_in_every_block(number: int, count: int) -> list[int]:
    """One to all but one."""
    return sorted({(3 * unit + number) % count for unit in range(1 + number % (count - 1))})


def make(case: str | Family) -> PreTrainedModel:
    """A random one whose norms and sinks, too, tell heads apart."""
    model = (CASES[case] if isinstance(case, str) else case).model()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def attention_of(layout: Layout) -> Attention:
    assert layout.attention is not None
    return layout.attention


@torch.no_grad()
def cut_(model: PreTrainedModel, kept: Kept = others_in_every_block) -> Layout:
    """Cut every attention of a model, which becomes one of the class that reloads it."""
    layout = with_attention(model, checked_layout(model))
    for number, block, part in layout.parts_of(model):
        if part is layout.attention:
            units = part.units(block)
            stay = torch.tensor(kept(number, units.count))
            columns = units.columns_of(stay)

            def down(
                _: int, old: torch.Tensor, __: Any, columns: torch.Tensor = columns
            ) -> CutDown:
                return CutDown(old[:, columns].contiguous(), None)

            part.cut_(block, stay[None], down, None)
    become_pruned_(model, layout, {})
    return layout


@torch.no_grad()
def masked(model: PreTrainedModel, layout: Layout, kept: Kept = others_in_every_block):
    """The dense model whose output projections are zero for the other units, in place."""
    for number, block, part in layout.parts_of(model):
        if part is layout.attention:
            units = part.units(block)
            stay = units.columns_of(torch.tensor(kept(number, units.count)))
            weight = block.get_parameter(f"{part.down}.weight").data
            weight = weight.T if part.is_transposed else weight
            weight[:, ~torch.isin(torch.arange(weight.shape[1]), stay)] = 0
    return model


def both(case: str, kept: Kept = others_in_every_block) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(cut, masked), of the same weights."""
    dense = make(case)
    small = copy.deepcopy(dense)
    return small, masked(dense, cut_(small, kept), kept)


def write(model: PreTrainedModel, layout: Layout, folder: Path) -> None:
    """A model's folder, as the package writes it."""
    folder.mkdir(parents=True)
    write_model(OpenModel(model, None, layout, folder.name, LiveBlocks(model, layout)), folder)
