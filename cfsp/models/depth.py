"""A model with some of its blocks alone, as its own class would have been built with so few."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import CfspError, shown
from ..io.safetensors import Tensors
from ..weights.mapping import retargeted
from ..weights.sources import Source
from .blocks import LiveBlocks, StoredBlocks
from .descriptions import Description
from .layouts import Layout
from .loading import make_skeleton, quiet_loading
from .opening import OpenModel
from .pruned_classes import set_config_
from .surgery import on_meta

NUMBERS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "skip_layers")
"""Lists of numbers of blocks in configs; other lists as long as the model have an entry a block."""
COUNTS = ("first_k_dense_replace", "moe_layer_start_index")
"""How many blocks at the beginning are of another kind."""
LAST = "moe_layer_end_index"
"""Number of the last block of a kind."""
BY_NUMBER = "scale_attn_by_inverse_layer_idx"
"""A block then computes with its own number."""

Pairs = dict[tuple[str, str], tuple[Any, Any]]
"""(path of a module, attribute) -> its values before and after."""


def shallower(opened: OpenModel, kept: Sequence[int]) -> OpenModel:
    """The model with the blocks ``kept`` alone, ascending numbers of its own: in place, its blocks
    and config; the weights of others are never read. Its files on disk stay as they are.

    The result is what the family's own class builds of a config for so many blocks, given these
    weights. Raises CfspError, before anything is changed, where that class would build one of the
    kept blocks otherwise, or something outside of them.
    """
    model, layout, dense = opened.model, opened.layout, opened.described
    total = len(layout.find_blocks(model))
    if tuple(kept) == tuple(range(total)):
        return opened
    skeleton, renumbered = _checked(model, layout, kept)
    dense = replace(dense, model=on_meta(model))
    set_config_(model, skeleton.config)
    blocks: nn.ModuleList = layout.find_blocks(model)  # type: ignore[assignment]
    for number in reversed(range(total)):
        if number not in kept:
            del blocks[number]
    for (path, name), (_, now) in renumbered.items():
        setattr(model.get_submodule(path), name, now)
    weights: LiveBlocks | StoredBlocks = LiveBlocks(model, layout)
    if isinstance(opened.blocks, StoredBlocks):
        sources = _renumbered_sources(opened.blocks.sources, layout, kept)
        weights = replace(opened.blocks, sources=sources)
    return replace(opened, blocks=weights, dense=dense, kept=tuple(kept))


def shallower_description(described: Description, kept: Sequence[int]) -> Description:
    """What would be known of the model with the blocks ``kept`` alone. Raises CfspError as
    :func:`shallower` does."""
    layout = described.layout
    if layout is None:
        raise CfspError(described.refusal)
    skeleton, _ = _checked(described.model, layout, kept)
    read = replace(described.read, tensors=_left(described.read.tensors, layout, kept))
    return replace(
        described,
        model=skeleton,
        tensors=_left(described.tensors, layout, kept),
        read=read,
        dense=described,
    )


def blocks_alone(opened: OpenModel, kept: Sequence[int]) -> LiveBlocks | StoredBlocks:
    """The blocks that :func:`shallower` would leave, to look at: the model stays as it is."""
    layout, blocks = opened.layout, opened.layout.find_blocks(opened.model)
    holder: nn.Module = nn.ModuleList(blocks[number] for number in kept)
    for name in reversed(layout.blocks.split(".")):
        outer = nn.Module()
        outer.add_module(name, holder)
        holder = outer
    if isinstance(opened.blocks, LiveBlocks):
        return LiveBlocks(holder, layout)
    sources = _renumbered_sources(opened.blocks.sources, layout, kept)
    return replace(opened.blocks, model=holder, sources=sources)


def check_kept(kept: Sequence[int], total: int, first: int) -> None:
    """Raise CfspError for anything but ascending numbers of blocks, among them the first ones."""
    if list(kept) != sorted({*kept} & {*range(total)}) or not kept:
        raise CfspError(f"kept blocks must ascend within 0 to {total - 1}, got {shown(list(kept))}")
    if tuple(kept[:first]) != tuple(range(first)):
        raise CfspError(f"blocks 0 to {first - 1} take features of images and have to stay")


def first_fixed(config: Any) -> int:
    """How many blocks at the beginning are given features of images, by their numbers."""
    vision = getattr(config, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def shallower_config(config: Any, kept: Sequence[int]) -> Any:
    """The config of a model with these of its blocks: lists of one entry a block are filtered,
    numbers of blocks renumbered, counts recounted; blocks that predict further tokens are gone."""
    new = copy.deepcopy(config)
    text = new.get_text_config()
    total = text.num_hidden_layers
    place = {number: n for n, number in enumerate(kept)}
    for name, value in text.to_dict().items():
        if name in NUMBERS and isinstance(value, list):
            setattr(text, name, [place[n] for n in value if n in place])
        elif isinstance(value, list | tuple) and len(value) == total and not name.endswith("_id"):
            if name != "architectures":
                setattr(text, name, [value[n] for n in kept])
        elif name in COUNTS and isinstance(value, int):
            setattr(text, name, sum(n < value for n in kept))
        elif name == LAST and isinstance(value, int):
            setattr(text, name, sum(n <= value for n in kept) - 1 if value >= 0 else value)
        elif name == "num_nextn_predict_layers" and value:
            setattr(text, name, 0)
        elif name == "per_layer_config" and value:
            own = {place[int(n)]: of for n, of in value.items() if int(n) in place}
            text.per_layer_config = own
    text.num_hidden_layers = len(kept)
    return new


def _checked(
    model: PreTrainedModel, layout: Layout, kept: Sequence[int]
) -> tuple[PreTrainedModel, Pairs]:
    """The model of so many blocks, on meta, and the numbers in which its modules differ from those
    of the dense model; CfspError where they differ in anything else."""
    config = model.config
    total = len(layout.find_blocks(model))
    check_kept(kept, total, first_fixed(config))
    kind = f"{type(model).__name__} of {len(kept)} of its {total} blocks"
    if getattr(config.get_text_config(), BY_NUMBER, False):
        raise CfspError(f"{kind}: a block computes with its own number ({BY_NUMBER})")
    with quiet_loading():
        was = make_skeleton(copy.deepcopy(config), model.dtype)
        try:
            values = shallower_config(config, kept).to_dict()
            now = make_skeleton(type(config).from_dict(values), model.dtype)
        except Exception as error:  # of whatever kind a family's own code raises
            raise CfspError(f"{kind}: no such model can be built: {error}") from error
    made = layout.find_blocks(now)
    if len(made) != len(kept):
        raise CfspError(f"{kind}: its class makes {len(made)}")
    renumbered: Pairs = {}
    for number, old in enumerate(kept):
        pair = layout.find_blocks(was)[old], made[number]
        at = f"{kind}: block {old} as block {number} would have"
        for (path, name), (a, b) in _differences(*pair, at).items():
            if (a, b) != (old, number) or not ("layer" in name or "block" in name):
                raise CfspError(f"{at} {name} {shown(b)} of {path or 'itself'}, not {shown(a)}")
            renumbered[(f"{layout.prefix(number)}{path}".rstrip("."), name)] = (a, b)
    outer = _without_blocks(was, layout), _without_blocks(now, layout)
    at = f"{kind}: outside of the blocks it would have"
    for (path, name), (a, b) in _differences(*outer, at).items():
        listed = isinstance(a, list) and len(a) == total and b == [a[n] for n in kept]
        if (a, b) != (total, len(kept)) and not listed:
            raise CfspError(f"{at} {name} {shown(b)} of {path or 'the model'}, not {shown(a)}")
        renumbered[(path, name)] = (a, b)
    return now, renumbered


def _without_blocks(skeleton: PreTrainedModel, layout: Layout) -> nn.Module:
    copied = on_meta(skeleton)
    path, _, name = layout.blocks.rpartition(".")
    setattr(copied.get_submodule(path), name, nn.ModuleList())
    for key, buffer in skeleton.named_buffers():
        if layout.place_of(key) is None:
            where, _, leaf = key.rpartition(".")
            setattr(copied.get_submodule(where), leaf, buffer)
    return copied


def _differences(was: nn.Module, now: nn.Module, at: str) -> Pairs:
    """The plain attributes in which two modules on meta, and those in them, differ; CfspError where
    their classes, the shapes of their parameters, or their buffers do."""
    old, new = dict(was.named_modules()), dict(now.named_modules())
    for path in dict.fromkeys([*old, *new]):
        if type(old.get(path)) is not type(new.get(path)):
            kinds = [type(m[path]).__name__ if path in m else "nothing" for m in (new, old)]
            raise CfspError(f"{at} {kinds[0]} at {path or 'itself'}, not {kinds[1]}")
    shapes = [{k: tuple(p.shape) for k, p in m.named_parameters()} for m in (was, now)]
    buffers = [dict(m.named_buffers()) for m in (was, now)]
    for a, b in (shapes, buffers):
        for name in dict.fromkeys([*a, *b]):
            if name not in a or name not in b or not _same(a[name], b[name]):
                raise CfspError(f"{at} another {name}")
    found: Pairs = {}
    for path, module in old.items():
        own, other = dict(_plain(module)), dict(_plain(new[path]))
        for name in dict.fromkeys([*own, *other]):
            pair = own.get(name), other.get(name)
            if pair[0] != pair[1]:
                found[(path, name)] = pair
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def _plain(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes that are numbers, texts or switches, or lists."""
    for name, value in vars(module).items():
        if value is None or isinstance(value, int | float | str | list | tuple):
            yield name, list(value) if isinstance(value, tuple) else value


def _left(tensors: Tensors, layout: Layout, kept: Sequence[int]) -> Tensors:
    """The tensors of the kept blocks, under their new names, and all outside of them."""
    place = {number: n for n, number in enumerate(kept)}
    found = {}
    for name, info in tensors.items():
        at = layout.place_of(name)
        if at is None:
            found[name] = info
        elif at[0] in place:
            found[layout.prefix(place[at[0]]) + at[1]] = info
    return found


def _renumbered_sources(
    sources: Mapping[str, Source], layout: Layout, kept: Sequence[int]
) -> dict[str, Source]:
    """Of the kept blocks alone: read where they lie, known by their new names."""
    made: dict[Source, Source] = {}
    found = {}
    for new, old in enumerate(kept):
        for name, source in sources.items():
            if name.startswith(layout.prefix(old)):
                if source not in made:
                    made[source] = _renumbered(source, layout, old, new)
                found[layout.prefix(new) + name.removeprefix(layout.prefix(old))] = made[source]
    return found


def _renumbered(source: Source, layout: Layout, old: int, new: int) -> Source:
    before, after = layout.prefix(old), layout.prefix(new)
    infos = {after + name.removeprefix(before): info for name, info in source.targets.items()}
    if source.convert is not None:  # which knows its weights by their stored names
        convert = retargeted(source.convert, lambda name: after + name.removeprefix(before))
        return replace(source, targets=infos, convert=convert)
    _, _, blocks = layout.blocks.rpartition(".")
    stored = re.compile(rf"(^|\.){re.escape(blocks)}\.{old}\.")
    weights = {}
    for name, weight in source.weights.items():
        renamed, count = stored.subn(rf"\g<1>{blocks}.{new}.", name, count=1)
        weights[renamed if count else f"block {new}: {name}"] = weight
    return replace(source, targets=infos, weights=weights)
