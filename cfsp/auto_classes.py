"""Pruned architectures in transformers' Auto classes, without an import of transformers or torch.

transformers keeps tables of names, such as ``{"llama": "LlamaConfig"}``, and imports
``transformers.models.llama`` when it needs the class. Pruned families get entries in these tables
right after transformers makes them, and a module there that gives the classes when asked: nothing
is imported for a family until a checkpoint of it is loaded. At the moment that the tables are made
nothing more could be: transformers makes them in the middle of importing its own models.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PRUNED_PREFIX = "cfsp_"
"""A pruned checkpoint with a width of its own per block has this before its ``model_type``."""
CLASS_PREFIX = "CFSP"
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "granite"),
    *("cohere2", "smollm3", "stablelm", "phi3", "glm4", "phi", "starcoder2", "gpt_neox", "falcon"),
    *("bloom", "opt", "mixtral", "qwen3_moe", "deepseek_v3", "gpt2"),
)
"""The keys of :data:`cfsp.models.layouts.LAYOUTS`, which imports torch."""
TABLES = {
    "transformers.models.auto.configuration_auto": ("CONFIG_MAPPING_NAMES",),
    "transformers.models.auto.modeling_auto": (
        "MODEL_MAPPING_NAMES",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    ),
}
"""The tables of each module of transformers. The first module is imported before the second."""


class _Family(ModuleType):
    """What transformers imports for a pruned family: registers it when a class is asked for."""

    def __init__(self, family: str) -> None:
        super().__init__(f"transformers.models.{PRUNED_PREFIX}{family}")
        self.family = family

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(CLASS_PREFIX):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        from .models import modeling_cfsp
        from .models.registration import register_family

        register_family(self.family)
        return getattr(modeling_cfsp, name)


def name_families(module: ModuleType) -> None:
    """Add the pruned families to the tables of a module of transformers."""
    for table in TABLES[module.__name__]:
        names = getattr(module, table)
        for family in FAMILIES:
            if family in names:
                entry = _Family(family)
                sys.modules.setdefault(entry.__name__, entry)
                names[PRUNED_PREFIX + family] = CLASS_PREFIX + names[family]


class _AfterImport(MetaPathFinder):
    """Runs :func:`name_families` right after a module that has tables is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in TABLES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            name_families(module)

        # The loader was made for this one module: no other import goes through it.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def know_pruned_models() -> None:
    """Let the Auto classes of transformers know pruned models, imported before or later."""
    configs, models = TABLES
    if models in sys.modules:  # what it derives from the tables is made: each family in full
        from .models.registration import register

        register()
        return
    sys.meta_path.insert(0, _AfterImport())
    if configs in sys.modules:
        name_families(sys.modules[configs])
