"""Exports of models whose blocks differ in heads, or lack an attention or FFN."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import cfsp
from cfsp.errors import CfspError

from ..conftest import make_tiny
from ..mixed import write_mixed
from .test_exports import VOCABULARY, assert_nothing_written, export, family_tokenizer, logits
from .test_exports import read_gguf as read

pytest.importorskip("gguf")

WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": VOCABULARY}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
GROUPS, WIDTHS = (3, 4, 1, 2), (30, 48, 17, 20)


def mixed(
    folder: Path,
    family: str = "llama",
    groups: tuple[int, ...] = GROUPS,
    widths: tuple[int, ...] = WIDTHS,
    added_bias: bool = False,
    **values: object,
) -> Path:
    model = make_tiny(family, **{**WIDE, **IDS, **values})
    return write_mixed(model, family_tokenizer(family), folder, groups, widths, added_bias)


def test_deci_has_heads_and_widths_per_block_and_zeros_for_what_is_gone(tmp_path: Path) -> None:
    source = mixed(tmp_path / "m", groups=(3, 0, 1, 0), widths=(30, 0, 17, 20))
    assert export(source, "gguf", tmp_path / "m.gguf").details["architecture"] == "deci"
    values, tensors = read(tmp_path / "m.gguf")
    assert values["deci.attention.head_count"] == [6, 0, 2, 0]
    assert values["deci.attention.head_count_kv"] == [3, 0, 1, 0]
    assert values["deci.feed_forward_length"] == [30, 32, 17, 20]
    assert values["deci.attention.key_length"] == 8
    for number in (1, 3):
        assert not [n for n in tensors if n.startswith(f"blk.{number}.attn")]
    for name, shape in (("gate", (32, 32)), ("up", (32, 32)), ("down", (32, 32))):
        data = torch.tensor(tensors[f"blk.1.ffn_{name}.weight"].data)
        assert data.shape == shape
        assert not data.any()
    weights = load_file(source / "model.safetensors")
    rows = weights["model.layers.0.self_attn.q_proj.weight"].view(6, 2, 4, 32)
    found = torch.tensor(tensors["blk.0.attn_q.weight"].data).view(6, 4, 2, 32)
    assert torch.equal(found, rows.transpose(1, 2))


def test_openelm_holds_qwen3_with_sizes_per_block_where_embeddings_are_tied(tmp_path: Path) -> None:
    source = mixed(tmp_path / "m", "qwen3", widths=(30, 0, 17, 20), tie_word_embeddings=True)
    assert export(source, "gguf", tmp_path / "m.gguf").details["architecture"] == "openelm"
    values, tensors = read(tmp_path / "m.gguf")
    assert values["openelm.attention.head_count"] == [6, 8, 2, 4]
    assert values["openelm.attention.head_count_kv"] == list(GROUPS)
    assert values["openelm.feed_forward_length"] == [30, 32, 17, 20]
    weights = load_file(source / "model.safetensors")
    parts = [weights[f"model.layers.2.self_attn.{n}_proj.weight"] for n in "qkv"]
    assert torch.equal(torch.tensor(tensors["blk.2.attn_qkv.weight"].data), torch.cat(parts))
    assert "blk.2.attn_q_norm.weight" in tensors


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gguf_of_alike_blocks_is_of_the_familys_own_arch(tmp_path: Path, family: str) -> None:
    source = mixed(tmp_path / "m", family, (2,) * 4, (20,) * 4)
    assert export(source, "gguf", tmp_path / "m.gguf").details["architecture"] == family
    values, _ = read(tmp_path / "m.gguf")
    assert values[f"{family}.attention.head_count"] == 4
    assert values[f"{family}.attention.head_count_kv"] == 2
    assert values[f"{family}.feed_forward_length"] == 20


def test_nemotron_nas_has_no_ops_and_heads_of_all_blocks(tmp_path: Path) -> None:
    source, out = mixed(tmp_path / "m", groups=(2, 2, 0, 2), widths=(30, 0, 17, 0)), tmp_path / "n"
    assert export(source, "nemotron-nas", out).details == {"ffn_mult": False}
    config = AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert (config.num_attention_heads, config.head_dim) == (4, 8)
    blocks = config.block_configs
    assert [b.attention.no_op for b in blocks] == [False, False, True, False]
    assert [b.attention.n_heads_in_group for b in blocks] == [2, 2, None, 2]
    assert [b.ffn.no_op for b in blocks] == [False, True, False, True]
    assert [b.ffn.intermediate_size for b in blocks] == [30, None, 17, None]
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    norms = {
        "model.layers.2.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.3.post_attention_layernorm.weight",
    }
    assert before.keys() - after.keys() == norms
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_padded_has_zero_heads_too(tmp_path: Path, family: str) -> None:
    values = {"head_dim": 4} if family == "qwen2" else {}
    source = mixed(tmp_path / "m", family, (2, 1, 2, 1), **values)
    export(source, "padded", tmp_path / "p")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    assert model.config.model_type == family
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)
    assert not {"heads", "sizes"} & model.config.cfsp_config.keys()
    torch.testing.assert_close(logits(model), logits(cfsp.load(source)), rtol=1e-4, atol=1e-4)


def test_padded_has_the_dense_heads_where_the_config_takes_no_fewer(tmp_path: Path) -> None:
    source = mixed(tmp_path / "m", groups=(3, 1, 2, 3))  # hidden size 32, at most 6 heads
    export(source, "padded", tmp_path / "p")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    assert model.config.num_attention_heads == 8
    torch.testing.assert_close(logits(model), logits(cfsp.load(source)), rtol=1e-4, atol=1e-4)


def test_alike_blocks_whose_heads_the_family_does_not_take_reload(tmp_path: Path) -> None:
    """6 heads at a hidden size of 32: LlamaConfig refuses them, per-block sizes hold them."""
    source = mixed(tmp_path / "m", groups=(3,) * 4, widths=(20,) * 4)
    assert json.loads((source / "config.json").read_text())["model_type"] == "cfsp_llama"
    loaded = cfsp.load(source)
    assert loaded.model.layers[3].self_attn.q_proj.weight.shape == (48, 32)


FOLDER = "; the folder itself runs in vLLM with cfsp installed"
REFUSED = {
    "heads": (
        "nemotron-nas",
        {},
        f"nemotron-nas has as many query heads in every block, not 2 to 8{FOLDER}",
    ),
    "heads that the config does not take": (
        "nemotron-nas",
        {"groups": (3,) * 4},
        "nemotron-nas has no 6 query heads, by which the hidden size 32 cannot be divided" + FOLDER,
    ),
    "block 0": (
        "nemotron-nas",
        {"groups": (0, 2, 2, 2)},
        f"nemotron-nas has no block 0 without attention{FOLDER}",
    ),
    "bias on o_proj": (
        "nemotron-nas",
        {"groups": (4,) * 4, "added_bias": True},
        f"nemotron-nas has no bias on o_proj alone{FOLDER}",
    ),
    "deci, block 0": (
        "gguf",
        {"groups": (0, 2, 2, 2)},
        f"llama.cpp has no llama with no attention in block 0{FOLDER}",
    ),
    "openelm, attention gone": (
        "gguf",
        {"family": "qwen3", "groups": (2, 2, 0, 2), "tie_word_embeddings": True},
        f"llama.cpp has no qwen3 with no attention in block 2{FOLDER}",
    ),
    "openelm, a bias": (
        "gguf",
        {"family": "qwen3", "added_bias": True, "widths": (0, 9, 9, 9)},
        f"llama.cpp has no qwen3 with a bias on down_proj{FOLDER}",
    ),
    "padded, attention gone": (
        "padded",
        {"groups": (2, 2, 0, 2)},
        f"padded has no block 2 without attention{FOLDER}",
    ),
    "padded, FFN gone": (
        "padded",
        {"family": "gemma3_text", "widths": (9, 0, 9, 9)},
        "padded has no block 1 without FFN; the folder itself runs in vLLM's transformers backend",
    ),
    "padded, heads in one projection": (
        "padded",
        {"family": "phi3", "pad_token_id": 1, "head_dim": 4},
        "padded has no heads per block for phi3; the folder itself runs in transformers",
    ),
    "padded, bias on o_proj": (
        "padded",
        {"groups": (4,) * 4, "added_bias": True},
        "llama has no place for the bias that the compensation added to o_proj; prune with "
        "`compensation='none'` for this export",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_hold_is_refused_with_the_route_that_runs(
    tmp_path: Path, case: str
) -> None:
    to, values, message = REFUSED[case]
    source, out = mixed(tmp_path / "m", **values), tmp_path / "out.gguf"  # type: ignore[arg-type]
    with pytest.raises(CfspError) as refused:
        export(source, to, out)
    assert str(refused.value) == message
    assert_nothing_written(out)
