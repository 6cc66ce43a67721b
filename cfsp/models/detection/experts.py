"""What of a model is of every expert: what changes where its config has fewer, then tried.

A copy of the blocks' experts and router with random weights, cut to some of the experts, has to
give what it gives whole with a router that never chooses the others. No values are read.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import CfspError, reason
from ..layouts import Layout, hidden_states_of
from ..loading import make_skeleton, quiet_loading
from ..modeling_cfsp import set_parameter
from ..parts.expert_removal import TOP_K, FewerExperts, keep_experts_
from ..parts.experts import ExpertsFFN
from ..surgery import on_meta, set_buffers_

TRIAL_TOKENS, TRIAL_CHANNELS = 16, 2
NEVER = -1e4
"""A logit with which no expert is chosen, and whose share is 0."""
TOLERANCE = 1e-4


def with_fewer_experts(model: PreTrainedModel, layout: Layout, count: int) -> Layout:
    """The layout with so many experts to stay in each block. Raises CfspError where the model has
    no experts or too few, its router needs more, or removing some is not the same as masking."""
    family, text = model.config.model_type, model.config.get_text_config()
    routed = [ffn for ffn in layout.ffns if isinstance(ffn, ExpertsFFN)]
    if len(routed) != 1:
        raise refused(family, f"it has {len(routed) or 'no'} kinds of routed experts")
    blocks = {n: b for n, b in enumerate(layout.find_blocks(model)) if _has(b, routed[0])}
    sizes = {routed[0].units(block).experts for block in blocks.values()}
    if len(sizes) != 1:
        raise refused(family, f"its blocks have {' or '.join(map(str, sorted(sizes)))} experts")
    (dense,) = sizes
    groups = _checked_groups(text, count, dense)
    if count == dense:
        return layout
    with quiet_loading(), torch.no_grad():
        fewer = _found(model, layout, blocks, count, dense)
        if fewer is None:
            raise refused(family, "what its config says of experts does not tell what is theirs")
        fewer = replace(fewer, groups=groups)
        try:
            same = _is_masking(next(iter(blocks.values())), layout, routed[0], fewer)
        except Exception as error:  # of whatever kind a family's own code raises
            raise refused(family, f"its experts cannot be tried ({reason(error)})") from error
    if not same:
        raise refused(family, "without some experts it gives something else than masked")
    ffns = (replace(ffn, fewer=fewer) if ffn is routed[0] else ffn for ffn in layout.ffns)
    return replace(layout, ffns=tuple(ffns))


def refused(family: str, why: str) -> CfspError:
    """The error for a model whose experts are not removed."""
    return CfspError(f"experts: {family!r}: {why}; drop `experts`")


def _has(block: nn.Module, ffn: ExpertsFFN) -> bool:
    return {name for name, _ in block.named_parameters()}.issuperset(ffn.weight_names)


def _checked_groups(text: Any, count: int, dense: int) -> int:
    """The groups that the router chooses among; CfspError for a number of experts that is more than
    there are or less than a token goes through."""
    values = [getattr(text, name, None) for name in TOP_K]
    top = max((max(v) if isinstance(v, list) else v for v in values if v), default=1)
    groups, of_groups = (getattr(text, name, None) or 1 for name in ("n_group", "topk_group"))
    if not top <= count <= dense:
        raise CfspError(f"experts must be in [{top}, {dense}] for this model, got {count}")
    per_group, rest = divmod(count, groups)
    if groups > 1 and (rest or per_group < 2 or per_group * of_groups < top):
        raise CfspError(
            f"experts {count}: the router chooses {top} of {of_groups} of {groups} groups, so a "
            f"multiple of {groups} has to stay, {max(2, -(-top // of_groups)) * groups} or more"
        )
    return groups


def _found(
    model: PreTrainedModel,
    layout: Layout,
    blocks: dict[int, nn.Module],
    count: int,
    dense: int,
) -> FewerExperts | None:
    """What changes in every block with experts, and in no other, where a value of the config that
    is their number is another."""
    values = model.config.get_text_config().to_dict()
    names = [k for k, v in values.items() if v == dense and not isinstance(v, bool)]
    whole = make_skeleton(copy.deepcopy(model.config), model.dtype)
    for name in sorted(names, key=lambda name: "expert" not in name):
        config = copy.deepcopy(model.config)
        try:
            setattr(config.get_text_config(), name, count)
            few = make_skeleton(config, model.dtype)
        except Exception:  # of whatever kind a family's own code raises at such a value
            continue
        pairs = (layout.find_blocks(skeleton) for skeleton in (whole, few))
        changes = {n: _changes(*pair) for n, pair in enumerate(zip(*pairs, strict=True))}
        first = next(iter(blocks))
        axes, attributes = changes[first]
        expected = {n: changes[first] if n in blocks else ((), ()) for n in changes}
        if axes and changes == expected and all(size == count for *_, size in axes):
            found = tuple((name, dimension) for name, dimension, _ in axes)
            return FewerExperts(count, name, found, attributes)
    return None


def _changes(whole: nn.Module, few: nn.Module) -> tuple[tuple[tuple[Any, ...], ...], ...]:
    """((tensor, dimension, new size), ...) and ((path, attribute, new value), ...)."""
    shapes, new = (
        {k: v.shape for k, v in (*m.named_parameters(), *m.named_buffers())} for m in (whole, few)
    )
    if shapes.keys() != new.keys():
        return (("", 0, -1),), ()
    axes = [
        (name, dimension, size)
        for name, shape in new.items()
        for dimension, size in enumerate(shape)
        if shapes[name][dimension] != size
    ]
    modules = dict(few.named_modules())
    attributes = [
        (path, name, value)
        for path, module in whole.named_modules()
        for name, value in vars(modules[path]).items()
        if isinstance(value, int) and vars(module).get(name) != value
    ]
    return tuple(axes), tuple(attributes)


def _is_masking(block: nn.Module, layout: Layout, ffn: ExpertsFFN, fewer: FewerExperts) -> bool:
    """Whether a copy of random weights gives the same without some experts as where its router
    never chooses them."""
    path = _common([name for name, _ in fewer.axes])
    whole, generator = on_meta(block).eval(), torch.Generator().manual_seed(0)
    experts, width = ffn.units(block).experts, _hidden_size(block, ffn)
    kept = fewer.choose(torch.rand(experts, generator=generator))
    gone = torch.ones(experts, dtype=torch.bool).index_fill(0, kept, False)
    channels = {k: axis for part in layout.block_ffns(block) for k, axis in part.channels.items()}
    dimensions = dict(fewer.axes)
    for name, old in [*whole.named_parameters(), *whole.named_buffers()]:
        if not name.startswith(f"{path}."):
            continue
        shape = list(old.shape)
        if name in channels:
            shape[channels[name].dimension] = channels[name].size(TRIAL_CHANNELS)
        value = torch.rand(shape, generator=generator) - 0.5
        value /= width**0.5 if len(shape) > 1 else 10
        if name in dimensions and not name.startswith(f"{ffn.path}."):
            own = value.movedim(dimensions[name], 0)
            if own.shape[1:] == (width,):
                own[gone, 0] = NEVER  # times the 1 that all tokens have there
            else:
                own[gone] = NEVER
        if isinstance(old, nn.Parameter):
            set_parameter(whole, name, nn.Parameter(value, requires_grad=False))
        else:
            set_buffers_(whole, {name: value})
    for module in whole.modules():
        if config := getattr(module, "config", None):
            config._experts_implementation = "eager"
    cut = copy.deepcopy(whole)
    keep_experts_(cut, fewer, kept)
    x = torch.randn(1, TRIAL_TOKENS, width, generator=generator)
    x[..., 0] = 1
    masked, found = (hidden_states_of(trial.get_submodule(path)(x)) for trial in (whole, cut))
    moved = bool(masked.isfinite().all() and masked.any())
    return moved and torch.allclose(masked, found, rtol=TOLERANCE, atol=TOLERANCE)


def _hidden_size(block: nn.Module, ffn: ExpertsFFN) -> int:
    down = block.get_parameter(ffn.down)
    return down.shape[3 - ffn.channels[ffn.down].dimension]


def _common(names: list[str]) -> str:
    """The module that all of these tensors are in."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = []
    for own in parts:
        if len(set(own)) > 1:
            break
        shared.append(own[0])
    return ".".join(shared)
