"""``padded``: zero channels up to one width for all blocks, so that the stock class loads it.

It loads wherever the dense model does and says the same, but is as large and as slow as its widest
block makes it: zero channels are multiplied like any other.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING

from ...errors import CfspError
from ...models.channels import ChannelAxis
from ...models.layouts import Layout
from ...models.modeling_cfsp import set_parameter, set_width
from ...models.opening import open_any
from ...models.pruned_classes import become_pruned_, is_stock
from ..folder import write_settings
from ..verification import ridden_probe
from .source import (
    ExportOptions,
    ExportSource,
    check_written_weights,
    open_source,
    write_changed_weights,
)

TOLERANCE = 1e-4
"""Of the probe's fp32 logits, relative to the largest: zeros change the order of the sums."""

PER_BLOCK = ("blocks", "channels", "added_bias")
"""What ``cfsp_config`` says only of a model with a width per block."""


def check(source: ExportSource, options: ExportOptions) -> None:
    """Raise CfspError for what the stock class has no place for, and for a multiple below 1."""
    if options.multiple is not None and options.multiple < 1:
        raise CfspError(f"multiple is {options.multiple}, expected 1 or more")
    layout, model = source.opened.layout, source.opened.model
    if any(ffn.group(block).experts > 1 for _, block, ffn in layout.ffns_of(model)):
        raise CfspError(
            f"padded holds plain FFNs, not the experts of {source.family}; prune with --uniform"
        )
    default = CONFIG_MAPPING[source.family]()
    if not all(hasattr(default, ffn.width) for ffn in layout.ffns):
        raise CfspError(
            f"the FFN width of {source.family} follows from its hidden size, so its own class has "
            "no other; padded cannot hold it"
        )
    if source.added_bias and not hasattr(source.config, "mlp_bias"):
        raise CfspError(
            f"{source.family} has no place for the bias that the compensation added to the down "
            "projections; prune with --compensation none for this export"
        )


def write(
    source: ExportSource, options: ExportOptions, folder: Path, progress: bool
) -> dict[str, Any]:
    """Write a folder of the stock class. Details: ``width`` of every block; ``probe_difference``,
    the largest of the probe's fp32 logits from the exported model's, in absolute terms."""
    multiple = options.multiple or 1
    width = -(-max(source.widths) // multiple) * multiple
    opened, layout = source.opened, source.opened.layout
    added_bias = source.added_bias
    summary = getattr(source.config, "cfsp_config", None) or {}
    summary = {name: value for name, value in summary.items() if name not in PER_BLOCK}

    def grow_(block: nn.Module) -> None:
        pad_block_(block, layout, width)
        if added_bias:
            add_zero_biases_(block, layout)

    write_changed_weights(source, folder, grow_, progress)
    if added_bias:
        source.config.mlp_bias = True
    become_pruned_(opened.model, layout, {**summary, "padded_from": list(source.widths)})
    if not is_stock(opened.model):
        raise RuntimeError("padding did not make the stock architecture")
    write_settings(opened.model, opened.tokenizer, folder)
    check_written_weights(open_source(source.path), folder, grow_)
    return {"width": width, "probe_difference": probe_difference(source.path, folder)}


def pad_block_(block: nn.Module, layout: Layout, width: int) -> None:
    """Give a block's FFN zero channels up to ``width``, in place."""
    parameters = dict(block.named_parameters())
    for ffn in layout.block_ffns(block):
        for name, axis in ffn.channels.items():
            if name in parameters:
                set_parameter(block, name, _frozen(zero_padded(parameters[name], axis, width)))
        set_width(block, f"{ffn.down}.weight", width)


def zero_padded(tensor: torch.Tensor, axis: ChannelAxis, width: int) -> torch.Tensor:
    """A vector or matrix with zeros after the channels that it has, ``width`` in all."""
    parts = tensor.chunk(axis.copies, axis.dimension)
    shape = list(parts[0].shape)
    shape[axis.dimension] = width - shape[axis.dimension]
    zeros = tensor.new_zeros(shape)
    return torch.cat([piece for part in parts for piece in (part, zeros)], axis.dimension)


def add_zero_biases_(block: nn.Module, layout: Layout) -> None:
    """Give gate and up biases of zeros, in place: beside the down projection's, which a
    compensation added, since the stock classes know a bias for all three or for none."""
    for ffn in layout.block_ffns(block):
        for path in (ffn.gate, ffn.up):
            weight = block.get_parameter(f"{path}.weight")
            set_parameter(block, f"{path}.bias", _frozen(weight.new_zeros(len(weight))))


def _frozen(data: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(data.detach(), requires_grad=False)


def probe_difference(source: str | Path, folder: Path) -> float:
    """Open both in fp32, block by block, and compare what they say to the probe's tokens.

    Returns:
        The largest absolute difference of a logit.

    Raises:
        RuntimeError: more than :data:`TOLERANCE` of the largest logit. A defect.
    """
    expected = ridden_probe(open_any(source, dtype="float32", device="cpu"))
    found = ridden_probe(open_any(folder, dtype="float32", device="cpu"))
    worst = float((found - expected).abs().max())
    if not worst <= TOLERANCE * float(expected.abs().max()):
        raise RuntimeError(f"the padded model differs from the pruned one by {worst}")
    return worst
