"""Tiny checkpoints with the configs of real ones, as their plain ones have them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cfsp.io.safetensors import read_index
from cfsp.weights.quantised import QuantisedTensor, plain_tensors

from ..conftest import make_tiny
from . import writers
from .quantisers import Stored
from .test_formats import decoded

WRITERS: dict[str, Callable[[Path, Path], Stored]] = {
    "fp8": writers.write_fp8,
    "fp8, small blocks": lambda a, b: writers.write_fp8(a, b, (32, 16), torch.bfloat16),
    "fp8, one scale": lambda a, b: writers.write_fp8(a, b, block=None, static=True),
    "float-quantized": writers.write_compressed,
    "int-quantized": lambda a, b: writers.write_compressed(a, b, "int-quantized"),
    "pack-quantized": lambda a, b: writers.write_compressed(a, b, "pack-quantized", "group"),
    "nvfp4-pack": lambda a, b: writers.write_compressed(
        a, b, "nvfp4-pack-quantized", "tensor_group"
    ),
    "FP8": lambda a, b: writers.write_modelopt(a, b, kv_cache=True),
    "FP8_PB_WO": lambda a, b: writers.write_modelopt(a, b, "FP8_PB_WO"),
    "FP8_PER_CHANNEL": lambda a, b: writers.write_modelopt(a, b, "FP8_PER_CHANNEL_PER_TOKEN"),
    "NVFP4": lambda a, b: writers.write_modelopt(a, b, "NVFP4", beside=True),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_checkpoint_has_the_tensors_of_its_plain_one(kind: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "plain", tmp_path / "quantised"
    sizes = {"num_experts": 4, "moe_intermediate_size": 48, "num_hidden_layers": 2}
    make_tiny("qwen3_moe", **sizes).bfloat16().save_pretrained(folder)
    check_checkpoint(folder, out, WRITERS[kind](folder, out), quantised=2 * (4 + 4 * 3))


def test_a_checkpoint_of_gpt_oss_does_too(tmp_path: Path) -> None:
    folder, out = tmp_path / "plain", tmp_path / "quantised"
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_hidden_layers": 2,
    }
    make_tiny("gpt_oss", **sizes).bfloat16().save_pretrained(folder)
    check_checkpoint(folder, out, writers.write_mxfp4(folder, out), quantised=2 * 2)


def check_checkpoint(folder: Path, out: Path, expected: Stored, quantised: int) -> None:
    """Names, order, shapes and values; what was not quantised keeps its place on disk."""
    own = out / "hf_quant_config.json"
    config = json.loads((own if own.exists() else out / "config.json").read_text())
    stored = read_index(out)
    found = plain_tensors(out, config.get("quantization_config", config), stored)
    plain = load_file(folder / "model.safetensors")
    assert found.keys() == plain.keys() == expected.keys()
    coded = {name for name, tensor in found.items() if isinstance(tensor, QuantisedTensor)}
    assert len(coded) == quantised
    for name, tensor in found.items():
        assert tensor.shape == plain[name].shape
        assert torch.equal(decoded(tensor), expected[name])
        if name not in coded:
            assert tensor is stored[name]
