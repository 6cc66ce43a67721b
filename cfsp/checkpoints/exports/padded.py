"""``padded``: zero channels and heads up to one size for all blocks, so that the stock class loads
it.

It loads wherever the dense model does and says the same, but is as large and as slow as its widest
block makes it: zero channels are multiplied like any other.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import CONFIG_MAPPING

from ...errors import CfspError
from ...models.layouts import Layout
from ...models.modeling_cfsp import one_size, set_parameter, set_width
from ...models.opening import open_any
from ...models.parts.channels import UnitAxis
from ...models.pruned_classes import become_pruned_, is_stock
from ..folder import write_settings
from ..verification import ridden_probe
from .source import Details, ExportOptions, ExportSource, write_changed_weights

TOLERANCE = 1e-4
"""Of the probe's fp32 logits, relative to the largest: zeros change the order of the sums."""
PER_BLOCK = ("blocks", "channels", "sizes", "added_bias", "attention", "mlp", "heads")
"""What ``cfsp_config`` says only of a model with sizes per block."""
JOINED = ("qkv_proj", "query_key_value", "c_attn")
"""Projections where zero heads are not the last rows."""


def check(source: ExportSource, options: ExportOptions) -> None:
    """Raise CfspError for what the stock class has no place for, and for a multiple below 1."""
    if options.multiple is not None and options.multiple < 1:
        raise CfspError(f"multiple is {options.multiple}, expected 1 or more")
    layout, model, family = source.opened.layout, source.opened.model, source.family
    if any(ffn.units(block).experts > 1 for _, block, ffn in layout.parts_of(model)):
        raise CfspError(
            f"padded holds plain FFNs, not the experts of {family}; prune with `uniform=True`"
        )
    default = CONFIG_MAPPING[family]()
    if not all(hasattr(default, ffn.width) for ffn in layout.ffns):
        raise CfspError(
            f"the FFN width of {family} follows from its hidden size, so its own class has "
            "no other; padded cannot hold it"
        )
    for kind, what in (("attention", "attention"), ("mlp", "FFN")):
        if gone := source.without(kind):
            raise CfspError(f"padded has no block {gone[0]} without {what}; {source.runs}")
    joined = any(name.split(".")[-2] in JOINED for name in head_axes(source))
    if joined and len(set(source.heads)) > 1:
        raise CfspError(f"padded has no heads per block for {family}; {source.runs}")
    for path in source.added_bias:
        of_ffn = any(path == ffn.down for ffn in layout.ffns)
        if not (of_ffn and hasattr(source.config, "mlp_bias")):
            raise CfspError(
                f"{family} has no place for the bias that the compensation added to "
                f"{path.rpartition('.')[2]}; prune with `compensation='none'` for this export"
            )


def write(source: ExportSource, options: ExportOptions, folder: Path, progress: bool) -> Details:
    """Write a folder of the stock class. Details: ``width`` of every block; ``probe_difference``,
    the largest of the probe's fp32 logits from the exported model's, in absolute terms."""
    multiple = options.multiple or 1
    width = math.ceil(max(source.widths) / multiple) * multiple
    opened, layout, added_bias = source.opened, source.opened.layout, source.added_bias
    summary = {k: value for k, value in source.settings.items() if k not in PER_BLOCK}
    heads, most, config = head_axes(source), most_heads(source), source.config

    def grow_(block: nn.Module) -> None:
        pad_block_(block, layout, width)
        pad_(block, heads)
        add_zero_biases_(block, source)

    write_changed_weights(source, folder, grow_, progress)
    if added_bias:
        source.config.mlp_bias = True
    with one_size(config) if most else nullcontext():
        for name, count in most.items():
            setattr(config, name, count)
        become_pruned_(opened.model, layout, {**summary, "padded_from": list(source.widths)})
    if not is_stock(opened.model):
        raise RuntimeError("padding did not make the stock architecture")
    write_settings(opened, folder)
    return {"width": width, "probe_difference": probe_difference(source.path, folder)}


def pad_block_(block: nn.Module, layout: Layout, width: int) -> None:
    """Give a block's FFN zero channels up to ``width``, in place."""
    for ffn in layout.block_ffns(block):
        pad_(block, {name: (axis, width) for name, axis in ffn.channels.items()})
        set_width(block, f"{ffn.down}.weight", width)


def head_axes(source: ExportSource) -> dict[str, tuple[UnitAxis, int]]:
    """Where the heads of a block lie in its parameters, and how many places the most of a block
    take; {} where they lie as in the family's class."""
    most = most_heads(source)
    return {
        name: (UnitAxis(dimension), most[of] * each)
        for name, (of, dimension, each, *_) in source.settings.get("sizes", {}).items()
        if of in most
    }


def most_heads(source: ExportSource) -> dict[str, int]:
    """The numbers of heads of the block with the most, by their names in the config; as many as it
    says, of the dense model, where the hidden size cannot be divided by these. {} where they are
    those of the family's class."""
    names, most, config = source.settings.get("heads", ()), max(source.heads), source.config
    if most[0] and config.hidden_size % most[0]:
        return {name: getattr(config, name) for name in names if name}
    return {name: count for name, count in zip(names, most, strict=False) if name}


def pad_(block: nn.Module, axes: Mapping[str, tuple[UnitAxis, int]]) -> None:
    """Give parameters of a block zeros up to a size along an axis, in place."""
    parameters = dict(block.named_parameters())
    for name in axes.keys() & parameters.keys():
        padded = zero_padded(parameters[name], *axes[name])
        set_parameter(block, name, nn.Parameter(padded, requires_grad=False))


def zero_padded(tensor: torch.Tensor, axis: UnitAxis, size: int) -> torch.Tensor:
    """A vector or matrix with zeros after what each section has, which makes ``size`` of each."""
    parts = tensor.chunk(len(axis.sections), axis.dimension)
    shape = list(parts[0].shape)
    shape[axis.dimension] = size - shape[axis.dimension]
    zeros = tensor.new_zeros(shape)
    return torch.cat([piece for part in parts for piece in (part, zeros)], axis.dimension)


def add_zero_biases_(block: nn.Module, source: ExportSource) -> None:
    """Where a compensation added a bias to down, give gate and up biases of zeros, in place: the
    stock classes know a bias for all three or for none."""
    for ffn in source.opened.layout.block_ffns(block):
        if ffn.down not in source.added_bias:
            continue
        for path in (ffn.gate, ffn.up):
            weight = block.get_parameter(f"{path}.weight")
            bias = nn.Parameter(weight.new_zeros(len(weight)), requires_grad=False)
            set_parameter(block, f"{path}.bias", bias)


def probe_difference(source: str | Path, folder: Path) -> float:
    """The largest difference of the probe's logits, in fp32; RuntimeError, a defect, where it is
    more than :data:`TOLERANCE` of the largest logit."""
    opened = (open_any(model, dtype="float32", device="cpu") for model in (source, folder))
    expected, found = map(ridden_probe, opened)
    worst = float((found - expected).abs().max())
    if not worst <= TOLERANCE * float(expected.abs().max()):
        raise RuntimeError(f"the padded model differs from the pruned one by {worst}")
    return worst
