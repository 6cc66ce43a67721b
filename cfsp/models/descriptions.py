"""Models as their configs and the headers of their weights tell: shapes, no values."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import CfspError
from ..io.safetensors import TensorInfo, Tensors
from ..weights.schemes import bits_of, method_of
from ..weights.sources import Source
from .detection.attention import with_attention
from .detection.experts import with_fewer_experts
from .detection.trial import checked_layout
from .inspection import Inspected, check_folder_files, inspect
from .layouts import Layout, text_decoder
from .loading import folder_name, load_config, quiet_loading
from .parts.channels import Units
from .parts.expert_removal import FewerExperts
from .parts.experts import ExpertsFFN
from .parts.part import Part
from .tensors import saved_tensors, tensor_infos


@dataclass(frozen=True)
class PlacedPart:
    """A part of one block of a model."""

    block: int
    prefix: str
    """What the names of the block's parameters begin with in the model."""
    part: Part
    units: Units
    """Of the dense part."""

    @property
    def fewer(self) -> FewerExperts | None:
        """Of a part some of whose experts stay."""
        return self.part.fewer if isinstance(self.part, ExpertsFFN) else None

    @property
    def experts(self) -> int:
        """How many stay."""
        return self.fewer.count if self.fewer is not None else self.units.experts


@dataclass(frozen=True)
class Read:
    """What is read of a model when it is opened or a block's turn comes."""

    tensors: Tensors
    """Each under the name that it has in the model, or one that begins with it."""
    made: bool = False
    """Whether blocks are cast, decoded or put together of it, in memory of their own."""
    decoded: bool = False
    """Whether they are decoded."""

    @staticmethod
    def of(tensors: Tensors, sources: Mapping[str, Source]) -> "Read":
        """Of a model that holds ``tensors``; those without a source are as they are in it."""
        found: dict[str, TensorInfo] = {}
        for name, info in tensors.items():
            source = sources.get(name)
            if source is None:
                found[name] = info
            elif source.in_place:
                found[name] = TensorInfo(next(iter(source.weights.values())).dtype, info.shape)
            elif name == next(iter(source.targets)):
                found |= {f"{name}.{n}": part for n, part in enumerate(source.stored)}
        every = sources.values()
        made, decoded = (x.is_cast for x in every), (x.is_quantised for x in every)
        return Read(found, any(made), any(decoded))


@dataclass(frozen=True)
class Description:
    """What is known of a model before a run: nothing below reads it again."""

    name: str
    model: PreTrainedModel
    """On meta, or live."""
    layout: Layout | None
    """None where it cannot be pruned."""
    blocks: str
    """Path of the blocks."""
    tensors: Tensors
    """What a checkpoint of it holds, tied tensors once."""
    read: "Read"
    streamed: bool
    refusal: str = ""
    """Why it cannot be pruned."""
    dense: "Description | None" = None
    """The model that it was before blocks were taken out; None where all are there."""

    @cached_property
    def parameters(self) -> Tensors:
        """The parameters among ``tensors``."""
        names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {name: info for name, info in self.tensors.items() if name in names}

    @cached_property
    def parts(self) -> tuple[PlacedPart, ...]:
        """The parts of all blocks in order; () where the layout is not known."""
        layout = self.layout
        if layout is None:
            return ()
        return tuple(
            PlacedPart(number, layout.prefix(number), part, part.units(block))
            for number, block, part in layout.parts_of(self.model)
        )

    @cached_property
    def units(self) -> tuple[tuple[Units, ...], ...]:
        """The units of each part of every block; () where the layout is not known."""
        layout = self.layout
        return tuple(map(layout.units, layout.find_blocks(self.model))) if layout else ()


def describe(
    model: str | Path,
    dtype: str = "auto",
    *,
    whole: bool = False,
    attention: bool = False,
    experts: int | None = None,
) -> Description:
    """A hub id, folder, config file or GGUF file of any causal LM of transformers; ``whole``: it
    will be loaded whole, whatever the checkpoint allows; ``attention``: KV groups are units too;
    ``experts``: how many stay in each block. Raises CfspError for what no run accepts.
    """
    path = Path(model)
    gguf = path.suffix == ".gguf" and not path.is_dir()
    if path.is_dir():
        check_folder_files(path)
    config = load_config(model)
    has_weights = path.is_dir() and any(path.glob("*.safetensors"))
    with quiet_loading():
        found = inspect(model, config, path if has_weights else None, dtype, gguf=gguf)
    skeleton = found.skeleton
    layout: Layout | None = None
    refusal = ""
    try:
        layout = checked_layout(skeleton)
    except CfspError as error:
        refusal = str(error)
    if layout is not None and attention:
        layout = with_attention(skeleton, layout)
    if layout is not None and experts is not None:
        layout = with_fewer_experts(skeleton, layout, experts)
    blocks = layout.blocks if layout is not None else block_path(skeleton)
    own = tensor_infos(saved_tensors(skeleton))
    if has_weights:
        read = Read.of(own, found.sources)
    else:
        read = _supposed(own, config.dtype or skeleton.dtype, found)
    name = folder_name(path) if path.is_dir() else path.stem if path.is_file() else str(model)
    streamed = not (whole or gguf)
    return Description(name, skeleton, layout, blocks, own, read, streamed, refusal)


def _supposed(tensors: Tensors, dtype: torch.dtype, found: Inspected) -> Read:
    """What is read of a model of which only the config is at hand."""
    stored = {name: TensorInfo(dtype, info.shape) for name, info in tensors.items()}
    if found.quantization is None:
        return Read(stored, dtype != found.skeleton.dtype)
    bits = bits_of(found.quantization)
    only_experts = method_of(found.quantization) == "mxfp4"
    for name, info in stored.items():
        parts = name.split(".")
        in_block = any(map(str.isdigit, parts)) and "gate" not in parts
        if in_block and len(info.shape) > 1 and ("experts" in parts or not only_experts):
            *rows, columns = info.shape
            stored[name] = TensorInfo(torch.uint8, (*rows, columns * bits // 8))
    return Read(stored, made=True, decoded=True)


def block_path(model: PreTrainedModel) -> str:
    """The path of the decoder blocks: the longest list of modules in the text decoder that is not
    itself in a list (experts are)."""
    prefix, decoder = text_decoder(model)
    lists = {
        name: len(module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    if not lists:
        raise CfspError(f"{type(model).__name__} has no list of decoder blocks")
    outermost = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    longest = max(outermost, key=lambda name: lists[name])
    return f"{prefix}.{longest}" if prefix else longest
