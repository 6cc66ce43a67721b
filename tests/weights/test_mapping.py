"""What transformers loads, block by block, and the way back to what it saves."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cfsp.errors import CfspError
from cfsp.models.blocks import StoredBlocks
from cfsp.models.fingerprints import model_fingerprint
from cfsp.models.loading import auto_class, load_config, quiet_loading
from cfsp.models.opening import OpenModel, open_streamed
from cfsp.models.surgery import on_meta
from cfsp.models.tensors import saved_tensors, tensor_infos
from cfsp.weights.mapping import WayBack

from ..conftest import make_tokenizer
from ..families.tiny import EXPERTS, FAMILIES, Family, sized

MORE = {
    "tied": FAMILIES["qwen3_moe"],
    "transposed": FAMILIES["qwen3_vl_moe"],
    "mixed types": FAMILIES["mixtral"],
    "own names": FAMILIES["llava"],
    "12 experts": Family(
        "", "qwen3_moe", lambda: sized("qwen3_moe", {**EXPERTS, "num_local_experts": 12})
    ),
}
"""More ways in which families are stored."""
KINDS = (
    "llama", "gpt_neox", "phi3", "gpt2", "bloom",
    "mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss", "llama4_text", "minimax_m2",
    "granitemoe", "ernie4_5_moe", "phimoe", "qwen3_next", "nemotron_h", "jamba", "lfm2_moe",
    "qwen2_5_vl", "qwen3_vl_moe", "gemma3", "mistral3", "llava", *MORE,
)  # fmt: skip
"""Of every way in which a family may be stored: one for one, renamed, transposed, experts apart."""
APART = {
    "mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe", "minimax_m2", "jamba", "ernie4_5_moe",
    "phimoe", "qwen3_next", "lfm2_moe", "tied", "12 experts",
}  # fmt: skip
"""Kinds whose experts are stored apart, each a contiguous part of a parameter."""


TIED = {"tied", "gemma3", "mistral3"}
"""Kinds of which the head is not stored."""


def save(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """A tiny bf16 checkpoint and what is stored: corrections of routers in fp32, as on the hub."""
    model = (MORE.get(kind) or FAMILIES[kind]).model()
    if kind == "tied":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if re.search("correction_bias|expert_bias", name):
            value.data.normal_()
        elif value.is_floating_point():
            value.data = value.data.bfloat16()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    if kind == "transposed":
        rewrite(
            folder,
            lambda t: t.update({k: v.mT.contiguous() for k, v in t.items() if ".experts." in k}),
        )
    if kind == "mixed types":
        rewrite(
            folder, lambda t: t.update({k: v.float() for k, v in t.items() if "experts.1.w1" in k})
        )
    if kind == "own names":  # instead of the family's on the hub
        save_file(saved_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def opened(folder: Path, dtype: str = "auto") -> OpenModel:
    found = open_streamed(folder, dtype)
    assert found is not None
    return found


def in_memory(folder: Path, dtype: str = "auto") -> PreTrainedModel:
    config = load_config(folder)
    with quiet_loading():
        return auto_class(config).from_pretrained(folder, dtype=dtype)


def check_same(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    assert torch.equal(found, expected), name


def check_streamed(streamed: OpenModel, whole: PreTrainedModel) -> None:
    """Every tensor of the one is that of the other, and one block at a time has its values."""
    expected = whole.state_dict()
    seen = set()
    with streamed.blocks.turns() as turns:
        for number, _ in turns:
            prefix = streamed.layout.prefix(number)
            for name, value in streamed.model.state_dict().items():
                if name.startswith(prefix) or streamed.layout.place_of(name) is None:
                    check_same(value, expected[name], name)
                    seen.add(name)
            assert {
                streamed.layout.place_of(name)
                for name, value in streamed.model.named_parameters()
                if not value.is_meta and not name.startswith(prefix)
            } == {None}
    assert seen == expected.keys()
    buffers = dict(whole.named_buffers())
    for name, value in streamed.model.named_buffers():
        check_same(value, buffers[name], name)
    assert streamed.blocks.fingerprint() == model_fingerprint(whole, streamed.layout)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_that_transformers_loads_and_come_back_as_it_saves_them(
    kind: str, tmp_path: Path
) -> None:
    stored = save(tmp_path / "m", kind)
    assert kind != "12 experts" or "model.layers.1.mlp.experts.11.up_proj.weight" in stored
    assert kind != "own names" or "model.language_model.norm.weight" in stored
    heads = {name for name in stored if re.search(r"\b(lm_head|embed_out)\b", name)}
    assert bool(heads) == (kind not in TIED)
    streamed, whole = opened(tmp_path / "m"), in_memory(tmp_path / "m")
    check_streamed(streamed, whole)

    whole.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    layout, model, blocks = streamed.layout, streamed.model, streamed.blocks
    assert isinstance(blocks, StoredBlocks)
    apart = {name for name, source in blocks.sources.items() if len(source.weights) > 1}
    assert all(blocks.sources[name].in_place for name in apart if kind in APART)
    infos = tensor_infos(saved_tensors(model))
    way_back = WayBack(on_meta(model), blocks.sources, infos, layout.number_of)
    assert way_back.planned == tensor_infos(saved)
    if kind != "transposed":  # whose other layout transformers saves
        shapes = {name: value.shape for name, value in stored.items()}
        assert {name: info.shape for name, info in way_back.planned.items()} == shapes

    outer = {k: v for k, v in saved_tensors(model).items() if layout.place_of(k) is None}
    written = way_back(outer)
    assert {way_back.block_of[name] for name in written} == {None}
    for name, value in written.items():
        check_same(value, saved.pop(name), name)
    with blocks.turns() as turns:
        for number, block in turns:
            tensors = {layout.prefix(number) + k: v for k, v in block.state_dict().items()}
            written = way_back(tensors)
            assert {way_back.block_of[name] for name in written} == {number}
            for name, value in written.items():
                check_same(value, saved.pop(name), name)
            if kind in APART:
                check_not_copied(tensors, written)
    assert not saved


def check_not_copied(tensors: dict[str, torch.Tensor], written: dict[str, torch.Tensor]) -> None:
    """Experts, where a block has any, are written from where they are."""
    parts = [(k, v) for k, v in written.items() if ".experts." in k and k.endswith(".weight")]
    fused = {k: v for k, v in tensors.items() if v.dim() == 3 and "experts" in k}
    assert (len(fused), len(parts) % 12) in ((0, 0), (2, 0))
    assert bool(parts) == bool(fused)
    memory = {value.untyped_storage().data_ptr() for value in fused.values()}
    assert {value.untyped_storage().data_ptr() for _, value in parts} == memory


def test_what_a_family_keeps_in_fp32_beside_fp16_is_kept(tmp_path: Path) -> None:
    save(tmp_path / "m", "gpt_oss")
    whole = in_memory(tmp_path / "m", "float16")
    assert {value.dtype for value in whole.parameters()} == {torch.float16, torch.float32}
    check_streamed(opened(tmp_path / "m", "float16"), whole)


EXPERT = "model.layers.2.mlp.experts.{}.{}_proj.weight"
FUSED = "model.layers.2.mlp.experts.gate_up_proj"
VISUAL = "layers.2.mlp.experts.down_proj"
REFUSED: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = {
    "a tensor too many": (
        "qwen3_moe",
        lambda t: t.update({EXPERT.format(1, "more"): torch.ones(2, 2)}),
        r"has no place for model\.layers\.2\.mlp\.experts\.1\.more_proj\.weight$",
    ),
    "an expert without its gate": (
        "qwen3_moe",
        lambda t: t.pop(EXPERT.format(1, "gate")),
        r"mlp\.experts\.gate_up_proj needs as many .*gate_proj.* and .*up_proj.*, got 3, 4$",
    ),
    "an expert missing": (
        "qwen3_moe",
        lambda t: [t.pop(EXPERT.format(3, kind)) for kind in ("gate", "up", "down")],
        r"layers\.2\.mlp\.experts\.\w+_proj is \[3, .*\] in the weights, \[4, .*\] by the config$",
    ),
    "the first expert missing": (
        "qwen3_moe",
        lambda t: [
            t.update({EXPERT.format(4, kind): t.pop(EXPERT.format(0, kind))})
            for kind in ("gate", "up", "down")
        ],
        r"experts\.\w+ needs expert 0, found .*experts\.1\.\w+_proj\.weight$",
    ),
    "a gate of another expert": (
        "qwen3_moe",
        lambda t: t.update({EXPERT.format(7, "gate"): t.pop(EXPERT.format(1, "gate"))}),
        r"experts\.gate_up_proj needs expert 1, found .*experts\.2\.gate_proj\.weight$",
    ),
    "two for one parameter, apart and together": (
        "qwen3_moe",
        lambda t: t.update({FUSED: torch.ones(4, 48, 32)}),
        r"model\.layers\.2\.mlp\.experts\..* and .* of the weights are one parameter$",
    ),
    "two for one parameter, with and without its prefix": (
        "phi3",
        lambda t: t.update({k.removeprefix("model."): v + 1 for k, v in t.items() if "norm" in k}),
        r"norm\.weight and .*norm\.weight of the weights are one parameter$",
    ),
    "two for one parameter, both converted": (
        "qwen3_vl_moe",
        lambda t: t.update({f"language_model.{VISUAL}": t[f"model.language_model.{VISUAL}"] + 1}),
        rf"language_model\.{VISUAL} and model\.language_model\.{VISUAL} of the weights are one",
    ),
    "an expert of another shape": (
        "qwen3_moe",
        lambda t: t.update({EXPERT.format(1, "up"): torch.ones(16, 32)}),
        r"m: cannot make model\.layers\.2\.mlp\.experts\.gate_up_proj of model.*",
    ),
    "all experts of another shape": (
        "qwen3_moe",
        lambda t: t.update({EXPERT.format(n, "down"): torch.ones(32, 16) for n in range(4)}),
        r"experts\.down_proj is \[4, 32, 16\] in the weights, \[4, 32, 24\] by the config$",
    ),
    "neither of both layouts": (
        "qwen3_vl_moe",
        lambda t: t.update({f"model.language_model.{VISUAL}": torch.ones(4, 32, 16)}),
        r"layers\.2\.mlp\.experts\.down_proj is \[4, 16, 32\] in .*, \[4, 32, 24\] by the config$",
    ),
    "int8": (
        "qwen3_moe",
        lambda t: t.update({EXPERT.format(1, "up"): torch.ones(24, 32, dtype=torch.int8)}),
        r"m is quantised: model\.layers\.2\.mlp\.experts\.1\.up_proj\.weight is stored as int8,",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_named_in_one_line(what: str, tmp_path: Path) -> None:
    kind, change, message = REFUSED[what]
    save(tmp_path / "m", kind)
    rewrite(tmp_path / "m", change)
    with pytest.raises(CfspError, match=message) as caught:
        open_streamed(tmp_path / "m")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
