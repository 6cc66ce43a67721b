"""Models as their configs and the headers of their weights tell: no weights are read."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import CfspError
from ..io.safetensors import TensorInfo, Tensors, read_index
from .blocks import StoredBlocks
from .detection import layout_of
from .layouts import Layout
from .loading import load_config, make_skeleton, pick_dtype, quiet_loading
from .opening import OpenModel
from .tensors import saved_tensors, tensor_infos


@dataclass(frozen=True)
class Description:
    """What is known of a model before a run."""

    name: str
    model: PreTrainedModel
    """On meta, or live."""
    stored: Tensors
    """What the checkpoint holds under the model's own names."""
    layout: Layout | None
    """None where it cannot be pruned."""
    blocks: str
    """Path of the blocks."""
    streamed: bool


def describe_opened(opened: OpenModel) -> Description:
    """A model that was opened for a run."""
    model, layout = opened.model, opened.layout
    on_disk = opened.blocks.tensors if isinstance(opened.blocks, StoredBlocks) else {}
    stored = {**tensor_infos(saved_tensors(model)), **on_disk}
    return Description(opened.name, model, stored, layout, layout.blocks, bool(on_disk))


def describe(model: str | Path, dtype: str = "auto", *, whole: bool = False) -> Description:
    """A hub id, folder, config file or GGUF file of any causal LM of transformers; ``whole``: it
    will be loaded whole, whatever the checkpoint allows."""
    config, path = load_config(model), Path(model)
    gguf = path.suffix == ".gguf"
    has_weights = path.is_dir() and any(path.glob("*.safetensors"))
    stored: Tensors = read_index(path) if has_weights else {}
    precision = pick_dtype(dtype, config, stored, gguf=gguf)
    with quiet_loading():
        skeleton = make_skeleton(config, precision)
    try:
        layout: Layout | None = layout_of(skeleton)
    except CfspError:
        layout = None
    blocks = layout.blocks if layout is not None else block_path(skeleton)
    own = tensor_infos(saved_tensors(skeleton))
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
    itself in a list (experts are)."""
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
