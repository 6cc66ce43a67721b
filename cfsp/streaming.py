"""Open a model folder as a skeleton, whose blocks are read when their turn comes."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from .blocks import StoredBlocks, set_parameters_
from .errors import CfspError
from .layouts import Layout, find_layout
from .models import OpenModel, check_folder, load_part, pick_device
from .shards import StoredTensor, read_index, read_tensors

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HUB_FILES = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja"]


def _dtype(
    dtype: str, config: Any, tensors: dict[str, StoredTensor], names: list[str]
) -> torch.dtype:
    """The dtype that transformers loads with: as asked, as the config says, as stored."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return tensors[names[0]].dtype


def _skeleton(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters on meta; buffers are real, since no file holds the rotary ones."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def _matched(
    folder: Path, model: PreTrainedModel, layout: Layout, tensors: dict[str, StoredTensor]
) -> dict[str, StoredTensor] | None:
    """The stored tensor of every parameter; None where transformers would convert or rename.

    Raises:
        CfspError: nothing in the checkpoint could be the missing tensor, or shapes differ.
    """
    tied = set(model.all_tied_weights_keys)
    wanted = {name: value for name, value in model.state_dict().items() if name not in tied}
    missing = sorted(wanted.keys() - tensors.keys())
    unknown = sorted(
        name for name in tensors.keys() - wanted.keys() if not name.endswith("rotary_emb.inv_freq")
    )
    if missing and not unknown:
        raise CfspError(f"{folder}: missing keys in the weights: {', '.join(missing[:3])}")
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if missing or unknown or not wanted.keys() <= parameters:
        return None
    found = {name: tensors[name] for name in wanted}
    if any(stored.dtype not in FLOATS for stored in found.values()):
        return None
    for name, stored in found.items():
        if stored.shape != tuple(wanted[name].shape):
            raise CfspError(
                f"cannot load {folder}: {name} is {list(stored.shape)} in the weights, "
                f"{list(wanted[name].shape)} by the config"
            )
    return found


def local_folder(model: str | Path) -> Path | None:
    """The folder of a model: itself, or the local snapshot of a hub id. None where there is none
    with safetensors."""
    path = Path(model)
    if path.suffix == ".gguf":
        return None
    if path.exists():
        check_folder(path)
        return path
    if path.is_absolute() or str(model).startswith(".") or str(model).count("/") > 1:
        return None
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(str(model), allow_patterns=HUB_FILES))
    except (OSError, ValueError):  # told in full by the loader that is tried next
        return None
    return folder if any(folder.glob("model*.safetensors")) else None


def open_streamed(
    model: str | Path, dtype: str = "auto", device: str = "auto", tokenizer: Any = None
) -> OpenModel | None:
    """Open a model folder or hub id of which only one block at a time will be in memory.

    Args:
        model: local folder or hub id.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", "cuda:1".
        tokenizer: instead of the folder's.

    Returns:
        The skeleton with everything but its blocks in memory; or None where the checkpoint does
        not hold the model's parameters one for one under their own names, as floats: quantised,
        with an adapter, of an older naming, in GGUF or pickled. Such a model is loaded whole.

    Raises:
        CfspError: not found, corrupt, incomplete, unsupported architecture.
    """
    where = pick_device(device)
    folder = local_folder(model)
    if folder is None or (folder / "adapter_config.json").exists():
        return None
    config = load_part(str(folder), AutoConfig)
    layout = find_layout(config.model_type)
    if getattr(config, "quantization_config", None) is not None:
        return None
    tensors = read_index(folder)
    floats = [name for name, stored in tensors.items() if stored.dtype in FLOATS]
    if not floats:
        return None
    precision = _dtype(dtype, config, tensors, floats)
    skeleton = _skeleton(config, precision)
    found = _matched(folder, skeleton, layout, tensors)
    if found is None:
        return None
    in_blocks = {k: stored for k, stored in found.items() if k.startswith(f"{layout.blocks}.")}
    outer = {name: stored for name, stored in found.items() if name not in in_blocks}
    set_parameters_(
        skeleton,
        {name: tensor.to(precision).to(where) for name, tensor in read_tensors(outer).items()},
    )
    skeleton.tie_weights()
    _move_buffers_(skeleton, where)
    skeleton.generation_config = _generation_config(folder)
    if tokenizer is None:
        tokenizer = load_part(str(folder), AutoTokenizer)
    name = folder.name if Path(model).exists() else str(model)
    blocks = StoredBlocks(skeleton, layout, in_blocks, precision, where)
    return OpenModel(skeleton, tokenizer, layout, name, blocks)


def _move_buffers_(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _generation_config(folder: Path) -> GenerationConfig:
    """As ``from_pretrained`` finds it: its own file, or what the model's config says."""
    if (folder / "generation_config.json").is_file():
        return load_part(str(folder), GenerationConfig)
    return load_part(
        str(folder), GenerationConfig, config_file_name="config.json", _from_model_config=True
    )
