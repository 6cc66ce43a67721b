"""A folder that reloads: per-block widths in the config, the modeling file beside the weights."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import CfspError, reason
from ..io.safetensors import TensorInfo
from ..io.shard_writer import MAX_SHARD_BYTES, ShardWriter, pack_shards, write_index
from ..models import modeling_cfsp
from ..models.loading import auto_class, check_has_config, load_config, pick_device
from ..models.opening import OpenModel
from ..models.pruned_classes import is_stock
from ..models.tensors import saved_tensors, tensor_infos
from ..weights.mapping import converted
from .terms import copy_terms, is_of

MODELING_FILE = Path(modeling_cfsp.__file__)
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""What a multimodal model has beside its tokenizer, for AutoProcessor."""


def load(
    folder: str | Path, *, dtype: str = "auto", device: str = "auto", **options: Any
) -> PreTrainedModel:
    """Load a pruned model for use, in eval mode.

    Args:
        folder: what ``cfsp prune`` wrote.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", "cuda:1".
        options: handed to ``from_pretrained``.
    """
    where = pick_device(device)
    check_has_config(folder)
    kind = auto_class(load_config(str(folder)))
    precision = dtype if dtype == "auto" else getattr(torch, dtype)
    options = {"dtype": precision, "trust_remote_code": False, **options}
    model = kind.from_pretrained(str(folder), **options)
    return model.to(where).eval()


def check_saveable(model: PreTrainedModel) -> None:
    """Raise CfspError for a live model whose configs no folder can hold."""
    try:
        json.dumps(model.config.to_diff_dict())
        if model.generation_config is not None:
            model.generation_config.validate(strict=True)
            model.generation_config.to_json_string()
    except (TypeError, ValueError) as error:
        raise CfspError(f"the live model cannot be saved: {reason(error)}") from error


def write_tensors(
    folder: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Write tensors as safetensors, sharded where large; ``infos``: what they will be, in order."""
    shards = pack_shards(infos, MAX_SHARD_BYTES)
    with ShardWriter(folder, shards) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)
    write_index(folder, shards)


def write_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write all tensors once (tied ones under their first name)."""
    tensors = converted(model, saved_tensors(model))
    write_tensors(folder, tensor_infos(tensors), tensors.items())


def write_model(opened: OpenModel, folder: Path) -> None:
    """Everything of a model's folder: weights, config, modeling file, and what is beside them."""
    write_weights(opened.model, folder)
    write_settings(opened, folder)


def write_settings(opened: OpenModel, folder: Path) -> None:
    """Everything of a model's folder but the weights."""
    model = opened.model
    config = model.config.to_diff_dict()
    for name in ("_name_or_path", "_model_name_or_path", "auto_map"):
        config.pop(name, None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    if not is_stock(model):
        shutil.copyfile(MODELING_FILE, folder / MODELING_FILE.name)
        stock = modeling_cfsp.stock_config(type(model.config))
        classes = {"AutoConfig": stock, **modeling_cfsp.family_classes(stock)}
        module = f"{MODELING_FILE.stem}.{modeling_cfsp.PREFIX}"
        config["auto_map"] = {auto: module + kind.__name__ for auto, kind in classes.items()}
    if (fewer := opened.layout.fewer_experts) is not None:  # older readers know it as these
        text = config.get("text_config", config)
        names = type(model.config.get_text_config()).attribute_map.items()
        text.update({alias: fewer.count for alias, name in names if name == fewer.name})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_companions(opened, folder)


def write_companions(opened: OpenModel, folder: Path) -> None:
    """Generation config, the tokenizer with its chat template, what prepares images, and the terms
    of the license."""
    if opened.model.generation_config is not None:
        opened.model.generation_config.save_pretrained(folder)
    if opened.tokenizer is not None:
        opened.tokenizer.save_pretrained(folder)
    source, config = opened.folder, opened.model.config
    if source is not None and config.get_text_config() is not config:
        for name in PROCESSOR_FILES:
            if is_of(source, source / name) and not (folder / name).exists():
                shutil.copyfile(source / name, folder / name)
    copy_terms(opened.folder, folder)
