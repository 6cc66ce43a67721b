"""What the wheel tells vLLM, without vLLM: tests/clients runs the real one."""

import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from cfsp.models import modeling_cfsp
from cfsp.models.loading import load_config
from cfsp.vllm_plugin import NATIVE_FAMILIES

from ..conftest import make_tiny, make_tokenizer
from ..mixed import write_mixed

ROOT = Path(__file__).resolve().parents[2]


class Stock:
    """What stands for a class of vLLM."""


class Projection(nn.Module):
    """What stands for vLLM's RowParallelLinear."""

    def __init__(
        self, input_size: int, output_size: int, *, bias: bool, quant_config: object, prefix: str
    ) -> None:
        super().__init__()
        self.input_size, self.output_size, self.bias = input_size, output_size, bias
        self.quant_config, self.prefix = quant_config, prefix


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Our module for vLLM, with stand-ins in it."""
    linears = SimpleNamespace(RowParallelLinear=Projection)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.linear", linears)
    yield import_module("cfsp.models.vllm")
    del sys.modules["cfsp.models.vllm"]


def test_the_entry_point_names_classes_that_exist(
    monkeypatch: pytest.MonkeyPatch, own: ModuleType
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["cfsp"].partition(":")
    named: dict[str, str] = {}
    registry = SimpleNamespace(register_model=named.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    getattr(import_module(module), function)()
    assert len(named) == 6
    for architecture, target in named.items():
        assert hasattr(modeling_cfsp, architecture)
        assert target == f"cfsp.models.vllm:{architecture}"
    for family, stock in NATIVE_FAMILIES.items():
        assert CONFIG_MAPPING[family].model_type == family
        kind = type(stock, (Stock,), {})
        of_family = f"vllm.model_executor.models.{family}"
        monkeypatch.setitem(sys.modules, of_family, SimpleNamespace(**{stock: kind}))
        assert getattr(own, f"CFSP{stock}").__bases__ == (own.PerBlockSizes, kind)
        assert f"CFSP{stock}" in named
    with pytest.raises(AttributeError, match="CFSPGemmaForCausalLM"):
        own.CFSPGemmaForCausalLM  # noqa: B018


def make_block(config: object, made: list[tuple[int, ...]]) -> Callable[..., nn.Module]:
    """What makes blocks as the config says, and notes what it says."""
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")

    def make(prefix: str) -> nn.Module:
        heads, _, width = sizes = tuple(getattr(config, name) for name in names)
        made.append(sizes)
        block, quant = nn.Module(), f"quantised {prefix}"
        for path, size in (("self_attn.o_proj", heads * 8), ("mlp.down_proj", width)):
            part, _, name = path.partition(".")
            linear = Projection(size, 32, bias=False, quant_config=quant, prefix=f"{prefix}.{path}")
            block.add_module(part, nn.ModuleDict({name: linear}))
        return block

    return make


def test_every_block_is_made_at_its_own_sizes_without_what_it_lacks(
    own: ModuleType, tmp_path: Path
) -> None:
    wide = make_tiny(num_attention_heads=8, num_key_value_heads=4)
    widths, groups = (30, 48, 0, 20), (3, 0, 1, 2)
    write_mixed(wide, make_tokenizer(), tmp_path / "m", groups, widths, added_bias=True)
    config, made = load_config(tmp_path / "m"), list[tuple[int, ...]]()
    dense = config.to_dict()
    names = [f"model.layers.{n}.{part}" for n in range(12) for part in ("self_attn.attn", "mlp.e")]
    known = SimpleNamespace(static_forward_context=dict.fromkeys(names))
    known.static_all_moe_layers = [name for name in names if name.endswith("mlp.e")]
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=config), compilation_config=known
    )

    def make_layers(count: int, make: Callable[..., nn.Module], prefix: str) -> list[nn.Module]:
        return [make(prefix=f"{prefix}.{number}") for number in range(count)]

    blocks = own.make_blocks(
        make_layers, vllm_config, 4, make_block(config, made), prefix="model.layers"
    )
    assert [made[0], made[2][:2], made[3]] == [(6, 3, 30), (2, 1), (4, 2, 20)]
    assert made[1][2] == 48
    assert config.to_dict() == dense
    out, down = blocks[3].self_attn.o_proj, blocks[3].mlp.down_proj
    assert (out.input_size, out.output_size, out.bias) == (32, 32, True)
    assert (down.input_size, down.output_size, down.bias) == (20, 32, True)
    assert down.quant_config == "quantised model.layers.3"
    assert down.prefix == "model.layers.3.mlp.down_proj"
    states = torch.ones(2, 32)
    for gone in (blocks[1].self_attn, blocks[2].mlp):
        assert not gone(hidden_states=states).any()
    assert not blocks[1].self_attn(positions=None, hidden_states=states).any()
    gone_names = {"model.layers.1.self_attn.attn", "model.layers.2.mlp.e"}
    assert known.static_forward_context.keys() == {*names} - gone_names
    assert "model.layers.2.mlp.e" not in known.static_all_moe_layers
    assert len(known.static_all_moe_layers) == 11


def test_vllms_own_way_to_make_blocks_is_back_afterwards(own: ModuleType) -> None:
    def stock() -> None: ...

    used = []
    maker = SimpleNamespace(make_layers=stock)

    class OfVllm(nn.Module):
        def __init__(self, *, vllm_config: object, prefix: str) -> None:
            used.append(maker.make_layers)
            raise MemoryError

    kind = type("Own", (own.PerBlockSizes, OfVllm), {"makes_blocks": maker})
    with pytest.raises(MemoryError):
        kind(vllm_config=None)
    assert used[0].func is own.make_blocks
    assert maker.make_layers is stock


def test_vllm_is_not_imported_before_it_asks() -> None:
    """Naming the classes imports none of them: vLLM does, in the process that runs a model."""
    assert "cfsp.models.vllm" not in sys.modules
