"""Open a model: live, loaded whole, or a skeleton whose blocks are read when their turn comes."""

import copy
import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from ..errors import CfspError
from ..io.safetensors import StoredTensor, read_index, read_tensors
from .blocks import Blocks, LiveBlocks, StoredBlocks
from .descriptions import Description
from .detection import layout_of
from .layouts import Layout
from .loading import (
    DEVICE,
    check_folder,
    find_layout,
    load_config,
    load_part,
    load_weights,
    make_skeleton,
    pick_device,
    pick_dtype,
    pretrained,
)
from .surgery import set_buffers_, set_parameters_
from .tensors import saved_tensors, tensor_infos

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HUB_FILES = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class OpenModel:
    """A model with its tokenizer, in memory whole or one block at a time."""

    model: PreTrainedModel
    tokenizer: Any
    layout: Layout
    name: str
    """What the user called it: hub id, folder or file name; for a live module, its config's."""
    blocks: Blocks
    """Where the weights of its blocks are."""

    @cached_property
    def described(self) -> Description:
        """Its shapes, as they are when first asked for."""
        layout, tensors = self.layout, tensor_infos(saved_tensors(self.model))
        on_disk = self.blocks.tensors if isinstance(self.blocks, StoredBlocks) else {}
        stored = {**tensors, **on_disk}
        return Description(
            self.name, self.model, layout, layout.blocks, tensors, stored, bool(on_disk)
        )


def open_any(
    model: nn.Module | str | Path,
    tokenizer: Any = None,
    dtype: str = "auto",
    device: str = "auto",
    *,
    whole: bool = False,
) -> OpenModel:
    """A live model as it is; one given by name as by :func:`open_model`, but block by block where
    it can be and is not wanted ``whole``. ``tokenizer``: instead of the model's own."""
    if isinstance(model, nn.Module):
        return adopt(model, tokenizer)
    streamed = None if whole else open_streamed(model, dtype, device)
    opened = streamed or open_model(model, dtype, device)
    return dataclasses.replace(opened, tokenizer=tokenizer or opened.tokenizer)


def adopt(model: nn.Module, tokenizer: Any) -> OpenModel:
    """A live module as an OpenModel."""
    if not isinstance(model, PreTrainedModel):
        raise CfspError(f"expected a transformers causal LM, got {type(model).__name__}")
    layout = layout_of(model)
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    if Path(name).exists():  # a local path says nothing elsewhere
        name = Path(name).resolve().name
    return OpenModel(model, tokenizer, layout, name, LiveBlocks(model, layout))


def open_model(model: str | Path, dtype: str = "auto", device: str = "auto") -> OpenModel:
    """Load a model with its tokenizer onto a device, in eval mode.

    Args:
        model: hub id, local folder, or path of a .gguf file.
        dtype: "auto" (as stored; fp32 for GGUF), "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", "cuda:1".

    Raises:
        CfspError: not found, no weights, corrupt weights, unsupported architecture.
    """
    where, path = pick_device(device), Path(model)
    is_gguf = path.suffix == ".gguf"
    if is_gguf:
        if not path.is_file():
            raise CfspError(f"no such file: {path}")
    elif path.exists():
        check_folder(path)
    elif _is_path(model):
        raise CfspError(f"no such model folder: {model}")
    layout = find_layout(load_config(model))
    name, options = pretrained(model)
    precision = "float32" if is_gguf and dtype == "auto" else dtype
    loaded = load_weights(name, dtype=precision, **options)
    tokenizer = load_part(name, AutoTokenizer, **options)
    if is_gguf:
        loaded = _without_gguf(loaded)
    loaded = loaded.to(where).eval()
    short = path.stem if is_gguf else path.name if path.exists() else name
    return OpenModel(loaded, tokenizer, layout, short, LiveBlocks(loaded, layout))


def _is_path(model: str | Path) -> bool:
    """Whether a name that does not exist here cannot be a hub id either."""
    name = str(model)
    return Path(model).is_absolute() or name.startswith(".") or name.count("/") > 1


def _without_gguf(loaded: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that knows nothing of GGUF, and so lets itself be saved."""
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = make_skeleton(config, loaded.dtype)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model


def open_streamed(model: str | Path, dtype: str = "auto", device: str = "auto") -> OpenModel | None:
    """Open a model folder or hub id of which only one block at a time will be in memory.

    None where the checkpoint does not hold the model's parameters one for one under their own
    names, as floats: quantised, with an adapter, of an older naming, in GGUF or pickled.
    """
    where = pick_device(device)
    folder = local_folder(model)
    if folder is None or (folder / "adapter_config.json").exists():
        return None
    config = load_config(folder)
    layout = find_layout(config)
    if getattr(config, "quantization_config", None) is not None:
        return None
    tensors = read_index(folder)
    floats = {name: stored for name, stored in tensors.items() if stored.dtype in FLOATS}
    if not floats:
        return None
    precision = pick_dtype(dtype, config, floats)
    skeleton = make_skeleton(config, precision)
    found = _matched(folder, skeleton, tensors)
    if found is None:
        return None
    in_blocks = {k: stored for k, stored in found.items() if layout.place_of(k) is not None}
    outer = read_tensors({k: stored for k, stored in found.items() if k not in in_blocks})
    set_parameters_(skeleton, {k: value.to(precision) for k, value in outer.items()})
    skeleton.tie_weights()
    if where.type != "cpu":
        setattr(skeleton, DEVICE, where)
    buffers = skeleton.named_buffers(remove_duplicate=False)
    set_buffers_(skeleton, {name: buffer.to(where) for name, buffer in buffers})
    # As from_pretrained finds it: its own file, or what the model's config says.
    options: dict[str, Any] = {}
    if not (folder / "generation_config.json").is_file():
        options = {"config_file_name": "config.json", "_from_model_config": True}
    skeleton.generation_config = load_part(str(folder), GenerationConfig, **options)
    tokenizer = load_part(str(folder), AutoTokenizer)
    name = folder.name if Path(model).exists() else str(model)
    blocks = StoredBlocks(skeleton, layout, in_blocks, precision, where)
    return OpenModel(skeleton, tokenizer, layout, name, blocks)


def local_folder(model: str | Path) -> Path | None:
    """The folder of a model: itself, or the local snapshot of a hub id. None where there is none
    with safetensors."""
    path = Path(model)
    if path.suffix == ".gguf":
        return None
    if path.exists():
        check_folder(path)
        return path
    if _is_path(model):
        return None
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(str(model), allow_patterns=HUB_FILES))
    except (OSError, ValueError):  # told in full by the loader that is tried next
        return None
    return folder if any(folder.glob("model*.safetensors")) else None


def _equal(tensor: StoredTensor, source: StoredTensor | None) -> bool:
    """Whether a tied tensor that is stored all the same is what it is tied to."""
    if source is None or (tensor.dtype, tensor.shape) != (source.dtype, source.shape):
        return False
    pair = read_tensors({"tensor": tensor, "source": source})
    return torch.equal(pair["tensor"], pair["source"])


def _matched(
    folder: Path, model: PreTrainedModel, tensors: dict[str, StoredTensor]
) -> dict[str, StoredTensor] | None:
    """The stored tensor of every parameter; None where transformers would convert or rename. Raises
    CfspError where nothing could be a missing tensor, or shapes differ."""
    tied = model.all_tied_weights_keys
    wanted = {name: value for name, value in model.state_dict().items() if name not in tied}
    missing = sorted(wanted.keys() - tensors.keys())
    unknown = sorted(
        name
        for name in tensors.keys() - wanted.keys()
        if not name.endswith("rotary_emb.inv_freq")
        and not (name in tied and _equal(tensors[name], tensors.get(tied[name])))
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


def weight_files(model: str | Path) -> list[Path]:
    """The files that hold a model's weights: a .gguf file, or the safetensors of its folder."""
    if Path(model).suffix == ".gguf":
        return [Path(model)]
    folder = local_folder(model)
    if folder is None:
        raise CfspError(f"{model} has no safetensors or GGUF files to verify")
    return sorted({stored.file for stored in read_index(folder).values()})
