"""Where a model keeps the KV groups of its attention: by structure, then tried.

A copy of the attention with random weights, cut to some of its groups, has to give what it gives
whole with the columns of the others zero in its output projection. No values of the model are read.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...errors import CfspError, reason
from ..layouts import Layout, hidden_states_of
from ..loading import make_skeleton, quiet_loading
from ..modeling_cfsp import set_parameter
from ..parts.attention import Attention
from ..parts.channels import CutDown, UnitAxis
from ..surgery import forward_instead, on_meta
from .trial import TOKENS, block_calls, rebuild

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
TRIAL_SIZE = 8
"""Hidden size of the trial."""
TOLERANCE = 1e-4


def with_attention(model: PreTrainedModel, layout: Layout) -> Layout:
    """The layout with the attention's KV groups as units too. Raises CfspError where the model's
    attention is of an unknown form, or cutting it is not the same as masking."""
    family, text = model.config.model_type, model.config.get_text_config()
    if getattr(text, "num_kv_shared_layers", 0):
        raise refused(family, "blocks share their keys")
    found: dict[Attention, int] = {}
    for shares in (True, False):
        if shares or any(attention.keys for attention in found):
            found = {
                attention: number
                for number, block in enumerate(layout.find_blocks(model))
                for attention in _readings(block, text, shares)
            }
    if len(found) != 1:
        forms = f"attention of {len(found)} forms" if found else "its attention is of no known form"
        raise refused(family, forms)
    ((attention, number),) = found.items()
    result = replace(layout, attention=attention)
    try:
        with quiet_loading(), torch.no_grad():
            _try(make_skeleton(copy.deepcopy(model.config), torch.float32), result, number)
            rebuild(make_skeleton(copy.deepcopy(model.config), torch.float32), result)
    except CfspError:
        raise
    except Exception as error:  # of whatever kind a family's own code raises
        why = f"a trial with some of its heads fails ({reason(error)})"
        raise refused(family, why) from error
    return result


def refused(family: str, why: str) -> CfspError:
    """The error for a model whose attention is not cut."""
    return CfspError(f"units of attention: {family!r}: {why}; use `units=channels`")


def _readings(block: nn.Module, config: Any, shares: bool) -> Iterator[Attention]:
    """What the children of a block may be, by the names and shapes of their projections; one head
    of keys is that of all query heads where it ``shares``, else of a group that was left alone."""
    for path, module in block.named_children():
        children = dict(module.named_children())
        out = next((name for name in OUTPUTS if name in children), None)
        size = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
        if out is None or not isinstance(size, int) or not hasattr(children[out], "weight"):
            continue
        conv = isinstance(children[out], Conv1D)
        heads = _shape(children[out])[0 if conv else 1] // size
        shapes = {
            name: _shape(child)[int(conv)] // size
            for name, child in children.items()
            if name != out and isinstance(child, nn.Linear | Conv1D)
        }
        reading = _inputs(shapes, heads, size, shares)
        if reading is None:
            continue
        inputs, per, keys = reading
        for name, count in shapes.items():
            if count == heads and name not in (*inputs, "k_proj", "v_proj"):  # a gate of the output
                inputs[name] = UnitAxis(0, (per * size,))
        axes = {f"{path}.{out}.weight": UnitAxis(int(not conv), (per * size,))}
        for name, axis in inputs.items():
            axes[f"{path}.{name}.weight"] = replace(axis, dimension=int(conv))
            axes[f"{path}.{name}.bias"] = axis
        if any(_is_of_all_heads(child, heads, heads // per, size) for child in children.values()):
            raise refused(config.model_type, "its norms span its heads, so none of them can go")
        for name, parameter in module.named_parameters():
            if name == "sinks" or tuple(parameter.shape) == (heads, size):
                axes[f"{path}.{name}"] = UnitAxis(0, (per,))
            elif keys and tuple(parameter.shape) == (heads // per, size):
                axes[f"{path}.{name}"] = UnitAxis(0)
        names = getattr(config, "attribute_map", {})
        of_keys = [n for n in ("num_key_value_heads", "num_kv_heads") if hasattr(config, n)]
        yield Attention(
            path,
            f"{path}.{out}",
            tuple((n, a) for n, a in axes.items() if n.endswith(".bias") or _has(block, n)),
            per,
            keys,
            names.get("num_attention_heads", "num_attention_heads"),
            names.get(of_keys[0], of_keys[0]) if of_keys else None,
            type(children[out]).__name__,
        )


def _is_of_all_heads(child: nn.Module, heads: int, keys: int, size: int) -> bool:
    """Whether a child is a norm over all heads at once, or a list of one for each."""
    if isinstance(child, nn.Linear | Conv1D):
        return False
    counts = {heads, keys} - {1}
    shapes = {p.shape for p in child.parameters(recurse=False)}
    lists = {len(m) for m in child.children() if isinstance(m, nn.ModuleList)}
    return any((count * size,) in shapes or count in lists for count in counts)


def _shape(projection: nn.Module) -> torch.Size:
    return projection.get_parameter("weight").shape


def _has(block: nn.Module, name: str) -> bool:
    return any(name == own for own, _ in block.named_parameters())


def _inputs(
    shapes: dict[str, int], heads: int, size: int, shares: bool
) -> tuple[dict[str, UnitAxis], int, int] | None:
    """The axes of the input projections, whose rows are ``shapes`` times the size of a head; query
    heads and KV heads of a unit. None for an unknown form."""
    if {"q_proj", "k_proj", "v_proj"} <= shapes.keys():
        keys = shapes["k_proj"]
        gated = shapes["q_proj"] // heads  # 2 where every query has a gate beside it
        if shapes["v_proj"] != keys or heads % keys:
            return None
        if shares and keys == 1 < heads:
            return {"q_proj": UnitAxis(0, (gated * size,))}, 1, 0
        own, per = UnitAxis(0, (size,)), heads // keys
        return {"q_proj": UnitAxis(0, (gated * per * size,)), "k_proj": own, "v_proj": own}, per, 1
    for name in ("qkv_proj", "query_key_value", "c_attn"):
        keys = (shapes.get(name, 0) - heads) // 2
        if keys < 1 or heads % keys or shapes[name] != heads + 2 * keys:
            continue
        per = heads // keys
        if shares and keys == 1 < heads:
            return {name: UnitAxis(0, (size,), fixed=2 * size)}, 1, 0
        side_by_side = name == "query_key_value"
        sections = ((per + 2) * size,) if side_by_side else (per * size, size, size)
        return {name: UnitAxis(0, sections)}, per, 1
    return None


class _Called(Exception):
    """The attention was reached, with these arguments."""


def _try(skeleton: PreTrainedModel, layout: Layout, number: int) -> None:
    """Raise CfspError where the attention of a block, cut to every other unit, gives something else
    than whole with the columns of the rest zero."""
    attention, block = layout.attention, layout.find_blocks(skeleton)[number]
    if attention is None:
        raise ValueError("the layout has no attention")
    args, kwargs = _attention_call(skeleton, layout, number)
    whole, count = _trial_block(block, attention), attention.units(block).count
    kept = torch.arange(count)[count > 1 :: 2][None]
    columns = attention.units(block).columns_of(kept[0])
    cut, down = copy.deepcopy(whole), whole.get_parameter(f"{attention.down}.weight")
    gone = torch.ones_like(down.T if attention.is_transposed else down, dtype=torch.bool)
    gone[:, columns] = False
    down.masked_fill_(gone.T if attention.is_transposed else gone, 0)
    attention.cut_(cut, kept, lambda _, old, __: CutDown(old[:, columns], None), None)
    expected, found = (
        hidden_states_of(trial.get_submodule(attention.path)(*args, **kwargs))
        for trial in (whole, cut)
    )
    if not torch.allclose(expected, found, rtol=TOLERANCE, atol=TOLERANCE):
        raise refused(skeleton.config.model_type, "without some heads the others change")


def _attention_call(
    skeleton: PreTrainedModel, layout: Layout, number: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a block calls its attention with, but for hidden states, which are random and short."""
    hidden, args, kwargs = block_calls(skeleton, layout)[number]
    block = on_meta(layout.find_blocks(skeleton)[number])
    attention = block.get_submodule(layout.attention.path)  # type: ignore[union-attr]

    def reached(*args: Any, **kwargs: Any) -> NoReturn:
        raise _Called(args, kwargs)

    try:
        with forward_instead([attention], [reached]):
            block(hidden.to("meta"), *args, **kwargs)
    except _Called as call:
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(1, TOKENS, TRIAL_SIZE, generator=generator)
        whole = tuple(hidden.shape)
        return tree_map_only(
            torch.Tensor,
            lambda x: states if x.is_meta and tuple(x.shape) == whole else x,
            call.args,
        )
    raise ValueError("the block does not call it")


def _trial_block(block: nn.Module, attention: Attention) -> nn.Module:
    """A module with a copy of the block's attention, of a small hidden size and random weights."""
    trial, generator = nn.Module(), torch.Generator().manual_seed(1)
    trial.add_module(attention.path, on_meta(block.get_submodule(attention.path)).eval())
    for name, old in list(trial.named_parameters()):
        shape, is_down = list(old.shape), name == f"{attention.down}.weight"
        if old.dim() == 2 and not _is_norm(trial, name):
            shape[is_down == attention.is_transposed] = TRIAL_SIZE
        elif name == f"{attention.down}.bias":
            shape[0] = TRIAL_SIZE
        scale = TRIAL_SIZE**-0.5 if len(shape) > 1 else 1.0
        value = torch.randn(shape, generator=generator) * scale
        set_parameter(trial, name, nn.Parameter(value, requires_grad=False))
    return trial


def _is_norm(block: nn.Module, name: str) -> bool:
    return not isinstance(block.get_submodule(name.rpartition(".")[0]), nn.Linear | Conv1D)
