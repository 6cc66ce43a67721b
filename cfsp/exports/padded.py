"""``padded``: zero channels up to one width for all blocks, so that the stock class loads it.

It loads wherever the dense model does and says the same, but is as large and as slow as its widest
block makes it: zero channels are multiplied like any other.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import CONFIG_MAPPING

from ..checkpoint import write_settings
from ..classes import become_pruned_, is_stock
from ..errors import CfspError
from ..layouts import Layout
from ..modeling_cfsp import set_parameter, set_width
from ..streaming import open_lean, ridden_probe
from .source import (
    ExportOptions,
    ExportSource,
    check_written_weights,
    open_source,
    write_changed_weights,
)

TOLERANCE = 1e-4
"""Of the probe's fp32 logits, relative to the largest: zeros change the order of the sums."""


def check(source: ExportSource, options: ExportOptions) -> None:
    """Raise CfspError for a multiple below 1, a bias that the stock class has no place for, or FFNs
    that cannot be padded."""
    if options.multiple is not None and options.multiple < 1:
        raise CfspError(f"multiple is {options.multiple}, expected 1 or more")
    layout, default = source.opened.layout, CONFIG_MAPPING[source.family]()
    for ffn in layout.ffns:
        split = any(axis.copies > 1 for axis in ffn.channels.values())
        if len(layout.ffns) > 1 or split or not hasattr(default, ffn.width):
            raise CfspError(
                f"padded cannot hold {source.family}: it adds channels at the end of gate, up and "
                "down and says so in the config; prune with --uniform instead"
            )
    if source.added_bias and not hasattr(source.config, "mlp_bias"):
        raise CfspError(
            f"{source.family} has no place for the bias that the compensation added to the down "
            "projections; prune with --compensation none for this export"
        )


def write(
    source: ExportSource, options: ExportOptions, folder: Path, progress: bool
) -> dict[str, Any]:
    """A folder of the stock class. Details: ``width`` of every block; ``probe_difference``, the
    largest of the probe's fp32 logits from the exported model's, in absolute terms."""
    multiple = options.multiple or 1
    width = -(-max(source.widths) // multiple) * multiple
    opened, layout = source.opened, source.opened.layout
    added_bias = source.added_bias
    summary = dict(getattr(source.config, "cfsp_config", None) or {})

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
    check_written_weights(open_source(source.path), folder)
    return {"width": width, "probe_difference": probe_difference(source.path, folder)}


def pad_block_(block: nn.Module, layout: Layout, width: int) -> None:
    """Give a block's FFN zero channels up to ``width``, in place."""
    parameters = dict(block.named_parameters())
    for ffn in layout.block_ffns(block):
        for name, axis in ffn.channels.items():
            old = parameters.get(name)
            if old is not None:
                more = (0, width - old.shape[axis.dimension])
                last_first = (0, 0) * (old.dim() - 1 - axis.dimension) + more
                set_parameter(block, name, _frozen(pad(old, last_first)))
                set_width(block, name, width)


def add_zero_biases_(block: nn.Module, layout: Layout) -> None:
    """Give gate and up biases of zeros, in place: beside the down projection's, which a
    compensation added, since the stock classes know a bias for all three or for none."""
    for ffn in layout.block_ffns(block):
        for path in filter(None, (ffn.gate, ffn.up)):
            weight = ffn.projection(block, path).weight
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
    expected = ridden_probe(open_lean(source, "float32", "cpu"))
    found = ridden_probe(open_lean(folder, "float32", "cpu"))
    worst = float((found - expected).abs().max())
    if not worst <= TOLERANCE * float(expected.abs().max()):
        raise RuntimeError(f"the padded model differs from the pruned one by {worst}")
    return worst
