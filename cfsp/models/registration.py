"""The classes of pruned models with per-block widths, made known to transformers."""

from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
)

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
    stocks = (stock, MODEL_MAPPING[stock], MODEL_FOR_CAUSAL_LM_MAPPING[stock])
    config, model, causal_lm = map(pruned_class, stocks)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
    causal_lm.register_for_auto_class("AutoModelForCausalLM")


def pruned_class(stock: type) -> Any:
    """The class with per-block widths of a class of transformers."""
    return getattr(modeling_cfsp, modeling_cfsp.PREFIX + stock.__name__)
