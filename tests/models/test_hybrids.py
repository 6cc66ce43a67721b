"""Families found by their structure: FFNs without a gate, with both halves in one matrix, beside
other mixers than attention, and blocks that have no FFN at all."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING

import cfsp
from cfsp.calibration.statistics import load_statistics, save_statistics
from cfsp.checkpoints.documents import read_result
from cfsp.models.detection.ffns import detect_layout
from cfsp.models.layouts import LAYOUTS
from cfsp.models.opening import open_streamed
from cfsp.pruning.plan_file import load_plan, save_plan
from cfsp.report.page import report_html
from cfsp.report.pictures import write_pictures

from ..conftest import make_tiny, make_tokenizer
from .test_families import RECIPE, logits

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2, "head_dim": None}
LATENT = {f"qk_{part}_head_dim": 8 for part in ("rope", "nope")} | {"v_head_dim": 8}
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
    "gpt_bigcode": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 48, "n_positions": 128},
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
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 260,
        "num_kv_shared_layers": 2,
    },
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


@pytest.mark.parametrize("name", [name for name in FOUND if name in CONFIG_MAPPING])
def test_a_family_is_pruned_by_what_its_blocks_show(name: str, tmp_path: Path) -> None:
    assert name not in LAYOUTS
    model, dense, folder = (make_tiny(name, **FOUND[name]) for _ in range(3))
    layout = detect_layout(dense)
    result = cfsp.prune(model, make_tokenizer(), RECIPE, tmp_path / "live", eval_windows=0)
    assert 0 < sum(result.plan.widths) < sum(layout.intermediate_sizes(dense))
    for block, plan in zip(layout.find_blocks(dense), result.plan.blocks, strict=True):
        for ffn in layout.block_parts(block):
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


def test_what_a_family_says_of_single_blocks_stays(tmp_path: Path) -> None:
    model = make_tiny("gemma4_text", **FOUND["gemma4_text"])
    model.config.save_pretrained(tmp_path)
    assert not cfsp.estimate(tmp_path / "config.json", RECIPE).refusal
    plan = cfsp.prune(model, make_tokenizer(), RECIPE, tmp_path / "out", eval_windows=0).plan
    blocks = cfsp.load(tmp_path / "out").config.per_layer_config
    assert [block.head_dim for block in blocks] == [8, 16, 8, 16]
    assert tuple(block.intermediate_size for block in blocks) == plan.widths


def test_the_parameters_of_an_activation_stay_as_they_are(tmp_path: Path) -> None:
    model = make_tiny("apertus")
    for block in model.model.layers:
        block.mlp.act_fn.alpha_p.data.fill_(0.3)
    before = [block.mlp.act_fn.alpha_p.clone() for block in model.model.layers]
    cfsp.prune(model, make_tokenizer(), RECIPE, tmp_path / "out", eval_windows=0)
    after = [block.mlp.act_fn.alpha_p for block in cfsp.load(tmp_path / "out").model.layers]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense folder, blocks 0 and 2 of which have no FFN."""
    folder = tmp_path_factory.mktemp("bare") / "dense"
    make_tiny("nemotron_h", **BARE).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_block_without_an_ffn_has_statistics_and_no_channels(bare: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, scorer="obs")
    statistics = cfsp.calibrate(bare, recipe=recipe, progress=False)
    assert statistics.intermediate_sizes == (0, 48, 0, 48)
    assert [block.units == () for block in statistics.blocks] == [True, False, True, False]
    assert all(block.importance("angular") > 0 for block in statistics.blocks)
    (ranking,) = statistics.rankings
    assert [len(scores) for scores in ranking.scores] == [48, 48]
    save_statistics(statistics, tmp_path / "statistics")
    again = load_statistics(tmp_path / "statistics")
    assert again.intermediate_sizes == (0, 48, 0, 48)
    model = make_tiny("nemotron_h", **BARE)
    plans = [cfsp.plan(found, model, recipe) for found in (statistics, again)]
    assert plans[0].widths == plans[1].widths
    assert [width == 0 for width in plans[0].widths] == [True, False, True, False]
    assert [block.share < 1 for block in plans[0].blocks] == [False, True, False, True]
    save_plan(plans[0], tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded.blocks[0].kept == loaded.blocks[0].units == ()
    assert [torch.equal(*pair) for pair in kept_pairs(plans[0], loaded)] == [True] * 4
    result = cfsp.prune(bare, recipe=recipe, plan=loaded, out=tmp_path / "out", progress=False)
    assert result.plan.widths == loaded.widths


def test_blocks_without_an_ffn_are_streamed(bare: Path, tmp_path: Path) -> None:
    model = make_tiny("nemotron_h", **BARE)
    folder = shutil.copytree(bare, tmp_path / "dense")
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    opened = open_streamed(folder)
    assert opened is not None
    assert opened.described.units[::2] == ((), ())
    cfsp.prune(model, make_tokenizer(), RECIPE, tmp_path / "live", eval_windows=0)
    cfsp.prune(folder, recipe=RECIPE, out=tmp_path / "disk", eval_windows=0)
    pruned, streamed = (cfsp.load(tmp_path / out).state_dict() for out in ("live", "disk"))
    assert pruned.keys() == streamed.keys()
    assert all(torch.equal(pruned[name], streamed[name]) for name in pruned)


def kept_pairs(
    one: cfsp.PruningPlan, other: cfsp.PruningPlan
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    pairs = zip(one.blocks, other.blocks, strict=True)
    return [(a.flat_kept, b.flat_kept) for a, b in pairs]


WAYS = {
    "uniform": {"uniform": True},
    "global": {"allocator": "global"},
    "knapsack": {"scorer": "obs", "allocator": "knapsack"},
    "search": {"allocator": "search", "search_generations": 1, "search_windows": 2},
    "bias": {"compensation": "bias"},
    "sequential": {"compensation": "least-squares", "sequential": True},
    "blockwise": {"compensation": "blockwise", "epochs": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_leaves_blocks_without_an_ffn_as_they_are(bare: Path, way: str) -> None:
    model, dense = (make_tiny("nemotron_h", **BARE) for _ in range(2))
    recipe = replace(RECIPE, **WAYS[way])
    result = cfsp.prune(model, make_tokenizer(), recipe, progress=False)
    assert [width == 0 for width in result.plan.widths] == [True, False, True, False]
    assert {refit.block for refit in result.report.refits} <= {1, 3}
    assert bool(result.report.refits) == (way in ("sequential", "blockwise"))
    for number in (0, 2):
        before, after = (m.model.layers[number].state_dict() for m in (dense, model))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_estimates_reports_and_pictures_take_blocks_without_an_ffn(
    bare: Path, tmp_path: Path
) -> None:
    estimated = cfsp.estimate(bare, recipe=RECIPE)
    cfsp.prune(bare, recipe=RECIPE, out=tmp_path / "out", eval_windows=0, progress=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    widths = config["per_layer_config"]
    assert set(widths) <= {"1", "3"}
    assert estimated.parameters == sum(
        p.numel() for p in make_tiny("nemotron_h", **BARE).parameters()
    )
    result = read_result(tmp_path / "out")
    page = report_html([result], [])
    kept = [block.width for block in result.plan.blocks]
    assert f"FFN channels kept in 2 blocks, from {min(kept[1::2])} to {max(kept)} of 48" in page
    assert "block 0: 0 of 0 channels kept (100.0%)" in page
    assert len(write_pictures(result, tmp_path)) == 3
