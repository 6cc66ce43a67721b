"""What the config of a model calls the widths of its FFNs, found by building models of others."""

import copy
from collections.abc import Container
from dataclasses import replace

from transformers import PreTrainedModel

from ..layouts import Layout
from ..loading import make_skeleton, quiet_loading
from ..parts.channels import UnitAxis
from ..parts.ffn import FFN
from ..tensors import parameter_shapes

FEW_CHANNELS = 8
OWN_NAME = "shared_intermediate_size"
"""Of an FFN beside experts whose width follows from theirs, or from nothing in the config."""


def with_width_names(model: PreTrainedModel, layout: Layout) -> Layout:
    """The layout with the widths as the config calls them; FFNs of one block never share a name."""
    names: dict[FFN, str] = {}
    beside: dict[FFN, set[FFN]] = {ffn: set() for ffn in layout.ffns}
    places: dict[FFN, str] = {}
    for number, block in enumerate(layout.find_blocks(model)):
        for ffn in (found := layout.block_ffns(block)):
            beside[ffn].update(found)
            places.setdefault(ffn, layout.prefix(number) + ffn.weight_names[-1])
    for ffn in layout.ffns:
        taken = {names[other] for other in beside[ffn] if other in names}
        axis = ffn.channels[ffn.weight_names[-1]]
        name = width_name(model, places[ffn], axis, ffn.width, taken)
        own = (OWN_NAME, f"{ffn.down.replace('.', '_')}_size")
        others = own if len(beside[ffn]) > 1 else (ffn.width,)
        names[ffn] = name or next(name for name in others if name not in taken)
    return replace(layout, ffns=tuple(replace(ffn, width=names[ffn]) for ffn in layout.ffns))


def width_name(
    model: PreTrainedModel,
    name: str,
    axis: UnitAxis,
    default: str = "intermediate_size",
    taken: Container[str] = (),
) -> str:
    """The value of a config that is the number of channels along ``axis`` of the parameter
    ``name`` of a model: a new model has as many as it says; ``default`` is tried first. "" where no
    value is, or only those in ``taken``, which are the widths of other FFNs."""
    pruned = (getattr(model.config, "cfsp_config", None) or {}).get("channels", {})
    for path, (known, *_) in pruned.items():
        if name.endswith(f".{path}"):
            return known
    width = axis.count(model.get_parameter(name).shape[axis.dimension])
    values = model.config.get_text_config().to_dict()
    # Where it is null, a width follows from the hidden size.
    candidates = [key for value in (width, None) for key in values if values[key] == value]
    for key in sorted(candidates, key=lambda key: key != default):
        if key not in taken and all(
            _decides(model, key, name, axis, value) for value in (width // 2, FEW_CHANNELS)
        ):
            return key
    return ""


def _decides(model: PreTrainedModel, key: str, name: str, axis: UnitAxis, width: int) -> bool:
    """Whether a new model has this width, and nothing else of the parameter is changed, where its
    config has it under this key."""
    shape = list(model.get_parameter(name).shape)
    shape[axis.dimension] = axis.size(width)
    config = copy.deepcopy(model.config)
    try:
        setattr(config.get_text_config(), key, width)
        with quiet_loading():
            found = parameter_shapes(make_skeleton(config, model.dtype))
    except Exception:  # of whatever kind a family's own code raises at such a value
        return False
    return found.get(name) == tuple(shape)
