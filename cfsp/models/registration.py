"""The classes of pruned models with per-block widths, made known to transformers."""

import transformers
from transformers import CONFIG_MAPPING, AutoConfig

from . import modeling_cfsp
from .layouts import LAYOUTS


def register() -> None:
    """Teach transformers' Auto classes the pruned architectures, all of them at once.

    Importing cfsp is enough for ``from_pretrained``, which then needs no trust flag.
    """
    for model_type in LAYOUTS:
        if model_type in CONFIG_MAPPING:
            register_family(model_type)


def register_family(model_type: str) -> None:
    stock = CONFIG_MAPPING[model_type]
    config = modeling_cfsp.pruned_class(stock)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    config.register_for_auto_class()
    for auto, stock_class in modeling_cfsp.family_classes(stock).items():
        own = modeling_cfsp.pruned_class(stock_class)
        getattr(transformers, auto).register(config, own, exist_ok=True)
        own.register_for_auto_class(auto)
