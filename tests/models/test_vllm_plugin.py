"""What the wheel tells vLLM, without vLLM: tests/clients runs the real one."""

import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import CONFIG_MAPPING

from cfsp.models import modeling_cfsp
from cfsp.vllm_plugin import NATIVE_FAMILIES

ROOT = Path(__file__).resolve().parents[2]


class Stock:
    """What stands for a class of vLLM."""


def test_the_entry_point_names_classes_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["cfsp"].partition(":")
    named: dict[str, str] = {}
    registry = SimpleNamespace(register_model=named.__setitem__)
    linears = SimpleNamespace(LinearBase=Stock, RowParallelLinear=Stock)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.linear", linears)
    getattr(import_module(module), function)()
    assert len(named) == 6
    own = import_module("cfsp.models.vllm")
    del sys.modules["cfsp.models.vllm"]  # stand-ins are in it
    for architecture, target in named.items():
        assert hasattr(modeling_cfsp, architecture)
        assert target == f"cfsp.models.vllm:{architecture}"
    for family, stock in NATIVE_FAMILIES.items():
        assert CONFIG_MAPPING[family].model_type == family
        kind = type(stock, (Stock,), {})
        of_family = f"vllm.model_executor.models.{family}"
        monkeypatch.setitem(sys.modules, of_family, SimpleNamespace(**{stock: kind}))
        assert getattr(own, f"CFSP{stock}").__bases__ == (own.PerBlockWidths, kind)
        assert f"CFSP{stock}" in named
    with pytest.raises(AttributeError, match="CFSPGemmaForCausalLM"):
        own.CFSPGemmaForCausalLM  # noqa: B018


def test_vllm_is_not_imported_before_it_asks() -> None:
    """Naming the classes imports none of them: vLLM does, in the process that runs a model."""
    assert "cfsp.models.vllm" not in sys.modules
