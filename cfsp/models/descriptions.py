"""Models as their configs and the headers of their weights tell: no weights are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from ..costs.flops import Tensors, block_path
from ..errors import CfspError
from ..io.shards import TensorInfo, read_index
from ..pruning.recipe import Recipe
from .blocks import StoredBlocks
from .detection import detect_layout
from .layouts import Layout, known_layout
from .loading import OpenModel, load_config, load_part, make_skeleton, quiet_loading, require_gguf


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


def kept_tensors(
    tensors: Mapping[str, torch.Tensor], model: PreTrainedModel
) -> dict[str, torch.Tensor]:
    """What a checkpoint of the model holds: tied tensors once."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return {name: tensor for name, tensor in tensors.items() if name not in tied}


def tensor_infos(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """Dtypes and shapes of tensors."""
    return {name: TensorInfo(value.dtype, tuple(value.shape)) for name, value in tensors.items()}


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


def _dtype(recipe: Recipe, config: Any, stored: Tensors, whole_file: bool) -> torch.dtype:
    """What a run computes in: as asked, as the config says, as stored; fp32 from GGUF."""
    if recipe.dtype != "auto":
        return getattr(torch, recipe.dtype)
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


def describe(model: str | Path, recipe: Recipe) -> Description:
    """A hub id, folder, config file or GGUF file of any causal LM of transformers.

    Raises:
        CfspError: no config, or one that transformers cannot build a model of.
    """
    config, path = _config(model), Path(model)
    gguf = path.suffix == ".gguf"
    has_weights = path.is_dir() and any(path.glob("*.safetensors"))
    stored: Tensors = read_index(path) if has_weights else {}
    dtype = _dtype(recipe, config, stored, gguf)
    with quiet_loading():
        skeleton = make_skeleton(config, dtype)
    layout = _layout(skeleton)
    blocks = layout.blocks if layout is not None else block_path(skeleton)
    own = tensor_infos(kept_tensors(skeleton.state_dict(), skeleton))
    known = {name: info for name, info in stored.items() if name in own}
    quantised = getattr(config, "quantization_config", None) is not None
    renamed = has_weights and len(known) < len(own)
    if not known:
        width = config.dtype if isinstance(config.dtype, torch.dtype) else dtype
        known = {name: TensorInfo(width, info.shape) for name, info in own.items()}
    whole = gguf or quantised or renamed or (path / "adapter_config.json").exists()
    name = path.resolve().name if path.is_dir() else path.stem if path.is_file() else str(model)
    return Description(name, skeleton, known, layout, blocks, not whole and not recipe.searches)
