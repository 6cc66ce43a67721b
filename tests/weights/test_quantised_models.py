"""Quantised checkpoints as models: opened, pruned, estimated as the plain ones of their values."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import cfsp
from cfsp.io.safetensors import read_header
from cfsp.models.loading import auto_class, load_config, quiet_loading
from cfsp.models.opening import open_model

from ..conftest import make_tokenizer, one_thread_at_a_time
from ..families.checks import OPTIONS, RECIPE
from ..families.fresh import said
from ..families.tiny import EXPERTS, FAMILIES, FFN, LATENT, Family, sized
from . import quantisers, writers
from .quantisers import Stored
from .test_mapping import check_streamed, in_memory, opened, rewrite

DEEPSEEK = {
    **LATENT,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
}
"""Rows that are no whole blocks of 128: 576 of kv_a_proj_with_mqa, 192 of the first FFN."""


@dataclass(frozen=True)
class Case:
    """A kind of quantised checkpoint."""

    family: Family
    write: Callable[[Path, Path], Stored]
    share: tuple[float, float]
    """Least and most bytes of a stored block for one of the block in bf16."""


def text(kind: str, values: dict[str, Any], **more: Any) -> Family:
    return Family(kind, kind, lambda: sized(kind, values, **more))


def in_text_config(folder: Path, out: Path) -> Stored:
    """FP8 that the config of the text model tells of."""
    plain = writers.write_fp8(folder, out)
    config = json.loads((out / "config.json").read_text())
    told = {**config.pop("quantization_config"), "modules_to_not_convert": ["visual", "lm_head"]}
    config["text_config"]["quantization_config"] = told
    (out / "config.json").write_text(json.dumps(config))
    return plain


HALF, QUARTER = (0.5, 0.56), (0.25, 0.4)
QWEN3_MOE = text("qwen3_moe", {**EXPERTS, "num_hidden_layers": 2})
LLAMA = text("llama", {**FFN, "num_hidden_layers": 2})
CASES = {
    "deepseek_v3, FP8": Case(text("deepseek_v3", DEEPSEEK), writers.write_fp8, HALF),
    "gpt_oss, MXFP4": Case(
        text(
            "gpt_oss", {**EXPERTS, "hidden_size": 64, "num_hidden_layers": 2}, intermediate_size=32
        ),
        writers.write_mxfp4,
        (0.25, 0.45),
    ),
    "qwen3_moe, FP8 of channels": Case(QWEN3_MOE, writers.write_compressed, HALF),
    "qwen3_moe, int4": Case(
        QWEN3_MOE, lambda a, b: writers.write_compressed(a, b, "pack-quantized", "group"), QUARTER
    ),
    "llama, NVFP4": Case(
        LLAMA, lambda a, b: writers.write_modelopt(a, b, "NVFP4", beside=True), QUARTER
    ),
    "llama, FP8 of ModelOpt": Case(
        LLAMA, lambda a, b: writers.write_modelopt(a, b, kv_cache=True), HALF
    ),
    "qwen3_vl, FP8": Case(FAMILIES["qwen3_vl"], writers.write_fp8, HALF),
    "qwen3_vl, FP8 by text_config": Case(FAMILIES["qwen3_vl"], in_text_config, HALF),
}


def save(case: Case, folder: Path) -> None:
    """The quantised checkpoint, ``q``, and ``p``, the plain one of the same values."""
    model = case.family.model()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if "correction_bias" in name:
            value.data.normal_()
        elif value.is_floating_point():
            value.data = value.data.bfloat16()
    model.save_pretrained(folder / "m")
    make_tokenizer().save_pretrained(folder / "m")
    writers.write_plain(folder / "m", folder / "p", case.write(folder / "m", folder / "q"))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    """Saved in this folder."""
    save(CASES[request.param], tmp_path)
    return CASES[request.param]


def weights_of(folder: Path) -> Stored:
    return load_file(folder / "model.safetensors")


def test_blocks_are_those_of_the_plain_checkpoint_streamed_and_whole(
    case: Case, tmp_path: Path
) -> None:
    expected = in_memory(tmp_path / "p")
    check_streamed(opened(tmp_path / "q"), expected)
    whole = open_model(tmp_path / "q").model
    assert type(whole) is type(expected)
    found = whole.state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(found[name], value), name


def test_pruned_it_is_the_plain_checkpoint_pruned(case: Case, tmp_path: Path) -> None:
    dense, out, plain = tmp_path / "q", tmp_path / "q-out", tmp_path / "p-out"
    with one_thread_at_a_time(), quiet_loading():
        whole = open_model(dense)
        live = cfsp.prune(whole.model, whole.tokenizer, RECIPE, **OPTIONS).model
        assert cfsp.prune(dense, recipe=RECIPE, out=out, **OPTIONS).live is None
        cfsp.prune(tmp_path / "p", recipe=RECIPE, out=plain, **OPTIONS)
        for name in ("model.safetensors", "config.json", "generation_config.json"):
            assert (out / name).read_bytes() == (plain / name).read_bytes(), name
        assert "quantization" not in (out / "config.json").read_text()
        assert not (out / "hf_quant_config.json").exists()
        found, stored = weights_of(out), weights_of(tmp_path / "p")
        assert found.keys() == stored.keys()
        assert sum(x.numel() for x in found.values()) < sum(x.numel() for x in stored.values())
        assert {x.dtype for x in found.values()} == {x.dtype for x in live.state_dict().values()}
        loaded = auto_class(load_config(out)).from_pretrained(out).eval()
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(said(loaded)["logits"], said(live)["logits"])


def test_estimates_count_what_is_stored(case: Case, tmp_path: Path) -> None:
    plain, coded = (cfsp.estimate(tmp_path / name, RECIPE) for name in "pq")
    assert coded.largest_block_bytes == plain.largest_block_bytes
    assert coded.parameters_after == plain.parameters_after < coded.parameters
    blocks: Counter[str] = Counter()
    for name, info in read_header(tmp_path / "q" / "model.safetensors").items():
        unused = name.endswith((".input_scale", ".k_scale", ".v_scale", ".weight_shape"))
        if not unused and (
            number := re.search(r"^(model|model\.language_model)\.layers\.(\d+)", name)
        ):
            blocks[number[2]] += info.nbytes
    assert coded.largest_stored_block_bytes == max(blocks.values())
    least, most = case.share
    assert least <= coded.largest_stored_block_bytes / plain.largest_stored_block_bytes <= most
    (read,) = (stage.bytes_read for stage in coded.stages if stage.name == "calibrate")
    assert read == sum(blocks.values())

    alone = cfsp.estimate(tmp_path / "q" / "config.json", RECIPE)
    assert alone.largest_block_bytes == plain.largest_block_bytes
    assert alone.parameters_after == plain.parameters_after
    if (tmp_path / "q" / "hf_quant_config.json").exists():  # of which the config knows nothing
        least = most = 1.0
    assert least <= alone.largest_stored_block_bytes / plain.largest_stored_block_bytes <= most


def test_in_fp32_it_is_rounded_once(tmp_path: Path) -> None:
    save(CASES["deepseek_v3, FP8"], tmp_path)
    stored = weights_of(tmp_path / "q")
    assert stored["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"].shape == (576, 32)
    assert stored["model.layers.0.mlp.up_proj.weight"].shape == (192, 32)
    model = open_model(tmp_path / "q", dtype="float32").model
    state, seen, finer = model.state_dict(), set(), set()
    for name, codes in stored.items():
        scales = stored.get(f"{name}_scale_inv")
        if scales is None:
            continue
        rows, columns = codes.shape
        each = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        if expert := re.search(r"experts\.(\d)\.(gate|up|down)_proj", name):
            fused = "down_proj" if expert[2] == "down" else "gate_up_proj"
            found = state[f"{name[: expert.start()]}experts.{fused}"][int(expert[1])]
            found = {"gate": found[:24], "up": found[24:], "down": found}[expert[2]]
        else:
            found = state[name]
        assert found.dtype == torch.float32
        assert torch.equal(found, codes.float() * each), name
        seen.add(name)
        if not torch.equal(found, found.bfloat16().float()):
            finer.add(name)
    assert len(seen) == 2 * 5 + 3 + 3 + 4 * 3
    assert len(finer) > 20  # the others' scales are powers of two
    check_streamed(opened(tmp_path / "q", "float32"), model)


def test_a_quantised_head_for_the_next_but_one_token_is_left_out(tmp_path: Path) -> None:
    """As DeepSeek-V3 has it, in a block after the last."""
    save(CASES["deepseek_v3, FP8"], tmp_path)
    last = "model.layers.1."
    rewrite(
        tmp_path / "q",
        lambda t: t.update(
            {k.replace(last, "model.layers.61."): v.clone() for k, v in t.items() if last in k}
        ),
    )
    with pytest.warns(UserWarning, match=r"model\.layers\.61\..* is left out of the result"):
        found = opened(tmp_path / "q")
    check_streamed(found, in_memory(tmp_path / "p"))


def test_a_head_may_be_quantised_too_and_parts_lie_in_several_shards(tmp_path: Path) -> None:
    save(CASES["llama, FP8 of ModelOpt"], tmp_path)
    stored = weights_of(tmp_path / "q")
    codes, scales, head = quantisers.fp8(stored["lm_head.weight"], stored["lm_head.weight"].shape)
    stored |= {"lm_head.weight": codes, "lm_head.weight_scale": scales[0, 0]}
    (tmp_path / "q" / "model.safetensors").unlink()
    weight_map = {}
    for n, shard in enumerate(("a.safetensors", "b.safetensors")):
        own = {name: value for name, value in stored.items() if ("_scale" in name) == bool(n)}
        save_file(own, tmp_path / "q" / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, shard)
    index = tmp_path / "q" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    rewrite(tmp_path / "p", lambda t: t.update({"lm_head.weight": head}))
    check_streamed(opened(tmp_path / "q"), in_memory(tmp_path / "p"))
