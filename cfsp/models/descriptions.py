"""Models as their configs and the headers of their weights tell: no weights are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..errors import CfspError
from ..io.shards import TensorInfo, Tensors, read_index
from .blocks import StoredBlocks
from .detection import detect_layout
from .layouts import Layout, known_layout
from .loading import OpenModel, load_config, load_part, make_skeleton, quiet_loading, require_gguf
from .tensors import kept_tensors, tensor_infos


@dataclass(frozen=True)
class Description:
    """What is known of a model before a run."""

    name: str
    model: PreTrainedModel
    """On meta, or live."""
    stored: Tensors
    """What the checkpoint holds under the model's own names."""
    layout: Layout | None
    blocks: str
    """Path of the blocks."""
    streamed: bool


def describe_opened(opened: OpenModel) -> Description:
    """A model that was opened for a run."""
    model, blocks = opened.model, opened.blocks
    stored = tensor_infos(kept_tensors(model.state_dict(), model))
    if isinstance(blocks, StoredBlocks):
        stored = {**stored, **blocks.tensors}
    return Description(
        opened.name,
        model,
        stored,
        opened.layout,
        opened.layout.blocks,
        isinstance(blocks, StoredBlocks),
    )


def _config(model: str | Path) -> Any:
    """The config of a hub id, folder, config file or GGUF file."""
    path = Path(model)
    if path.suffix == ".gguf":
        require_gguf()
        return load_part(str(path.parent), AutoConfig, gguf_file=path.name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise CfspError(f"{path} is not a model folder: no config.json")
    return load_config(str(model))


def _dtype(dtype: str, config: Any, stored: Tensors, whole_file: bool) -> torch.dtype:
    """What a run computes in: as asked, as the config says, as stored; fp32 from GGUF."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if whole_file:
        return torch.float32
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    floats = (info.dtype for info in stored.values() if info.dtype.is_floating_point)
    return next(floats, torch.float32)


def _layout(skeleton: PreTrainedModel) -> Layout | None:
    try:
        return known_layout(skeleton.config.model_type) or detect_layout(skeleton)
    except CfspError:
        return None


def describe(model: str | Path, dtype: str = "auto", *, whole: bool = False) -> Description:
    """A hub id, folder, config file or GGUF file of any causal LM of transformers.

    ``whole``: it will be loaded whole, whatever the checkpoint allows.

    Raises:
        CfspError: no config, or one that transformers cannot build a model of.
    """
    config, path = _config(model), Path(model)
    gguf = path.suffix == ".gguf"
    has_weights = path.is_dir() and any(path.glob("*.safetensors"))
    stored: Tensors = read_index(path) if has_weights else {}
    precision = _dtype(dtype, config, stored, gguf)
    with quiet_loading():
        skeleton = make_skeleton(config, precision)
    layout = _layout(skeleton)
    blocks = layout.blocks if layout is not None else block_path(skeleton)
    own = tensor_infos(kept_tensors(skeleton.state_dict(), skeleton))
    known = {name: info for name, info in stored.items() if name in own}
    quantised = getattr(config, "quantization_config", None) is not None
    renamed = has_weights and len(known) < len(own)
    if not known:
        width = config.dtype if isinstance(config.dtype, torch.dtype) else precision
        known = {name: TensorInfo(width, info.shape) for name, info in own.items()}
    whole = whole or gguf or quantised or renamed or (path / "adapter_config.json").exists()
    name = path.resolve().name if path.is_dir() else path.stem if path.is_file() else str(model)
    return Description(name, skeleton, known, layout, blocks, not whole)


def block_path(model: PreTrainedModel) -> str:
    """The path of the decoder blocks: the longest list of modules in the base model that is not
    itself in a list (experts are).

    Raises:
        CfspError: there is none.
    """
    lists = {
        name: len(module)
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    if not lists:
        raise CfspError(f"{type(model).__name__} has no list of decoder blocks")
    outermost = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    longest = max(outermost, key=lambda name: lists[name])
    prefix = model.base_model_prefix if model.base_model is not model else ""
    return f"{prefix}.{longest}" if prefix else longest
