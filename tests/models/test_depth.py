"""Whole blocks gone: the model is that of its own class, and says what it said with blocks that
only hand their input on."""

import copy
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import cfsp
from cfsp.checkpoints.verification import ridden_probe, take_probe
from cfsp.errors import CfspError
from cfsp.models.depth import shallower, shallower_config
from cfsp.models.layouts import Layout, as_block_output
from cfsp.models.loading import auto_class, quiet_loading
from cfsp.models.opening import OpenModel, adopt, open_streamed

from ..conftest import TEXT, make_tiny, make_tokenizer
from ..families.tiny import FAMILIES
from ..weights import writers

KEPT = (0, 2, 3)
REFUSED = {
    "gemma3n_text": "cannot be run one by one",
    "gemma4_text": "outside of the blocks it would have another model.embed_tokens_per_layer",
    "gemma4": "outside of the blocks it would have another model.language_model.embed_tokens_per",
    "minicpm3": "block 0 as block 0 would have residual_scale",
    "minimax": "block 0 as block 0 would have num_hidden_layers 3 of self_attn, not 4",
    "longcat_flash": "expected one list of 4 blocks",
    "jamba": "block 2 as block 1 would have JambaAttentionDecoderLayer at itself, not JambaMamba",
    "llama4": "cannot be run one by one",
}
"""Families whose classes build another block in that place, with what the error says."""


def without(model: PreTrainedModel, layout: Layout, kept: Sequence[int]) -> PreTrainedModel:
    """The dense model whose other blocks hand their input on."""

    def pass_on(block: nn.Module, hidden_states: torch.Tensor, *_: object, **__: object) -> object:
        return as_block_output(block, hidden_states)

    for number, block in enumerate(layout.find_blocks(model)):
        if number not in kept:
            block.forward = partial(pass_on, block)
    return model


def saved(model: PreTrainedModel, folder: Path) -> Path:
    with quiet_loading():
        model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def opened(folder: Path) -> OpenModel:
    found = open_streamed(folder)
    assert found is not None
    return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_says_what_all_say_with_identities(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].model()
    dense = copy.deepcopy(model)
    if name in REFUSED:
        with pytest.raises(CfspError, match=REFUSED[name]):
            shallower(opened(saved(model, tmp_path / "m")), KEPT)
        return
    streamed = opened(saved(model, tmp_path / "m"))
    left = shallower(adopt(model, None), KEPT)
    assert len(left.layout.find_blocks(left.model)) == 3
    ids = torch.arange(5, 37).reshape(2, 16)
    expected = without(dense, left.layout, KEPT)(input_ids=ids, use_cache=False).logits
    assert torch.equal(left.model(input_ids=ids, use_cache=False).logits, expected)
    assert torch.equal(ridden_probe(shallower(streamed, KEPT)), take_probe(left.model).logits)


def test_blocks_that_compute_with_their_numbers_are_refused() -> None:
    opened_ = adopt(make_tiny("gpt2", n_inner=48, scale_attn_by_inverse_layer_idx=True), None)
    with pytest.raises(CfspError, match="a block computes with its own number"):
        shallower(opened_, KEPT)
    assert len(opened_.layout.find_blocks(opened_.model)) == 4  # as it was


def test_blocks_that_are_given_features_of_images_stay() -> None:
    model = FAMILIES["qwen3_vl"].model()
    with pytest.raises(CfspError, match="blocks 0 to 0 take features of images"):
        shallower(adopt(model, None), (1, 2, 3))


@pytest.mark.parametrize("kept", [(), (0, 0), (2, 1), (0, 4), (-1, 2)])
def test_anything_but_ascending_numbers_of_blocks_is_refused(kept: tuple[int, ...]) -> None:
    with pytest.raises(CfspError, match="kept blocks must ascend within 0 to 3"):
        shallower(adopt(make_tiny(), None), kept)


def test_lists_are_filtered_numbers_renumbered_and_counts_recounted() -> None:
    config = FAMILIES["deepseek_v3"].config()
    config.first_k_dense_replace, config.num_nextn_predict_layers = 2, 1
    config.mlp_only_layers, config.eos_token_id = [1, 3], [1, 2, 3, 4]
    config.layer_types = ["a", "b", "c", "d"]
    found = shallower_config(config, KEPT)
    assert (found.num_hidden_layers, found.first_k_dense_replace) == (3, 1)
    assert (found.num_nextn_predict_layers, found.mlp_only_layers) == (0, [2])
    assert (found.layer_types, found.eos_token_id) == (["a", "c", "d"], [1, 2, 3, 4])
    assert (config.num_hidden_layers, config.layer_types) == (4, ["a", "b", "c", "d"])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3", "qwen3_next", "gemma3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_result_generates_with_a_cache_what_it_does_without(name: str, cache: str) -> None:
    model = shallower(adopt(FAMILIES[name].model(), None), KEPT).model
    ids, options = torch.arange(5, 21)[None], {"max_new_tokens": 8, "do_sample": False}
    with_cache = model.generate(ids, cache_implementation=cache, **options)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_vl", "gemma3"],
)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_from_disk_to_disk_the_bytes_are_those_of_memory(
    name: str, sparsity: float, tmp_path: Path
) -> None:
    model = FAMILIES[name].model()
    folder = saved(model, tmp_path / "m")
    recipe = cfsp.Recipe(
        blocks=3,
        sparsity=sparsity,
        compensation="none",
        width_multiple=8,
        calibration=cfsp.Calibration(dataset=TEXT, samples=2, seqlen=16),
    )
    options = {"recipe": recipe, "eval_windows": 0, "progress": False}
    cfsp.prune(folder, out=tmp_path / "a", **options)
    cfsp.prune(model, make_tokenizer(), out=tmp_path / "b", **options)
    for file in ("model.safetensors", "config.json", "plan.json"):
        a, b = ((tmp_path / way / file).read_bytes() for way in "ab")
        assert hashlib.sha256(a).digest() == hashlib.sha256(b).digest(), file
    if not sparsity:
        config = json.loads((tmp_path / "a" / "config.json").read_text())
        assert "auto_map" not in config  # the family's own class
        kind = auto_class(model.config)
        ids = torch.arange(5, 21)[None]
        again = kind.from_pretrained(tmp_path / "a").eval()
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.usefixtures("one_thread")
def test_fp8_blocks_are_read_where_they_lie(tmp_path: Path) -> None:
    plain = saved(FAMILIES["llama"].model().to(torch.bfloat16), tmp_path / "plain")
    writers.write_fp8(plain, tmp_path / "fp8")
    make_tokenizer().save_pretrained(tmp_path / "fp8")
    found = opened(tmp_path / "fp8")
    with found.blocks.turns() as turns:
        dense = {n: {k: p.clone() for k, p in b.named_parameters()} for n, b in turns}
    left = shallower(found, KEPT)
    with left.blocks.turns() as turns:
        for number, block in turns:
            for name, value in block.named_parameters():
                assert torch.equal(value, dense[KEPT[number]][name]), name
