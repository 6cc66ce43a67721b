"""Families found by their structure: FFNs without a gate, with both halves in one matrix, beside
other mixers than attention, and blocks that have no FFN at all."""

from pathlib import Path

import pytest
import torch

import cfsp
from cfsp.models.detection import detect_layout
from cfsp.models.layouts import LAYOUTS

from ..conftest import make_tiny, make_tokenizer
from .test_families import RECIPE, logits

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2, "head_dim": None}
LATENT = {f"qk_{part}_head_dim": 8 for part in ("rope", "nope")} | {"v_head_dim": 8}
OLD = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 48, "n_positions": 128}
HYBRIDS: dict[str, dict[str, object]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1], "head_dim": None},
    "falcon_h1": {**MAMBA, "mamba_d_head": 8, "mamba_d_ssm": 32},
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
        "head_dim": None,
    },
    "lfm2_moe": {**CONVOLUTIONS, "num_dense_layers": 4},
    "nemotron_h": {
        "hybrid_override_pattern": "M-*-",
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "num_hidden_layers": None,
    },
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
    },
    "recurrent_gemma": {"lru_width": 32, "intermediate_size": 96},
}
UNGATED: dict[str, dict[str, object]] = {
    **{key: {} for key in ("apertus", "arcee", "jais2", "nanochat", "nemotron", "persimmon")},
    **{key: {**OLD, "rotary_dim": 8} for key in ("codegen", "gptj")},
    "gpt_bigcode": OLD,
    "gpt_neo": {
        "attention_types": [[["global", "local"], 2]],
        "num_layers": 4,
        "num_heads": 4,
        "intermediate_size": 48,
    },
    "gpt_neox_japanese": {},
}
OTHERS: dict[str, dict[str, object]] = {
    **{key: {} for key in ("cwm", "diffllama", "doge", "glm", "internlm3", "olmo")},
    "minicpm3": {
        **LATENT,
        "head_dim": None,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "num_key_value_heads": 4,
    },
}
FOUND = {**HYBRIDS, **UNGATED, **OTHERS}
BARE = FOUND["nemotron_h"]
"""Blocks 0 and 2 of it have no FFN."""


@pytest.mark.parametrize("name", FOUND)
def test_a_family_is_pruned_by_what_its_blocks_show(name: str, tmp_path: Path) -> None:
    assert name not in LAYOUTS
    model, dense, folder = (make_tiny(name, **FOUND[name]) for _ in range(3))
    layout = detect_layout(dense)
    result = cfsp.prune(model, make_tokenizer(), RECIPE, tmp_path / "live", eval_windows=0)
    assert 0 < sum(result.plan.widths) < sum(layout.intermediate_sizes(dense))
    for block, plan in zip(layout.find_blocks(dense), result.plan.blocks, strict=True):
        for ffn in layout.block_ffns(block):
            block.get_submodule(ffn.down).weight.data[:, plan.removed] = 0
    pruned = logits(model)
    assert torch.allclose(pruned, logits(dense), atol=1e-5)
    reloaded = cfsp.load(tmp_path / "live")
    assert torch.equal(logits(reloaded), pruned)
    tokens = torch.arange(8)[None]
    assert reloaded.generate(tokens, max_new_tokens=2, eos_token_id=999).shape == (1, 10)

    folder.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    options = {"recipe": RECIPE, "eval_windows": 0, "progress": False}
    cfsp.prune(tmp_path / "dense", out=tmp_path / "disk", **options)
    disk, live = (tmp_path / out / "model.safetensors" for out in ("disk", "live"))
    assert disk.read_bytes() == live.read_bytes()
    again = cfsp.prune(tmp_path / "live", out=tmp_path / "again", **options)
    assert sum(again.plan.widths) < sum(result.plan.widths)


def test_the_parameters_of_an_activation_stay_as_they_are(tmp_path: Path) -> None:
    model = make_tiny("apertus")
    for block in model.model.layers:
        block.mlp.act_fn.alpha_p.data.fill_(0.3)
    before = [block.mlp.act_fn.alpha_p.clone() for block in model.model.layers]
    cfsp.prune(model, make_tokenizer(), RECIPE, tmp_path / "out", eval_windows=0)
    after = [block.mlp.act_fn.alpha_p for block in cfsp.load(tmp_path / "out").model.layers]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
