"""Values that are not finite: weights are refused where they are read, logits compared as such."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cfsp
from cfsp.checkpoints.verification import take_probe, verify
from cfsp.errors import CfspError

from ..conftest import TEXT, make_tiny, make_tokenizer

CALIBRATION = cfsp.Calibration(dataset=TEXT, samples=2, seqlen=16)
RECIPE = cfsp.Recipe(scorer="cfsp", width_multiple=8, calibration=CALIBRATION)


@pytest.mark.parametrize("name", ["mlp.up_proj", "self_attn.o_proj", "input_layernorm"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_block_with_other_than_finite_weights_is_named(
    name: str, value: float, tiny_folder: Path, tmp_path: Path
) -> None:
    file = tiny_folder / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.layers.1.{name}.weight"].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CfspError, match=rf"block 1: {name}\.weight holds NaN or infinite values"):
        cfsp.prune(tiny_folder, None, RECIPE, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_an_expert_that_no_token_reaches_is_looked_at_too(tmp_path: Path) -> None:
    """Its NaN comes to no activation of the calibration."""
    model = make_tiny("mixtral", num_local_experts=4, num_experts_per_tok=1)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[3] = -model.model.layers[0].mlp.gate.weight.data.abs().sum(0)
    model.save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    key = max(key for key in tensors if "layers.2" in key and "experts.3" in key)
    tensors[key].view(-1)[-1] = float("nan")
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CfspError, match=r"block 2: .*experts.* holds NaN or infinite values"):
        cfsp.prune(tmp_path / "m", None, RECIPE, tmp_path / "out", progress=False)


def test_equal_logits_may_be_nan_in_both_and_in_both_alone(tiny_folder: Path) -> None:
    model = make_tiny()
    expected = take_probe(model)
    for value in (float("nan"), float("inf")):
        logits = expected.logits.clone()
        logits[0, 0, 0] = value
        with pytest.raises(RuntimeError, match="differs from the pruned one"):
            verify(tiny_folder, type(expected)(logits, expected.buffers), torch.device("cpu"))
    verify(tiny_folder, expected, torch.device("cpu"))
    for weights in (model, reloaded := make_tiny()):
        weights.lm_head.weight.data[5] = float("nan")
    reloaded.save_pretrained(tiny_folder)
    assert take_probe(model).logits.isnan().any()
    verify(tiny_folder, take_probe(model), torch.device("cpu"))
