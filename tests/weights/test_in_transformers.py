"""transformers loads the written checkpoints, to the same weights where it reads them right."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from ..conftest import make_tiny
from . import writers


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_fp8_of_whole_blocks(family: str, tmp_path: Path) -> None:
    more = {"num_experts": 4, "moe_intermediate_size": 48} if family == "qwen3_moe" else {}
    make_tiny(family, **more).bfloat16().save_pretrained(tmp_path / "m")
    plain = writers.write_fp8(tmp_path / "m", tmp_path / "q", (16, 16))
    check_same(tmp_path, plain, FineGrainedFP8Config(weight_block_size=(16, 16), dequantize=True))


def test_mxfp4(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4}
    make_tiny("gpt_oss", **sizes).bfloat16().save_pretrained(tmp_path / "m")
    plain = writers.write_mxfp4(tmp_path / "m", tmp_path / "q")
    check_same(tmp_path, plain, Mxfp4Config(dequantize=True))


def check_same(folder: Path, plain: dict[str, torch.Tensor], how: object) -> None:
    writers.write_plain(folder / "m", folder / "p", plain)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder / "q", dtype=torch.bfloat16, quantization_config=how
    )
    ours = AutoModelForCausalLM.from_pretrained(folder / "p", dtype=torch.bfloat16)
    expected = ours.state_dict()
    found = theirs.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
