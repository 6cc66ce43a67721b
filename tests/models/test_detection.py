"""Architectures that no layout is written down for: certain by their structure, or refused."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig

import cfsp
from cfsp.errors import CfspError
from cfsp.models.detection.ffns import detect_layout
from cfsp.models.detection.trial import checked_layout
from cfsp.models.layouts import LAYOUTS
from cfsp.models.loading import make_skeleton
from cfsp.models.opening import open_streamed
from cfsp.models.parts.ffn import FFN

from ..conftest import TINY, make_tiny, make_tokenizer
from .test_families import RECIPE, logits

UNKNOWN = {
    **dict.fromkeys(
        ("cohere", "ernie4_5", "exaone4", "helium", "hunyuan_v1_dense", "ministral", "ministral3"),
        FFN(activation=""),
    ),
    **dict.fromkeys(("olmo3", "qwen3_5_text", "seed_oss", "vaultgemma"), FFN(activation="")),
    "lfm2": FFN("feed_forward.w3", "feed_forward.w2", "feed_forward.w1", activation=""),
}
LINEAR = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
CONFIG = {
    "qwen3_5_text": {f"linear_{name}": 4 for name in LINEAR},
    "lfm2": {
        "layer_types": ["conv", "full_attention"] * 2,
        "block_auto_adjust_ff_dim": False,
        "head_dim": None,
    },
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_gated_ffn_is_found_whatever_its_parts_are_called(name: str) -> None:
    assert name not in LAYOUTS
    model = make_tiny(name, **CONFIG.get(name, {}))
    assert detect_layout(model).ffns == (UNKNOWN[name],)
    assert detect_layout(model).blocks == "model.layers"
    assert detect_layout(make_skeleton(model.config, torch.float32)) == detect_layout(model)


def test_the_written_layout_of_a_gated_family_is_what_its_structure_says() -> None:
    for name in ("llama", "gemma2", "stablelm"):
        (found,) = detect_layout(make_tiny(name)).ffns
        (written,) = LAYOUTS[name].ffns
        assert (found.up, found.down, found.gate) == (written.up, written.down, written.gate)


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_architecture_goes_all_the_way(name: str, tmp_path: Path) -> None:
    make_tiny(name, **CONFIG.get(name, {})).save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    assert open_streamed(tmp_path / "dense") is not None
    options = {"recipe": RECIPE, "eval_windows": 0, "progress": False}
    result = cfsp.prune(tmp_path / "dense", out=tmp_path / "out", **options)
    assert type(result.model).__name__.startswith("CFSP")
    dense = make_tiny(name, **CONFIG.get(name, {}))
    path = UNKNOWN[name].down
    for block, plan in zip(dense.model.layers, result.plan.blocks, strict=True):
        block.get_submodule(path).weight.data[:, plan.removed] = 0
    assert torch.allclose(logits(result.model), logits(dense), atol=1e-5)
    assert torch.equal(logits(cfsp.load(tmp_path / "out")), logits(result.model))
    again = cfsp.prune(tmp_path / "out", out=tmp_path / "again", **options)
    assert sum(again.plan.widths) < sum(result.plan.widths)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("mamba", {}, "none of its blocks has an FFN of two or three Linear"),
        ("bitnet", {}, r"mlp of BitNetDecoderLayer does not compute down\(act\(gate"),
        ("exaone", {}, "they are those of llama, with other names in checkpoints"),
        ("t5", {}, "no causal LM of it"),
    ],
)
def test_what_has_no_ffn_of_a_known_kind_is_refused_with_what_was_found(
    name: str, config: dict[str, object], message: str
) -> None:
    values = {**TINY, **config} if name != "t5" else {}
    with pytest.raises(CfspError, match=f"{message}.*; supported: llama, mistral"):
        checked_layout(make_skeleton(AutoConfig.for_model(name, **values), torch.float32))


class Odd(nn.Module):
    """Two or three Linear of the right shapes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a = nn.Linear(32, 96 if kind in ("fused", "up first") else 48)
        self.c = nn.Linear(48, 32)
        if kind in ("gated", "sum", "normalised", "reshaped"):
            self.b = nn.Linear(32, 48)
        self.dropout = nn.Dropout(0.1)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self.kind:
            case "gated":
                return self.c(torch.nn.functional.silu(self.b(x)) * self.a(x))
            case "fused":
                gate, up = self.a(x).chunk(2, dim=-1)
                return self.c(torch.nn.functional.silu(gate) * up)
            case "up first":
                up, gate = self.a(x).chunk(2, dim=-1)
                return self.c(torch.nn.functional.silu(gate) * up)
            case "ungated":
                return self.c(torch.nn.functional.relu(self.a(x)).square())
            case "linear":
                return self.c(self.dropout(self.a(x)))
            case "sum":
                return self.c(torch.nn.functional.silu(self.a(x)) + self.b(x))
            case "normalised":
                gated = torch.nn.functional.silu(self.a(x)) * self.b(x)
                return self.c(gated / gated.norm(dim=-1, keepdim=True))
            case "reshaped":
                return self.c((torch.nn.functional.silu(self.a(x)) * self.b(x)).view(2, 3, 48))
        raise ValueError(self.kind)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gated", FFN("mlp.a", "mlp.c", "mlp.b", activation="")),
        ("ungated", FFN("mlp.a", "mlp.c", None, activation="")),
        ("fused", FFN("mlp.a", "mlp.c", None, activation="", fused=True)),
    ],
)
def test_what_two_or_three_linear_compute_tells_what_they_are(kind: str, expected: FFN) -> None:
    model = make_tiny("helium")
    for layer in model.model.layers:
        layer.mlp = Odd(kind)
    assert detect_layout(model).ffns == (expected,)


@pytest.mark.parametrize("kind", ["sum", "normalised", "reshaped", "up first", "linear"])
def test_shapes_alone_convince_nobody(kind: str) -> None:
    model = make_tiny("helium")
    for layer in model.model.layers:
        layer.mlp = Odd(kind)
    with pytest.raises(CfspError, match=r"mlp of .* does not compute down\(act\(gate"):
        detect_layout(model)


def test_two_candidates_or_unlike_blocks_are_refused() -> None:
    model = make_tiny("helium")
    model.model.layers[1].more = Odd("gated")
    with pytest.raises(CfspError, match="HeliumDecoderLayer should have one FFN, found mlp, more"):
        detect_layout(model)
    model = make_tiny("helium")
    model.model.layers[1].mlp = Odd("gated")
    with pytest.raises(CfspError, match="blocks with FFNs of 2 kinds"):
        detect_layout(model)


def test_code_from_elsewhere_is_refused_before_any_work() -> None:
    model = make_tiny("helium")
    model.__class__ = type("Own", (type(model),), {"__module__": "somewhere"})
    with pytest.raises(CfspError, match="its code is not part of transformers"):
        cfsp.prune(model, make_tokenizer(), RECIPE, progress=False)


def test_blocks_that_return_more_than_hidden_states_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cfsp.models.layouts.TUPLE_BLOCKS", frozenset())
    model = make_tiny("bloom")
    with pytest.raises(CfspError, match="BloomBlock is not given the hidden states"):
        cfsp.prune(model, make_tokenizer(), RECIPE, progress=False)


def test_a_checkpoint_of_an_unknown_family_names_its_classes(tmp_path: Path) -> None:
    result = cfsp.prune(
        make_tiny("helium"), make_tokenizer(), RECIPE, tmp_path / "out", eval_windows=0
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "cfsp_helium"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_cfsp.CFSPHeliumForCausalLM"
    assert config["cfsp_config"]["blocks"] == "layers"
    assert config["cfsp_config"]["sizes"]["mlp.down_proj.weight"] == ["intermediate_size", 1, 1]
    assert result.plan.widths == tuple(
        int(config["per_layer_config"].get(str(n), config)["intermediate_size"]) for n in range(4)
    )


def test_a_pruned_block_with_as_many_channels_as_the_hidden_size_is_found() -> None:
    model = make_tiny("helium", intermediate_size=32, hidden_size=32)
    assert detect_layout(model).ffns == (UNKNOWN["helium"],)
