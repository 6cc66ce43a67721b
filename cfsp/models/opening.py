"""Open a model folder as a skeleton, whose blocks are read when their turn comes."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from ..errors import CfspError
from ..io.shards import StoredTensor, read_index, read_tensors
from .blocks import StoredBlocks, set_parameters_
from .blockwise import RidingWindows
from .layouts import Layout
from .loading import (
    OpenModel,
    check_folder,
    find_layout,
    load_config,
    load_part,
    make_skeleton,
    open_model,
    pick_device,
    quiet_loading,
)
from .tensors import differs, probe_tokens

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


def _equal(tensor: StoredTensor, source: StoredTensor | None) -> bool:
    """Whether a tied tensor that is stored all the same is what it is tied to."""
    if source is None or (tensor.dtype, tensor.shape) != (source.dtype, source.shape):
        return False
    pair = read_tensors({"tensor": tensor, "source": source})
    return torch.equal(pair["tensor"], pair["source"])


def _matched(
    folder: Path, model: PreTrainedModel, layout: Layout, tensors: dict[str, StoredTensor]
) -> dict[str, StoredTensor] | None:
    """The stored tensor of every parameter; None where transformers would convert or rename.

    Raises:
        CfspError: nothing in the checkpoint could be the missing tensor, or shapes differ.
    """
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


def open_lean(model: str | Path, dtype: str = "auto", device: str = "auto") -> OpenModel:
    """Open a model with as little of it in memory as can be: :func:`open_streamed`, and where that
    cannot be :func:`cfsp.models.loading.open_model`. Arguments and errors are theirs."""
    return open_streamed(model, dtype, device) or open_model(model, dtype, device)


def open_streamed(model: str | Path, dtype: str = "auto", device: str = "auto") -> OpenModel | None:
    """Open a model folder or hub id of which only one block at a time will be in memory.

    Args:
        model: local folder or hub id.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", "cuda:1".

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
    config = load_config(str(folder))
    layout = find_layout(config)
    if getattr(config, "quantization_config", None) is not None:
        return None
    tensors = read_index(folder)
    floats = [name for name, stored in tensors.items() if stored.dtype in FLOATS]
    if not floats:
        return None
    precision = _dtype(dtype, config, tensors, floats)
    skeleton = make_skeleton(config, precision)
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


def verify_streamed(folder: Path, expected: torch.Tensor, device: torch.device) -> None:
    """Open a written model anew, block by block, and compare its logits of the probe tokens, bit
    for bit, with those [1, 16, V] that the pruned blocks gave before they were written.

    Raises:
        RuntimeError: any logit differs. Nothing that a user can mend: a defect.
    """
    with quiet_loading():
        opened = open_streamed(folder, device=str(device))
    if opened is None:
        raise RuntimeError(f"{folder} does not hold its parameters under their own names")
    found = ridden_probe(opened)
    if not torch.equal(found, expected):
        raise differs(found, expected)


def ridden_probe(opened: OpenModel) -> torch.Tensor:
    """Logits [1, 16, V] of the probe tokens, with one block in memory at a time."""
    blocks = opened.layout.find_blocks(opened.model)
    probe = RidingWindows(opened.model, blocks, probe_tokens(opened.model))
    with opened.blocks.turns() as turns:
        for number, _ in turns:
            probe.ride(number)
    return next(probe.logits()).cpu()


def weight_files(model: str | Path) -> list[Path]:
    """The files that hold a model's weights: a .gguf file, or the safetensors of its folder.

    Raises:
        CfspError: it has no such files, or one without a header that can be read.
    """
    if Path(model).suffix == ".gguf":
        return [Path(model)]
    folder = local_folder(model)
    if folder is None:
        raise CfspError(f"{model} has no safetensors or GGUF files to verify")
    return sorted({stored.file for stored in read_index(folder).values()})
