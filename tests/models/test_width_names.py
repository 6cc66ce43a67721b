"""What configs call the widths of FFNs, found by building models of other widths."""

import pytest
import torch

from cfsp.models.detection.width_names import width_name
from cfsp.models.loading import make_skeleton
from cfsp.models.parts.channels import UnitAxis

from ..conftest import make_tiny

ROWS, COLUMNS = UnitAxis(0), UnitAxis(1)


@pytest.mark.parametrize(
    ("family", "config", "name", "axis", "expected"),
    [
        ("llama", {}, "model.layers.1.mlp.up_proj.weight", ROWS, "intermediate_size"),
        ("llama", {"intermediate_size": 32}, "model.layers.1.mlp.down_proj.weight", COLUMNS,
         "intermediate_size"),
        ("opt", {"ffn_dim": 40}, "model.decoder.layers.0.fc2.weight", COLUMNS, "ffn_dim"),
        ("gpt2", {"n_embd": 32, "n_head": 4}, "transformer.h.0.mlp.c_proj.weight", ROWS, "n_inner"),
        (
            "phi3",
            {"intermediate_size": 40},
            "model.layers.0.mlp.gate_up_proj.weight",
            UnitAxis(0, (1, 1)),
            "intermediate_size",
        ),
        # Its width is rounded up to a multiple, which happens to be the width.
        ("lfm2", {"layer_types": ["conv", "full_attention"] * 2, "head_dim": None},
         "model.layers.0.feed_forward.w2.weight", COLUMNS, ""),
        (
            "qwen3_moe",
            {"num_experts": 4, "moe_intermediate_size": 48},
            "model.layers.0.mlp.experts.down_proj",
            UnitAxis(2),
            "moe_intermediate_size",
        ),
    ],
)  # fmt: skip
def test_the_value_that_decides_a_width_is_found(
    family: str, config: dict[str, object], name: str, axis: UnitAxis, expected: str
) -> None:
    model = make_tiny(family, **config)
    assert width_name(model, name, axis, "another") == expected
    skeleton = make_skeleton(model.config, torch.float32)
    assert width_name(skeleton, name, axis, "another") == expected


def test_a_name_that_another_ffn_has_is_not_given_twice() -> None:
    model = make_tiny("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    assert width_name(model, name, ROWS, "other", taken={"intermediate_size"}) == ""


def test_a_pruned_model_says_it_itself() -> None:
    model = make_tiny("llama")
    model.config.cfsp_config = {"channels": {"mlp.up_proj.weight": ["known", 0, 1]}}
    assert width_name(model, "model.layers.0.mlp.up_proj.weight", ROWS) == "known"
