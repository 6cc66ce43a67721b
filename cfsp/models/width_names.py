"""What a family's config calls the widths of its FFNs, found by changing it on a skeleton."""

import copy
from collections.abc import Iterator
from dataclasses import replace

from transformers import PreTrainedModel

from ..errors import CfspError
from .ffns.ffn import FFN
from .layouts import Layout
from .loading import make_skeleton, quiet_loading

OWN_NAME = "shared_intermediate_size"
"""Of an FFN beside experts whose width follows from theirs, or from nothing in the config."""


def with_width_names(model: PreTrainedModel, layout: Layout) -> Layout:
    """The layout with the widths as the config calls them. A value of the config is the width of an
    FFN that has as many channels, and twice as many in a model made with the double; a pruned
    model's config says it itself. FFNs of one block never share a name.
    """
    said = (getattr(model.config, "cfsp_config", None) or {}).get("channels", {})
    names: dict[FFN, str] = {}
    beside: dict[FFN, set[FFN]] = {ffn: set() for ffn in layout.ffns}
    for block in layout.find_blocks(model):
        for ffn in (found := layout.block_ffns(block)):
            beside[ffn].update(found)
    for ffn in layout.ffns:
        taken = {names[other] for other in beside[ffn] if other in names}
        if ffn.weight_names[-1] in said:
            candidates = iter([said[ffn.weight_names[-1]][0]])
        else:
            candidates = _names(model, layout, ffn)
        names[ffn] = next((name for name in candidates if name not in taken), "")
        if not names[ffn]:
            own = (OWN_NAME, f"{ffn.down.replace('.', '_')}_size")
            others = own if len(beside[ffn]) > 1 else (ffn.width,)
            names[ffn] = next(name for name in others if name not in taken)
    return replace(layout, ffns=tuple(replace(ffn, width=names[ffn]) for ffn in layout.ffns))


def _names(model: PreTrainedModel, layout: Layout, ffn: FFN) -> Iterator[str]:
    """Values of the config that are the number of an FFN's channels and set it."""
    name = ffn.weight_names[-1]
    number, block = next((n, block) for n, block, own in layout.ffns_of(model) if own == ffn)
    expected, width = list(block.get_parameter(name).shape), ffn.group(block).channels
    expected[ffn.channels[name].dimension] *= 2
    for key, value in model.config.get_text_config().to_dict().items():
        if type(value) is int and value == width:
            try:
                with quiet_loading():
                    config = copy.deepcopy(model.config)
                    setattr(config.get_text_config(), key, 2 * value)
                    changed = layout.find_blocks(make_skeleton(config, model.dtype))[number]
                    if list(changed.get_parameter(name).shape) == expected:
                        yield key
            except (CfspError, AttributeError, ValueError, IndexError):
                continue  # no such model: not the name of a width
