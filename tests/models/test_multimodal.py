"""Text decoders of multimodal models: calibrated on text, the vision tower copied, and the folder
reloads as what it was."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)

import cfsp
from cfsp.checkpoints.documents import read_result
from cfsp.checkpoints.exports.source import open_source
from cfsp.errors import CfspError
from cfsp.models.descriptions import describe
from cfsp.models.opening import open_any, open_model, open_streamed
from cfsp.report.usage import loading_commands

from ..conftest import TEXT, TINY, make_tokenizer, run_fresh

pytestmark = pytest.mark.usefixtures("one_thread")

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "depth": 4,  # as many blocks as the text has
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 14,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA4_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 16,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
IMAGE = 259
"""The token that stands for a part of an image."""
QWEN = {"image_token_id": IMAGE, "vision_config": QWEN_VISION}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        **QWEN,
        "text_config": {"rope_parameters": ROPE},
        "vision_config": {"embed_dim": 32, "hidden_size": 32, "depth": 1, "num_heads": 2},
    },
    "qwen2_5_vl": {**QWEN, "text_config": {"rope_parameters": ROPE}},
    "qwen3_vl": {
        **QWEN,
        "text_config": {"rope_parameters": ROPE},
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0, 1]},
    },
    "qwen3_5": {**QWEN, "text_config": LINEAR},
    "gemma3": {
        "image_token_index": IMAGE,
        "mm_tokens_per_image": 4,
        "text_config": {"sliding_window": 8},
        "vision_config": VISION,
    },
    "gemma4": {
        "image_token_id": IMAGE,
        "text_config": {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "sliding_window": 8,
            "global_head_dim": 16,
            "num_kv_shared_layers": 3,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 260,
        },
        "vision_config": {**GEMMA4_VISION, "num_hidden_layers": 6},
    },
    "mistral3": {"vision_config": {"model_type": "pixtral", **VISION}},
    "glm4v": {**QWEN, "text_config": {"rope_parameters": ROPE}},
    "llava": {
        "image_token_index": IMAGE,
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
    },
    "internvl": {
        "text_config": {"model_type": "qwen2"},
        "vision_config": {**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
    },
}
PIXELS = {"pixel_values": torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2))}
IMAGES: dict[str, tuple[int, dict[str, torch.Tensor]]] = {
    "gemma3": (4, PIXELS),
    "llava": (4, PIXELS),
    "qwen3_vl": (
        1,
        {
            "pixel_values": torch.randn(4, 1176, generator=torch.Generator().manual_seed(2)),
            "image_grid_thw": torch.tensor([[1, 2, 2]]),
            "mm_token_type_ids": (torch.arange(25) == 6).int()[None],
        },
    ),
}
"""How many tokens an image has, and what the model takes beside them."""
TEXT_IDS = torch.arange(24)[None] * 11 % 256
OWN, UNIFORM = "own", "uniform"
CASES = [(name, case) for name in FAMILIES for case in (OWN, UNIFORM)]
RECIPES = {
    OWN: cfsp.Recipe(
        scorer="cfsp",
        sparsity=0.3,
        width_multiple=1,
        micro_batch=2,
        calibration=cfsp.Calibration(dataset=TEXT, samples=4, seqlen=16),
    )
}
RECIPES[UNIFORM] = replace(RECIPES[OWN], sparsity=1 / 3, uniform=True, width_multiple=8)
OPTIONS: dict[str, Any] = {"eval_windows": 0, "progress": False}


@torch.no_grad()
def make(name: str) -> PreTrainedModel:
    text = {**TINY, **FAMILIES[name].get("text_config", {})}
    config = AutoConfig.for_model(name, **{**FAMILIES[name], "text_config": text})
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, 0.15)
    return model


def save(name: str, folder: Path) -> Path:
    make(name).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor = TEXT_IDS, **more: Any) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **more).logits


def inside_blocks(name: str) -> bool:
    return ".layers." in name and "vision" not in name and "visual" not in name


Prune = Callable[[str, str], tuple[Path, cfsp.PruneResult]]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Prune:
    """The dense folder of a family, and the result of pruning it."""
    root = tmp_path_factory.mktemp("multimodal")

    @cache
    def dense(name: str) -> Path:
        return save(name, root / name)

    @cache
    def prune(name: str, case: str) -> tuple[Path, cfsp.PruneResult]:
        out = root / f"{name}-{case}"
        return dense(name), cfsp.prune(dense(name), out=out, recipe=RECIPES[case], **OPTIONS)

    return prune


@torch.no_grad()
def mask(model: PreTrainedModel, result: cfsp.PruneResult) -> PreTrainedModel:
    """The dense model without the channels that were removed."""
    blocks = model.get_decoder().layers
    for block, plan in zip(blocks, result.plan.blocks, strict=True):
        gone = torch.ones(plan.intermediate_size).scatter(0, plan.flat_kept, 0).bool()
        block.mlp.down_proj.weight[:, gone] = 0
    return model


@pytest.mark.parametrize(("name", "case"), CASES)
def test_pruned_equals_the_dense_model_with_the_same_channels_masked(
    name: str, case: str, pruned: Prune
) -> None:
    folder, result = pruned(name, case)
    dense = open_model(folder).model
    whole, expected = logits(dense), logits(mask(dense, result))
    model = cfsp.load(result.out)
    assert type(model).__name__ == ("CFSP" if case == OWN else "") + type(dense).__name__
    assert torch.allclose(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole, expected, atol=1e-3)


@pytest.mark.parametrize("name", IMAGES)
def test_so_it_does_where_it_sees_an_image(name: str, pruned: Prune) -> None:
    folder, result = pruned(name, OWN)
    tokens, image = IMAGES[name]
    ids = torch.cat([TEXT_IDS[:, :6], torch.full((1, tokens), IMAGE), TEXT_IDS[:, 6:]], dim=1)
    dense = mask(open_model(folder).model, result)
    model = cfsp.load(result.out)
    seen = logits(model, ids, **image)
    assert torch.allclose(seen, logits(dense, ids, **image), atol=1e-5, rtol=1e-5)
    changed = {**image, "pixel_values": image["pixel_values"] * 2}
    assert not torch.allclose(seen, logits(model, ids, **changed), atol=1e-3)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_what_is_outside_of_the_blocks_is_copied(name: str, case: str, pruned: Prune) -> None:
    folder, result = pruned(name, case)
    before = load_file(folder / "model.safetensors")
    after = load_file(result.out / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(inside_blocks(key) and ".mlp." in key for key in changed)
    assert any("vision" in key or "visual" in key for key in after)
    said = [json.loads((f / "config.json").read_text()) for f in (folder, result.out)]
    assert said[0]["vision_config"] == said[1]["vision_config"]
    for token in (key for key in said[0] if "token" in key):
        assert said[0][token] == said[1][token]
    layers = [text["text_config"].get("per_layer_config", {}) for text in said]
    if case == OWN:  # Gemma 4 has larger heads in every third block
        widths = [layers[1][number].pop("intermediate_size", 48) for number in sorted(layers[1])]
        assert len(set(widths)) > 1
    assert {n: own for n, own in layers[1].items() if own} == layers[0]
    assert AutoTokenizer.from_pretrained(result.out)("a")["input_ids"] == [64]


FRESH = """
import sys, torch
if sys.argv[1] == "trusted":
    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("cfsp", "cfsp_kernels"):
                raise ImportError("cfsp is not installed here")
    sys.meta_path.insert(0, Refuse())
else:
    import cfsp
from transformers import AutoModel, AutoModelForImageTextToText, AutoTokenizer
ids, trust = torch.arange(24)[None] * 11 % 256, sys.argv[1] == "trusted"
def load(folder):
    load = AutoModelForImageTextToText.from_pretrained
    model, info = load(folder, trust_remote_code=trust, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()
@torch.no_grad()
def logits(model):
    return model(input_ids=ids, use_cache=False).logits
for folder in sys.argv[2:]:
    try:
        assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"] == [64]
        model = load(folder)
        first = logits(model)
        tokens = model.generate(ids, max_new_tokens=3, do_sample=False)
        torch.save((first, tokens), folder + "." + sys.argv[1])
        if trust:
            model.save_pretrained(folder + "-again")
            assert torch.equal(first, logits(load(folder + "-again"))), "another model"
            base = AutoModel.from_pretrained(folder, trust_remote_code=True)
            assert type(base).__name__.startswith("CFSP") == ("-own" in folder), type(base)
    except Exception as error:
        raise RuntimeError(folder) from error
"""


@pytest.fixture(scope="module", params=["trusted", "registered"])
def fresh(
    request: pytest.FixtureRequest, pruned: Prune, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """Logits and tokens of every result as another process has them: without cfsp, and with it
    imported and no trust in the folder's code."""
    folders = {key: str(pruned(*key)[1].out) for key in CASES}
    home, root = tmp_path_factory.mktemp("hf"), Path(__file__).parents[2]
    run_fresh("-c", FRESH, request.param, *folders.values(), home=home, cwd=root)
    return lambda name, case: torch.load(f"{folders[name, case]}.{request.param}")


@pytest.mark.parametrize(("name", "case"), CASES)
def test_it_reloads_to_the_last_bit_in_another_process(
    name: str,
    case: str,
    pruned: Prune,
    fresh: Callable[[str, str], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    model = cfsp.load(pruned(name, case)[1].out)
    said, tokens = fresh(name, case)
    assert torch.equal(said, logits(model))
    assert torch.equal(tokens, model.generate(TEXT_IDS, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("case", RECIPES)
def test_in_memory_gives_what_comes_from_disk(case: str, pruned: Prune, tmp_path: Path) -> None:
    folder, result = pruned("qwen3_vl", case)
    assert open_streamed(folder) is not None
    opened = open_model(folder)
    out = tmp_path / "out"
    live = cfsp.prune(opened.model, opened.tokenizer, RECIPES[case], out=out, **OPTIONS).model
    assert torch.equal(logits(live), logits(cfsp.load(result.out)))
    for file in ("model.safetensors", "config.json", "plan.json"):
        assert (out / file).read_bytes() == (result.out / file).read_bytes(), file
    for module in live.modules():  # no part keeps what the dense one said of itself
        config = getattr(module, "config", live.config)
        assert config in (live.config, live.config.text_config, live.config.vision_config)
    again = cfsp.prune(out, out=tmp_path / "again", recipe=RECIPES[case], **OPTIONS)
    assert sum(again.plan.widths) < sum(result.plan.widths)


def test_the_card_and_the_report_name_the_class_that_loads_it(pruned: Prune) -> None:
    out = pruned("qwen3_vl", OWN)[1].out
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust" in card
    (_, commands), *others = loading_commands(read_result(out), str(out))
    assert "model = AutoModelForImageTextToText.from_pretrained(" in commands
    assert "AutoModelForCausalLM" not in card + commands
    assert [runtime for runtime, _ in others] == ["vLLM"]


def test_what_prepares_images_goes_with_the_model(tmp_path: Path) -> None:
    from transformers import AutoProcessor, CLIPImageProcessor, LlavaProcessor

    folder = save("llava", tmp_path / "dense")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    LlavaProcessor(CLIPImageProcessor(), tokenizer, patch_size=14).save_pretrained(folder)
    (tmp_path / "elsewhere.json").write_text("{}")
    (folder / "chat_template.json").symlink_to(tmp_path / "elsewhere.json")
    for case, recipe in RECIPES.items():
        cfsp.prune(folder, out=tmp_path / case, recipe=recipe, **OPTIONS)
        processor = AutoProcessor.from_pretrained(tmp_path / case)
        assert (type(processor), processor.patch_size) == (LlavaProcessor, 14)
        assert not (tmp_path / case / "chat_template.json").exists()


@pytest.mark.parametrize("method", ["lora", "ffn"])
def test_it_is_evaluated_and_recovered_as_what_it_is(
    method: str, pruned: Prune, tmp_path: Path
) -> None:
    dense, pruning = pruned("qwen2_5_vl", OWN)
    out = pruning.out
    (measured,) = cfsp.evaluate([out], dataset=TEXT, windows=2, seqlen=16, progress=False)
    assert measured["perplexity"] > 1
    assert measured["parameters"] == cfsp.load(out).num_parameters()
    settings = cfsp.Recovery(
        method=method,
        dataset=TEXT,
        seqlen=16,
        rank=2,
        steps=2,
        batch_size=2,
        learning_rate=1e-2,
        distillation=cfsp.Distillation(teacher=str(dense)),
    )
    result = cfsp.recover(out, tmp_path / "recovered", settings, **OPTIONS)
    assert type(result.model).__name__ == "CFSPQwen2_5_VLForConditionalGeneration"
    before, after = (load_file(f / "model.safetensors") for f in (out, tmp_path / "recovered"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(inside_blocks(key) for key in changed)
    said = [json.loads((f / "config.json").read_text()) for f in (out, tmp_path / "recovered")]
    assert said[0] == said[1]


def test_another_dtype_is_that_of_every_part(tmp_path: Path) -> None:
    folder = save("gemma3", tmp_path / "dense")
    recipe = replace(RECIPES[OWN], dtype="bfloat16")
    cfsp.prune(folder, out=tmp_path / "out", recipe=recipe, **OPTIONS)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        assert part.get("dtype", "bfloat16") == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_those_of_the_text(name: str, tmp_path: Path) -> None:
    make(name).config.save_pretrained(tmp_path)
    found = describe(tmp_path / "config.json")
    assert (found.refusal, found.blocks) == ("", "model.language_model.layers")
    assert len(found.parts) == (6 if name == "gemma4" else 4)


def test_the_text_alone_of_blocks_that_differ_goes_all_the_way(tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_config(make("gemma4").config.text_config).eval()
    dense.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    for case, recipe in RECIPES.items():
        out = tmp_path / case
        result = cfsp.prune(tmp_path / "dense", out=out, recipe=recipe, **OPTIONS)
        model = cfsp.load(out)
        assert type(model).__name__ == ("CFSP" if case == OWN else "") + "Gemma4ForCausalLM"
        expected = logits(mask(copy.deepcopy(dense), result))
        assert torch.allclose(logits(model), expected, atol=1e-5, rtol=1e-5)
        heads = [layer.head_dim for layer in model.config.per_layer_config]
        assert heads == [8, 8, 16, 8, 8, 16]
    again = cfsp.prune(tmp_path / OWN, out=tmp_path / "again", recipe=RECIPES[OWN], **OPTIONS)
    assert len({layer.intermediate_size for layer in again.model.config.per_layer_config}) > 1


def test_vision_without_values_is_refused(tmp_path: Path) -> None:
    folder = save("qwen3_5", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if "visual" not in k}, folder / "model.safetensors")
    for whole in (False, True):
        with pytest.raises(CfspError, match=r"missing keys in the weights: model\.visual"):
            open_any(folder, whole=whole)


def test_weights_of_the_text_alone_need_its_config(tmp_path: Path) -> None:
    text = AutoModelForCausalLM.from_config(make("qwen3_5").config)
    assert type(text).__name__ == "Qwen3_5ForCausalLM"
    text.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert open_any(tmp_path).layout.blocks == "model.layers"
    config = make("qwen3_5").config
    config.architectures = ["Qwen3_5ForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(CfspError, match=r"do not belong together|missing keys in the weights"):
        open_any(tmp_path)


def test_no_class_of_the_text_alone_loads_it_in_part(pruned: Prune) -> None:
    with pytest.raises(ValueError, match=r"Unrecognized configuration class .*CFSPQwen3_5Config"):
        AutoModelForCausalLM.from_pretrained(pruned("qwen3_5", OWN)[1].out)
    model = AutoModelForCausalLM.from_pretrained(pruned("gemma3", OWN)[1].out)
    assert type(model).__name__ == "CFSPGemma3ForConditionalGeneration"


def test_formats_hold_no_vision(pruned: Prune) -> None:
    with pytest.raises(CfspError, match=r"cannot export .*: 'cfsp_qwen3_vl' is multimodal"):
        open_source(pruned("qwen3_vl", OWN)[1].out)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mllama", "its blocks cannot be run one by one"),
        ("blip-2", "its blocks cannot be run one by one"),
        ("gemma3n", "(its blocks cannot be run one by one|no causal LM of it)"),  # without timm
    ],
)
def test_a_decoder_that_does_not_run_alone_is_refused_in_one_line(
    kind: str, reason: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    try:
        refusal = describe(tmp_path / "config.json").refusal
    except CfspError as error:
        refusal = str(error)
    assert re.fullmatch(rf"unsupported architecture '{kind}': .*{reason}.*", refusal)
