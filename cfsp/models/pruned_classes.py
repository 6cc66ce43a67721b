"""What a pruned model is to transformers: its family's own class, or one with per-block widths."""

from collections.abc import Set
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from .layouts import PRUNED_PREFIX, Layout
from .loading import make_skeleton
from .modeling_cfsp import pruned_class
from .registration import register_family
from .tensors import parameter_shapes

OF_PRUNED = (
    "model_type",
    "architectures",
    "auto_map",
    "per_layer_config",
    "allow_global_per_layer_attribute_access",
    "cfsp_config",
)
"""What a config says of a model's class and its pruning."""


def become_pruned_(model: PreTrainedModel, layout: Layout, summary: dict[str, Any]) -> None:
    """Give a model whose FFNs were cut the config and classes that reload it, in place: those of
    its family where they build exactly these parameters, else those of ``modeling_cfsp``."""
    widths = [
        {ffn.width: ffn.group(block).channels for ffn in layout.block_ffns(block)}
        for block in layout.find_blocks(model)
    ]
    stock = stock_model(model, widths, cfsp_config=summary)
    config, stock_type = stock.config, type(stock.config)
    own, stock_own = (parameter_shapes(m) for m in (model, stock))
    classes: tuple[type, type] = (type(stock), type(stock.base_model))
    if own != stock_own:
        stock_type = _family_of(stock)
        register_family(stock_type.model_type)
        classes = (pruned_class(classes[0]), pruned_class(classes[1]))
        config = pruned_class(stock_type)(
            **_values(model, widths),
            allow_global_per_layer_attribute_access=True,
            per_layer_config=dict(enumerate(widths)),
            cfsp_config={**summary, **_description(model, layout, own.keys() - stock_own.keys())},
        )
    config.architectures = [classes[0].__name__]
    for choice in ("_attn_implementation", "_experts_implementation"):
        setattr(config, choice, getattr(model.config, choice))
    for module in model.modules():
        if getattr(module, "config", None) is model.config and module is not model:
            module.config = config
    model.config = config
    model.__class__ = classes[0]
    model.base_model.__class__ = classes[1]


def _family_of(stock: PreTrainedModel) -> type[PreTrainedConfig]:
    """The config class of a family; of one without classes of its own, that of those it takes."""
    own, others = type(stock.config), type(stock).config_class or type(stock.config)
    if own is not others and get_checkpoint_conversion_mapping(own.model_type):
        raise ValueError(f"they are those of {others.model_type}, with other names in checkpoints")
    return others


def stock_model(
    model: PreTrainedModel, widths: list[dict[str, int]], **more: Any
) -> PreTrainedModel:
    """What a model's family builds, on meta, where every width is the largest of the blocks' (under
    the names of the config); ``more``: values of the config."""
    stock_type = CONFIG_MAPPING[model.config.model_type.removeprefix(PRUNED_PREFIX)]
    default = stock_type()
    # A width that the family has no value for follows from others there.
    unknown = {name for block in widths for name in block if not hasattr(default, name)}
    known = {k: v for k, v in _values(model, widths).items() if k not in unknown}
    return make_skeleton(stock_type(**known, **more), model.dtype)


def _values(model: PreTrainedModel, widths: list[dict[str, int]]) -> dict[str, Any]:
    """A model's config with the largest widths, as its family would say it."""
    values = {k: v for k, v in model.config.to_dict().items() if k not in OF_PRUNED}
    names = {name for block in widths for name in block}
    return {**values, **{name: max(block.get(name, 0) for block in widths) for name in names}}


def _description(model: PreTrainedModel, layout: Layout, added: Set[str]) -> dict[str, Any]:
    """What :mod:`models.modeling_cfsp` has to know about a family and its ``added`` parameters."""
    blocks = layout.find_blocks(model)
    present = {name for block in blocks for name, _ in block.named_parameters()}
    ffns = [ffn for ffn in layout.ffns if present.issuperset(ffn.weight_names)]
    return {
        "blocks": layout.blocks.removeprefix(f"{model.base_model_prefix}."),
        "channels": {
            name: [ffn.width, axis.dimension, axis.copies]
            for ffn in ffns
            for name, axis in ffn.channels.items()
            if name in present
        },
        "added_bias": sorted(
            ffn.down for ffn in ffns if any(name.endswith(f".{ffn.down}.bias") for name in added)
        ),
    }


def is_stock(model: PreTrainedModel) -> bool:
    """Whether a model is an architecture of transformers itself, without our modeling file."""
    return not model.config.model_type.startswith(PRUNED_PREFIX)
