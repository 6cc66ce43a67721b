"""vLLM runs experts and the decoder of a multimodal model with a width per block, tiny ones."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

import cfsp

from ..conftest import TEXT, make_tokenizer
from ..families.tiny import DEEPSTACK, EXPERTS, FFN, Family, sized
from .conftest import Reference, reference_of

SIZES = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
"""vLLM's attention on a CPU takes heads of 32 channels, its experts widths in multiples of 32."""
RECIPE = cfsp.Recipe(
    scorer="cfsp",
    sparsity=0.3,
    width_multiple=32,
    micro_batch=2,
    calibration=cfsp.Calibration(dataset=TEXT, samples=4, seqlen=16),
)
UNIFORM = replace(RECIPE, sparsity=1 / 3, uniform=True)
EXACT = replace(RECIPE, width_multiple=1)


def experts() -> object:
    more = {**SIZES, "moe_intermediate_size": 96, "num_experts": 8, "num_local_experts": 8}
    return sized("qwen3_moe", {**EXPERTS, **more}, mlp_only_layers=[1])


def with_vision() -> object:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 4, 4]}
    text = sized("qwen3_vl_text", {**FFN, **SIZES}, rope_parameters=rope)
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return CONFIG_MAPPING["qwen3_vl"](
        text_config=text.to_dict(),
        vision_config={**DEEPSTACK, "out_hidden_size": 128},
        **{name: 250 + number for number, name in enumerate(tokens)},
    )


MODELS = {
    "qwen3_moe": Family("Qwen3-MoE", "qwen3_moe", experts),
    "qwen3_vl": Family("Qwen3-VL", "qwen3_vl", with_vision, multimodal=True),
}


def pruned(name: str, recipe: cfsp.Recipe, root: Path) -> Reference:
    MODELS[name].model().save_pretrained(root / "dense")
    make_tokenizer().save_pretrained(root / "dense")
    options = {"eval_windows": 0, "progress": False}
    result = cfsp.prune(root / "dense", recipe=recipe, out=root / "pruned", **options)
    return reference_of(root / "pruned", [b.counts[0] for b in result.plan.blocks])


@pytest.mark.parametrize(
    ("name", "recipe", "kind"),
    [
        ("qwen3_moe", RECIPE, "CFSPQwen3MoeForCausalLM"),
        ("qwen3_moe", UNIFORM, "Qwen3MoeForCausalLM"),
        ("qwen3_vl", EXACT, "CFSPQwen3VLForConditionalGeneration"),
    ],
)
def test_vllm_says_what_transformers_says(
    name: str, recipe: cfsp.Recipe, kind: str, vllm_python: Path, tmp_path: Path
) -> None:
    reference = pruned(name, recipe, tmp_path)
    assert len(set(reference.widths)) == (2 if recipe is UNIFORM else 4)
    answer = reference.ask(vllm_python, "run_vllm.py", reference.folder)
    assert answer["model_class"] == kind
    assert answer["widths"] == reference.widths
    assert answer["tokens"] == reference.tokens
