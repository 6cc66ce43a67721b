"""Where a checkpoint says how it is quantised."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, FineGrainedFP8Config

from cfsp.errors import CfspError
from cfsp.models.inspection import check_live, quantization_of

from ..conftest import make_tiny

TOLD = {"quant_method": "fp8", "weight_block_size": [128, 128]}
OF_MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_in_the_config(key: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **{key: TOLD})
    assert quantization_of(tmp_path, config) == TOLD


def test_in_that_of_the_text_model(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gemma3", text_config={"quantization_config": TOLD})
    assert quantization_of(tmp_path, config) == TOLD


def test_as_an_object_of_transformers(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama")
    config.quantization_config = FineGrainedFP8Config(weight_block_size=(64, 64))
    told = quantization_of(tmp_path, config)
    assert told is not None
    assert (told["quant_method"], tuple(told["weight_block_size"])) == ("fp8", (64, 64))


def test_in_the_file_of_modelopt_where_the_config_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(OF_MODELOPT))
    assert quantization_of(tmp_path, AutoConfig.for_model("llama")) == OF_MODELOPT
    config = AutoConfig.for_model("llama", quantization_config=TOLD)
    assert quantization_of(tmp_path, config) == TOLD


@pytest.mark.parametrize("text", ["[]", '"int8"', '{"quantization": {}}'])
def test_what_says_nothing_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text(text)
    with pytest.raises(CfspError, match=r"is quantised \(of unknown method\)"):
        quantization_of(tmp_path, AutoConfig.for_model("llama"))


def test_nowhere(tmp_path: Path) -> None:
    assert quantization_of(tmp_path, AutoConfig.for_model("llama")) is None
    assert quantization_of("an/id", AutoConfig.for_model("gemma3")) is None


def test_a_quantised_live_model_is_refused() -> None:
    model = make_tiny()
    check_live(model)
    model.config.quantization_config = FineGrainedFP8Config()
    with pytest.raises(CfspError, match=r"^LlamaForCausalLM is quantised \(fp8\); only plain"):
        check_live(model)
