"""``padded``: zero channels up to one width for all blocks, so that the stock class loads it.

It loads wherever the dense model does and says the same, but is as large and as slow as its widest
block makes it: zero channels are multiplied like any other.
"""

import math
from pathlib import Path

import torch
from torch import nn
from transformers import CONFIG_MAPPING

from ...errors import CfspError
from ...models.layouts import Layout
from ...models.modeling_cfsp import set_parameter, set_width
from ...models.opening import open_any
from ...models.parts.channels import UnitAxis
from ...models.pruned_classes import become_pruned_, is_stock
from ..folder import write_settings
from ..verification import ridden_probe
from .source import Details, ExportOptions, ExportSource, write_changed_weights

TOLERANCE = 1e-4
"""Of the probe's fp32 logits, relative to the largest: zeros change the order of the sums."""
PER_BLOCK = ("blocks", "channels", "added_bias")
"""What ``cfsp_config`` says only of a model with a width per block."""


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
    if source.added_bias and not hasattr(source.config, "mlp_bias"):
        raise CfspError(
            f"{family} has no place for the bias that the compensation added to the down "
            "projections; prune with `compensation='none'` for this export"
        )


def write(source: ExportSource, options: ExportOptions, folder: Path, progress: bool) -> Details:
    """Write a folder of the stock class. Details: ``width`` of every block; ``probe_difference``,
    the largest of the probe's fp32 logits from the exported model's, in absolute terms."""
    multiple = options.multiple or 1
    width = math.ceil(max(source.widths) / multiple) * multiple
    opened, layout, added_bias = source.opened, source.opened.layout, source.added_bias
    summary = getattr(source.config, "cfsp_config", None) or {}
    summary = {name: value for name, value in summary.items() if name not in PER_BLOCK}

    def grow_(block: nn.Module) -> None:
        pad_block_(block, layout, width)
        add_zero_biases_(block, source)

    write_changed_weights(source, folder, grow_, progress)
    if added_bias:
        source.config.mlp_bias = True
    become_pruned_(opened.model, layout, {**summary, "padded_from": list(source.widths)})
    if not is_stock(opened.model):
        raise RuntimeError("padding did not make the stock architecture")
    write_settings(opened, folder)
    return {"width": width, "probe_difference": probe_difference(source.path, folder)}


def pad_block_(block: nn.Module, layout: Layout, width: int) -> None:
    """Give a block's FFN zero channels up to ``width``, in place."""
    parameters = dict(block.named_parameters())
    for ffn in layout.block_ffns(block):
        for name, axis in ffn.channels.items():
            if name in parameters:
                padded = zero_padded(parameters[name], axis, width)
                set_parameter(block, name, nn.Parameter(padded, requires_grad=False))
        set_width(block, f"{ffn.down}.weight", width)


def zero_padded(tensor: torch.Tensor, axis: UnitAxis, width: int) -> torch.Tensor:
    """A vector or matrix with zeros after the channels that it has, ``width`` in all."""
    parts = tensor.chunk(len(axis.sections), axis.dimension)
    shape = list(parts[0].shape)
    shape[axis.dimension] = width - shape[axis.dimension]
    zeros = tensor.new_zeros(shape)
    return torch.cat([piece for part in parts for piece in (part, zeros)], axis.dimension)


def add_zero_biases_(block: nn.Module, source: ExportSource) -> None:
    """Where a compensation added a bias to down, give gate and up biases of zeros, in place: the
    stock classes know a bias for all three or for none."""
    for ffn in source.opened.layout.block_ffns(block) if source.added_bias else ():
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
