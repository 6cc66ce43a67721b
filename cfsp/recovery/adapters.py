"""LoRA adapters by peft: attached, merged, saved."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import CfspError
from .targets import BlockProjections


def require_peft() -> None:
    """Raise CfspError where peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise CfspError(
            "method 'lora' needs the package peft: pip install 'cfsp[recover]'; "
            "method 'ffn' needs none"
        ) from None


def ranks_by_name(blocks: Sequence[BlockProjections], ranks: Sequence[int]) -> dict[str, int]:
    """Rank of every projection by its name in the model."""
    return {name: rank for block, rank in zip(blocks, ranks, strict=True) for name in block}


def attach(model: PreTrainedModel, ranks: Mapping[str, int], scaling: float, seed: int) -> Any:
    """A peft model around this one, whose projections become adapted ones in place.

    Args:
        model: whose parameters are frozen by this.
        ranks: of every adapter by the name of its projection.
        scaling: alpha over rank, of all.
        seed: of the random half of each adapter; the other half is zero.
    """
    from peft import LoraConfig, get_peft_model

    first = model.get_submodule(next(iter(ranks)))
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=dict(ranks),
        alpha_pattern={name: scaling * rank for name, rank in ranks.items()},
        target_modules=list(ranks),
        fan_in_fan_out=isinstance(first, Conv1D),
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
            weight = module.base_layer.weight
            weight.data = weight.data.float()
    merged = adapted.merge_and_unload()
    merged.requires_grad_(False)
    return merged


def save_adapter(adapted: Any, folder: Path, base: str) -> None:
    """Write the adapters as peft reads them, for the model named ``base``."""
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = base
    config.target_modules = sorted(config.target_modules)  # a set's order changes with the process
    adapted.save_pretrained(folder, save_embedding_layers=False)
