"""Models whose blocks differ in heads and widths, or lack parts, as a mixed plan makes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cfsp.checkpoints.folder import write_model
from cfsp.models.opening import open_any
from cfsp.models.parts.attention import Attention
from cfsp.models.parts.channels import CutDown
from cfsp.models.pruned_classes import become_pruned_


def write_mixed(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: Path,
    groups: Sequence[int],
    widths: Sequence[int],
    added_bias: bool = False,
) -> Path:
    """Cut every block of a model to so many KV groups and channels, the last ones; 0 takes the part
    out. Writes the folder."""
    opened = open_any(model, tokenizer, attention=True)
    layout, generator = opened.layout, torch.Generator().manual_seed(5)

    with torch.no_grad():
        for block, *counts in zip(layout.find_blocks(model), widths, groups, strict=True):
            for part in layout.block_parts(block):
                count, units = counts[isinstance(part, Attention)], part.units(block)
                if not count:
                    part.remove_(block)
                    continue
                kept = torch.arange(units.count - count, units.count)
                columns = units.columns_of(kept)

                def compensate(
                    _: int, down: torch.Tensor, __: object, columns: torch.Tensor = columns
                ) -> CutDown:
                    bias = torch.randn(len(down), generator=generator) if added_bias else None
                    return CutDown(down[:, columns].contiguous(), bias)

                part.cut_(block, kept[None], compensate, None)
    become_pruned_(model, layout, {})
    folder.mkdir(parents=True)
    write_model(opened, folder)
    return folder
