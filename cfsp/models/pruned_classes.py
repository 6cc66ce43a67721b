"""What a pruned model is to transformers: its family's own class, or one with per-block sizes."""

from collections.abc import Sequence, Set
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from ..errors import CfspError
from .layouts import PRUNED_PREFIX, Layout
from .loading import make_skeleton
from .modeling_cfsp import BlockConfig, NoAttention, NoFFN, pruned_class, sizes_of
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
    """Give a model whose blocks were cut the config and classes that reload it, in place: those of
    its family where they build exactly these parameters, else those of ``modeling_cfsp``."""
    blocks = layout.find_blocks(model)
    sizes = [block_sizes(layout, block) for block in blocks]
    rest = _layers(model.config, {"skip", *_largest(sizes)})
    skipped = [skipped_parts(block) for block in blocks]
    stock = stock_model(model, layout, sizes, cfsp_config=summary)
    config, stock_type = stock.config, type(stock.config)
    own, stock_own = (parameter_shapes(m) for m in (model, stock))
    classes: tuple[type, type] = (type(stock), type(stock.base_model))
    if own != stock_own or any(skipped):
        stock_type = _family_of(stock)
        register_family(stock_type.model_type)
        classes = (pruned_class(classes[0]), pruned_class(classes[1]))
        config = pruned_class(stock_type)(
            **_values(
                model.config,
                **_own_heads(model, layout, _largest(sizes)),
                **_head_dim(model, layout),
                **_experts(layout),
                allow_global_per_layer_attribute_access=True,
                per_layer_config={
                    number: {
                        **rest.get(number, {}),
                        **own,
                        **({"skip": sorted(skipped[number])} if skipped[number] else {}),
                    }
                    for number, own in enumerate(sizes)
                },
                cfsp_config={
                    **summary,
                    **_description(model, layout, own.keys() - stock_own.keys()),
                },
            )
        )
    config.architectures = [classes[0].__name__]
    set_config_(model, config)
    model.__class__ = classes[0]
    model.base_model.__class__ = classes[1]
    if layout.fewer_experts is not None and hasattr(model, "num_experts"):
        model.num_experts = layout.fewer_experts.count


def set_config_(model: PreTrainedModel, config: Any) -> None:
    """Give a model, and all in it that reads its config or a part of that, another config of the
    same parts; how it computes stays."""
    before = _parts(model.config)
    successors = {id(was): now for was, now in zip(before, _parts(config), strict=True)}
    for was in before:
        for choice in ("_attn_implementation", "_experts_implementation"):
            setattr(successors[id(was)], choice, getattr(was, choice))
    for module in model.modules():
        own = getattr(module, "config", None)
        if isinstance(own, BlockConfig):
            own.of_model = successors[id(own.of_model)]
        elif id(own) in successors:
            module.config = successors[id(own)]


def _family_of(stock: PreTrainedModel) -> type[PreTrainedConfig]:
    """The config class of a family; of one without classes of its own, that of those it takes."""
    own, others = type(stock.config), type(stock).config_class or type(stock.config)
    if own is not others and get_checkpoint_conversion_mapping(own.model_type):
        raise ValueError(f"they are those of {others.model_type}, with other names in checkpoints")
    return others


def block_sizes(layout: Layout, block: nn.Module) -> dict[str, int]:
    """The widths and numbers of heads of a block, under the names of the config."""
    parts = ((part, part.units(block).count) for part in layout.block_parts(block))
    return {k: v for part, count in parts for k, v in part.config_sizes(count).items()}


def skipped_parts(block: nn.Module) -> dict[str, str]:
    """Which of "attention" and "mlp" was taken out of a block, with its path."""
    kinds = {NoAttention: "attention", NoFFN: "mlp"}
    return {kinds[type(m)]: path for path, m in block.named_modules() if type(m) in kinds}


def stock_model(
    model: PreTrainedModel, layout: Layout, sizes: Sequence[dict[str, int]], **more: Any
) -> PreTrainedModel:
    """What a model's family builds, on meta, where every size is the largest of the blocks' (under
    the names of the config), with the model's own heads where it takes no such number of them;
    ``more``: values of the config."""
    stock_type = CONFIG_MAPPING[model.config.model_type.removeprefix(PRUNED_PREFIX)]
    default = type(model.config.get_text_config())()
    largest = _largest(sizes)
    layers = _layers(model.config, largest.keys() | _pruned_names(model.config)) or None

    def built(sizes: dict[str, int]) -> PreTrainedModel:
        # A width that the family has no value for follows from others there.
        known = {k: v if hasattr(default, k) else None for k, v in sizes.items()}
        known |= _head_dim(model, layout) | _experts(layout)
        values = _values(model.config, **known, per_layer_config=layers, **more)
        return make_skeleton(stock_type(**values), model.dtype)

    own = _own_heads(model, layout, largest)
    try:
        return built(largest)
    except (CfspError, StrictDataclassError):
        if own == largest:
            raise
        return built(own)


def _experts(layout: Layout) -> dict[str, int]:
    """What the config says of experts, where only some of them stay."""
    fewer = layout.fewer_experts
    return {fewer.name: fewer.count} if fewer is not None else {}


def _parts(config: Any) -> list[Any]:
    """A config and those of its parts, of text and of vision."""
    parts = [getattr(config, name) for name in sorted(config.sub_configs)]
    return [config, *(part for part in parts if part is not None)]


def _pruned_names(config: Any) -> set[str]:
    """In what the blocks of a pruned model may differ that those of its family do not."""
    settings = getattr(config.get_text_config(), "cfsp_config", None) or {}
    return {"skip", *settings.get("heads", ()), *(n for n, *_ in sizes_of(settings).values())}


def _layers(config: Any, names: Set[str]) -> dict[int, dict[str, Any]]:
    """In what else than these values blocks differ, by the number of the block."""
    layers = config.get_text_config().to_dict().get("per_layer_config") or {}
    found = {int(n): {k: v for k, v in own.items() if k not in names} for n, own in layers.items()}
    return {number: own for number, own in found.items() if own}


def _largest(sizes: Sequence[dict[str, int]]) -> dict[str, int]:
    names = {name for block in sizes for name in block}
    return {name: max(block.get(name, 0) for block in sizes) for name in names}


def _own_heads(model: PreTrainedModel, layout: Layout, sizes: dict[str, int]) -> dict[str, int]:
    """The sizes, but for numbers of heads as the model had them: what else follows from these does
    not change."""
    attention, text = layout.attention, model.config.get_text_config()
    names = (attention.heads_name, attention.keys_name) if attention is not None else ()
    return {k: getattr(text, k) if k in names else v for k, v in sizes.items()}


def _head_dim(model: PreTrainedModel, layout: Layout) -> dict[str, int]:
    """The size of a head where numbers of heads may change, which it follows from otherwise."""
    own = getattr(type(model.config.get_text_config()), "head_dim", None)
    if layout.attention is None or isinstance(own, property):
        return {}
    return {"head_dim": layout.attention.head_size}


def _values(config: Any, **changed: Any) -> dict[str, Any]:
    """A config as its family would say it, but for ``changed`` values, of which None are left out:
    in the text config of a multimodal model."""
    values = {k: v for k, v in config.to_dict().items() if k not in OF_PRUNED}
    text = config.get_text_config()
    if text is not config:
        own = {"model_type": text.model_type, **_values(text, **changed)}
        return {**values, "text_config": own}
    values |= changed
    return {k: v for k, v in values.items() if k not in changed or v is not None}


def _description(model: PreTrainedModel, layout: Layout, added: Set[str]) -> dict[str, Any]:
    """What :mod:`models.modeling_cfsp` has to know about a family and its ``added`` parameters."""
    blocks, attention = layout.find_blocks(model), layout.attention
    present = {name for block in blocks for name, _ in block.named_parameters()}
    parts = [p for block in blocks for p in layout.block_parts(block)]
    before = getattr(model.config.get_text_config(), "cfsp_config", None) or {}
    sizes = {name: own for name, own in sizes_of(before).items() if name in present}
    for part in dict.fromkeys(parts):
        for name, axis in part.channels.items():
            if name in present:
                fixed = [axis.fixed] if axis.fixed else []
                sizes[name] = [part.count_name, axis.dimension, sum(axis.sections), *fixed]
    heads = before.get("heads")
    if attention is not None:
        heads = [attention.heads_name, attention.keys_name if attention.keys else 1]
    skipped = {kind: path for block in blocks for kind, path in skipped_parts(block).items()}
    paths = {"attention": attention.path} if attention else {}
    return {
        "blocks": layout.blocks.removeprefix(f"{model.base_model_prefix}."),
        "sizes": sizes,
        "added_bias": sorted(
            {p.down for p in parts if any(name.endswith(f".{p.down}.bias") for name in added)}
        ),
        **{k: before[k] for k in ("attention", "mlp") if k in before},
        **paths,
        **skipped,
        **({"heads": heads} if heads else {}),
    }


def is_stock(model: PreTrainedModel) -> bool:
    """Whether a model is an architecture of transformers itself, without our modeling file."""
    return not model.config.model_type.startswith(PRUNED_PREFIX)
