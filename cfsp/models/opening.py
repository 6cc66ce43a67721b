"""Open a model: live, loaded whole, or a skeleton whose blocks are read when their turn comes."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from ..errors import CfspError, first_of
from ..io.files import Stamps, stamps_of
from ..io.safetensors import check_finite, read_tensors
from ..weights.sources import Source
from .blocks import Blocks, LiveBlocks, StoredBlocks
from .descriptions import Description, Read
from .detection.attention import with_attention
from .detection.experts import with_fewer_experts
from .detection.trial import check_as_configured, checked_layout
from .finding import MODEL_FILES, find_model
from .inspection import check_config, check_live, inspect
from .layouts import Layout
from .loading import (
    DEVICE,
    folder_name,
    load_config,
    load_part,
    load_weights,
    make_skeleton,
    pick_device,
    pretrained,
)
from .surgery import set_buffers_, set_parameters_
from .tensors import saved_tensors, tensor_infos


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
    folder: Path | None = None
    """Where its files are, with the terms that it comes with; None where that is not known."""
    files: Stamps = field(default_factory=dict)
    """What these files were when it was opened; none of a live model."""
    dense: Description | None = None
    """The model that it was before blocks were taken out; None where all are there."""
    kept: tuple[int, ...] = ()
    """Which blocks of ``dense`` these are."""

    @cached_property
    def described(self) -> Description:
        """Its shapes, as they are when first asked for."""
        layout, tensors = self.layout, tensor_infos(saved_tensors(self.model))
        sources = self.blocks.sources if isinstance(self.blocks, StoredBlocks) else {}
        read = Read.of(tensors, sources)
        return Description(
            self.name,
            self.model,
            layout,
            layout.blocks,
            tensors,
            read,
            bool(sources),
            dense=self.dense,
        )


def open_any(
    model: nn.Module | str | Path,
    tokenizer: Any = None,
    dtype: str = "auto",
    device: str = "auto",
    *,
    whole: bool = False,
    attention: bool = False,
    experts: int | None = None,
) -> OpenModel:
    """A live model as it is; one given by name as by :func:`open_model`, but block by block where
    it can be and is not wanted ``whole``. ``tokenizer``: instead of the model's own; ``attention``:
    KV groups are units too; ``experts``: how many stay in each block; CfspError where they cannot.
    """
    if isinstance(tokenizer, str | Path):
        raise CfspError(f"tokenizer must be a tokenizer of transformers, got {tokenizer!r}")
    if isinstance(model, nn.Module):
        opened = adopt(model, tokenizer)
    else:
        streamed = None if whole else open_streamed(model, dtype, device, tokenizer)
        opened = streamed or open_model(model, dtype, device, tokenizer)
    layout = with_attention(opened.model, opened.layout) if attention else opened.layout
    if experts is not None:
        layout = with_fewer_experts(opened.model, layout, experts)
    return replace(opened, layout=layout, blocks=replace(opened.blocks, layout=layout))


def adopt(model: nn.Module, tokenizer: Any) -> OpenModel:
    """A live module as an OpenModel; CfspError for one whose weights are elsewhere, quantised or in
    part those of adapters."""
    if not isinstance(model, PreTrainedModel):
        inner = getattr(model, "get_base_model", None)
        hint = ": merge its adapters first, merge_and_unload()" if inner is not None else ""
        raise CfspError(f"expected a transformers causal LM, got {type(model).__name__}{hint}")
    check_config(type(model).__name__, model.config)
    check_live(model)
    check_as_configured(model)
    layout = checked_layout(model)
    _check_outer(type(model).__name__, model, layout)
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    folder = Path(name) if Path(name).exists() else None
    if folder is not None:  # a local path says nothing elsewhere
        name = folder_name(folder)
    return OpenModel(model, tokenizer, layout, name, LiveBlocks(model, layout), folder)


def _check_outer(name: str, model: nn.Module, layout: Layout) -> None:
    """Raise CfspError for NaN or infinity outside of the blocks, which are checked at their turns,
    and for a parameter that two of these share."""
    outer, seen = {}, set[int]()
    for key, value in model.named_parameters(remove_duplicate=False):
        if layout.place_of(key) is None:
            outer[key] = value
        elif id(value) in seen:
            raise CfspError(f"{name}: {key} is a parameter of another block or module too")
        else:
            seen.add(id(value))
    check_finite(name, outer)


def open_model(
    model: str | Path, dtype: str = "auto", device: str = "auto", tokenizer: Any = None
) -> OpenModel:
    """Load a model with its tokenizer onto a device, in eval mode.

    Args:
        model: hub id, local folder, or path of a .gguf file.
        dtype: "auto" (as stored; fp32 for GGUF), "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", "cuda:1".
        tokenizer: instead of the model's own.

    Raises:
        CfspError: not found, no weights, corrupt weights, unsupported architecture.
    """
    where, found = pick_device(device), _inspect(model, dtype)
    if found.is_quantised:
        return _filled(_streamed(found, where, tokenizer))
    name, options = pretrained(found.path)
    gguf = found.path.is_file()
    precision = "float32" if gguf and dtype == "auto" else dtype
    loaded = load_weights(name, found.skeleton.config, dtype=precision, **options)
    if gguf:
        loaded = _without_gguf(loaded)
    _check_outer(str(found.path), loaded, found.layout)
    loaded = loaded.to(where).eval()
    return found.opened(loaded, LiveBlocks(loaded, found.layout), tokenizer)


@dataclass(frozen=True)
class _Checkpoint:
    """A model that was found and may be loaded."""

    name: str
    """As in :class:`OpenModel`."""
    path: Path
    """A folder, or a .gguf file."""
    skeleton: PreTrainedModel
    layout: Layout
    sources: dict[str, Source]
    """See :func:`cfsp.weights.mapping.sources_of`; {} of GGUF."""
    files: Stamps

    @property
    def is_quantised(self) -> bool:
        """Whether weights are decoded as they are read, which transformers would not do."""
        return any(source.is_quantised for source in self.sources.values())

    def opened(self, model: PreTrainedModel, blocks: Blocks, tokenizer: Any) -> OpenModel:
        name, options = pretrained(self.path)
        tokenizer = tokenizer or load_part(name, AutoTokenizer, **options)
        folder = self.path if self.path.is_dir() else None
        return OpenModel(model, tokenizer, self.layout, self.name, blocks, folder, self.files)


def _inspect(model: str | Path, dtype: str) -> _Checkpoint:
    """Find a model and raise CfspError for whatever is wrong with it, before a value is read."""
    path = find_model(model)
    gguf = path.is_file()
    found = inspect(path, load_config(path), None if gguf else path, dtype, gguf=gguf)
    layout = checked_layout(found.skeleton)
    if not gguf:
        _check_missing(path, found.skeleton, found.sources)
    local = Path(model).exists()
    name = path.stem if gguf else folder_name(path) if local else str(model)
    read = [path] if gguf else [f for p in MODEL_FILES for f in path.glob(p) if f.exists()]
    return _Checkpoint(name, path, found.skeleton, layout, found.sources, stamps_of(sorted(read)))


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


def open_streamed(
    model: str | Path, dtype: str = "auto", device: str = "auto", tokenizer: Any = None
) -> OpenModel | None:
    """Open a model folder or hub id of which only one block at a time will be in memory; None for
    GGUF, which is loaded whole."""
    where, checkpoint = pick_device(device), _inspect(model, dtype)
    if checkpoint.path.is_file():
        return None
    return _streamed(checkpoint, where, tokenizer)


def _streamed(checkpoint: _Checkpoint, where: torch.device, tokenizer: Any) -> OpenModel:
    folder, skeleton, layout = checkpoint.path, checkpoint.skeleton, checkpoint.layout
    sources = checkpoint.sources
    parameters = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    in_blocks = {
        name: source
        for name, source in sources.items()
        if name in parameters and layout.place_of(name) is not None
    }
    outer = _outer_values(source for name, source in sources.items() if name not in in_blocks)
    check_finite(str(folder), outer)
    set_parameters_(skeleton, {k: value for k, value in outer.items() if k in parameters})
    set_buffers_(skeleton, {k: value for k, value in outer.items() if k not in parameters})
    missing = set(skeleton.state_dict()) - sources.keys()
    skeleton.tie_weights(missing_keys=missing, recompute_mapping=False)
    if where.type != "cpu":
        setattr(skeleton, DEVICE, where)
    buffers = skeleton.named_buffers(remove_duplicate=False)
    set_buffers_(skeleton, {name: buffer.to(where) for name, buffer in buffers})
    # As from_pretrained finds it: its own file, or what the model's config says.
    options: dict[str, Any] = {}
    if not (folder / "generation_config.json").is_file():
        options = {"config_file_name": "config.json", "_from_model_config": True}
    skeleton.generation_config = load_part(str(folder), GenerationConfig, **options)
    return checkpoint.opened(skeleton, StoredBlocks(skeleton, layout, in_blocks, where), tokenizer)


def _filled(opened: OpenModel) -> OpenModel:
    """A streamed model with the weights of all its blocks in memory."""
    kept = []
    with opened.blocks.turns() as turns:
        for _, block in turns:
            kept.append({name: value.clone() for name, value in block.named_parameters()})
    for block, values in zip(opened.layout.find_blocks(opened.model), kept, strict=True):
        set_parameters_(block, values)
    return replace(opened, blocks=LiveBlocks(opened.model, opened.layout))


def _outer_values(sources: Iterable[Source]) -> dict[str, torch.Tensor]:
    """What is outside of the blocks, read and made."""
    found: dict[str, torch.Tensor] = {}
    for source in dict.fromkeys(sources):
        found |= source.make(read_tensors(source.reads), torch.device("cpu"))
    return found


def _check_missing(where: Path, skeleton: PreTrainedModel, sources: Mapping[str, Source]) -> None:
    """Raise CfspError where transformers would make up what is not stored; one of several that are
    tied is enough."""
    tied = skeleton.all_tied_weights_keys
    stored = {tied.get(name, name) for name in sources}
    missing = [name for name in skeleton.state_dict() if tied.get(name, name) not in stored]
    if missing:
        raise CfspError(f"{where}: missing keys in the weights: {first_of(sorted(missing))}")
