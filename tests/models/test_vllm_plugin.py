"""What the wheel tells vLLM, without vLLM: tests/clients runs the real one."""

import ast
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from cfsp.models import modeling_cfsp

ROOT = Path(__file__).resolve().parents[2]


def test_the_entry_point_names_classes_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["cfsp"].partition(":")
    named: dict[str, str] = {}
    registry = SimpleNamespace(register_model=named.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    getattr(import_module(module), function)()
    tree = ast.parse((ROOT / "cfsp" / "models" / "vllm.py").read_text())
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert len(named) == 4
    for architecture, target in named.items():
        assert hasattr(modeling_cfsp, architecture)
        assert target == f"cfsp.models.vllm:{architecture}"
        assert architecture in defined


def test_vllm_is_not_imported_before_it_asks() -> None:
    """Naming the classes imports none of them: vLLM does, in the process that runs a model."""
    assert "cfsp.models.vllm" not in sys.modules
