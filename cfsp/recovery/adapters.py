"""LoRA adapters by peft: attached, merged, saved."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import CfspError
from .targets import Projections


def require_peft() -> None:
    """Raise CfspError where peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise CfspError(
            "method 'lora' needs the package peft: pip install 'cfsp[recover]'; "
            "method 'ffn' needs none"
        ) from None


def attach(
    model: PreTrainedModel,
    blocks: Sequence[Projections],
    ranks: Sequence[int],
    scaling: float,
    seed: int,
) -> Any:
    """A peft model around this one, which is frozen and whose projections are adapted in place, by
    the rank of their block. ``scaling``: alpha over rank; ``seed``: of the half that is not zero.
    """
    from peft import LoraConfig, get_peft_model

    by_name = {name: rank for block, rank in zip(blocks, ranks, strict=True) for name in block}
    config = LoraConfig(
        r=max(ranks),
        lora_alpha=max(ranks),
        rank_pattern=by_name,
        alpha_pattern={name: scaling * rank for name, rank in by_name.items()},
        target_modules=list(by_name),
        fan_in_fan_out=isinstance(model.get_submodule(next(iter(by_name))), Conv1D),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks by a name of older transformers
        return get_peft_model(model, config)


def merge(adapted: Any) -> PreTrainedModel:
    """The model that was adapted, its projections plain again with the adapters added in fp32."""
    for module in adapted.modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            module.base_layer.float()
    return adapted.merge_and_unload().requires_grad_(False)


def save_adapter(adapted: Any, folder: Path, base: str) -> None:
    """Write the adapters as peft reads them, for the model named ``base``."""
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = base
    config.target_modules = sorted(config.target_modules)  # a set's order changes with the process
    adapted.save_pretrained(folder, save_embedding_layers=False)
