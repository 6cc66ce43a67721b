"""Pruned architectures in transformers' Auto classes, without an import of transformers or torch.

transformers keeps tables of names, such as ``{"llama": "LlamaConfig"}``, and imports
``transformers.models.llama`` when it needs the class. Every family gets a pruned one beside it in
these tables right after transformers makes them, in the middle of importing its own models; the
pruned family's module is made when it is asked for, once a checkpoint of it is loaded. What needs
transformers is imported inside functions, for the same reason.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PRUNED_PREFIX = "cfsp_"
"""A pruned checkpoint with a width of its own per block has this before its ``model_type``."""
CLASS_PREFIX = "CFSP"
FAMILY_PREFIX = f"transformers.models.{PRUNED_PREFIX}"
AUTO = "transformers.models.auto"
CAUSAL_LM = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
IMAGE_TEXT_TO_TEXT = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"
TABLES = {
    f"{AUTO}.configuration_auto": ("CONFIG_MAPPING_NAMES",),
    f"{AUTO}.modeling_auto": (
        "MODEL_MAPPING_NAMES",
        CAUSAL_LM,
        IMAGE_TEXT_TO_TEXT,
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    ),
}
"""The tables of each module of transformers, in the order in which it imports them."""
PEFT = "peft.utils.constants"
"""Has tables of what is adapted in a family where the user does not say it."""


class _Family(ModuleType):
    """The module of a pruned family: registers the family when a class of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(CLASS_PREFIX):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        from .models import modeling_cfsp
        from .models.registration import register_family

        register_family(self.__name__.removeprefix(FAMILY_PREFIX))
        return getattr(modeling_cfsp, name)


def name_families(module: ModuleType) -> None:
    """Add the pruned families to the tables of a module of transformers or peft."""
    of_peft = module.__name__ == PEFT
    names = [name for name in vars(module) if name.startswith("TRANSFORMERS_MODELS_TO_")]
    with_images = getattr(module, IMAGE_TEXT_TO_TEXT, {})
    for name in TABLES.get(module.__name__, names):
        table = getattr(module, name)
        for family, known in list(table.items()):
            if name == CAUSAL_LM and with_images.get(family, known) != known:
                continue  # a class of the text alone, which has a family of its own
            # Some families have several models.
            if not family.startswith(PRUNED_PREFIX) and (of_peft or isinstance(known, str)):
                own = known if of_peft else CLASS_PREFIX + known
                table.setdefault(PRUNED_PREFIX + family, own)


class _Finder(MetaPathFinder, Loader):
    """Runs :func:`name_families` right after a module that has tables is imported, and makes the
    modules of pruned families."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.startswith(FAMILY_PREFIX):
            return ModuleSpec(name, self)
        spec = PathFinder.find_spec(name, path, target) if name in (*TABLES, PEFT) else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            name_families(module)

        # The loader was made for this one module: no other import goes through it.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Family(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: its classes are made when they are asked for."""


def know_pruned_models() -> None:
    """Let the Auto classes of transformers know pruned models, imported before or later."""
    configs, models = TABLES
    sys.meta_path.insert(0, _Finder())
    for name in (configs, PEFT):
        if name in sys.modules:
            name_families(sys.modules[name])
    if models in sys.modules:  # what it derives from the tables is made: each family in full
        from .models.registration import register

        register()
