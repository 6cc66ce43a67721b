# SPDX-License-Identifier: Apache-2.0
"""Decoders whose blocks have sizes of their own, of any family of transformers.

Self-contained: this file lies beside the weights of a pruned model, so that
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``, or for a multimodal model
``AutoModelForImageTextToText``, loads it anywhere, and it is the module that the package ``cfsp``
registers with transformers.

A class is made when it is first asked for: ``CFSPLlamaForCausalLM`` is transformers' own
``LlamaForCausalLM``, built by it and then given an FFN width and heads of its own per block.

In ``config.json``, of a multimodal model in its ``text_config``, are

* ``per_layer_config``: the widths and heads of every block, under the names that the family has
  for them, and ``skip``, which of "attention" and "mlp" it lacks;
* ``cfsp_config``: ``blocks``, the path of the blocks in the base model; ``sizes``, for each
  parameter of a block whose shape differs, the name of a width or number of heads, the dimension,
  its size for one of these, and what is added to it; ``added_bias``, down projections with a bias
  that the family lacks; ``attention`` and ``mlp``, the paths of these in a block; ``heads``, the
  names of the numbers of heads, and of those with keys: null where all have some, 1 where one
  serves all.
"""

from contextlib import contextmanager

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

PREFIX = "CFSP"
MODEL_TYPE_PREFIX = "cfsp_"
WIDTH_ATTRIBUTES = ("intermediate_size", "intermediate_dim")
HEADS_ATTRIBUTES = ("num_heads", "num_attention_heads")
KEYS_ATTRIBUTES = ("num_key_value_heads", "num_kv_heads")
AUTO_CLASSES = {
    "AutoModel": "MODEL_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
}
"""The Auto classes that load a pruned model, and transformers' tables of the families' classes."""


def stock_config(config_class):
    """The config class of transformers that one of ours was derived from."""
    return config_class.__bases__[-1]


def family_classes(stock_config):
    """transformers' own classes for a config class, by Auto class; not those of its text config."""
    tables = {auto: getattr(transformers, table) for auto, table in AUTO_CLASSES.items()}
    found = {auto: table[stock_config] for auto, table in tables.items() if stock_config in table}
    return {auto: kind for auto, kind in found.items() if kind.config_class is stock_config}


def set_parameter(block, name, parameter):
    """Give a block's module a parameter; what the module says of its own sizes follows."""
    path, _, leaf = name.rpartition(".")
    module = block.get_submodule(path)
    setattr(module, leaf, parameter)
    module._is_hf_initialized = False
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape


def set_width(block, name, width):
    """Where the FFN that a parameter is in keeps its width in an attribute, set it."""
    owner = block.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, (nn.Linear, Conv1D)):
        owner = block.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    for attribute in WIDTH_ATTRIBUTES:
        if hasattr(owner, attribute):
            setattr(owner, attribute, width)


def set_heads(attention, heads, keys):
    """What an attention says of its numbers of heads, and of those with keys, follows."""
    for names, count in ((HEADS_ATTRIBUTES, heads), (KEYS_ATTRIBUTES, keys)):
        for name in names:
            if isinstance(getattr(attention, name, None), int):
                setattr(attention, name, count)
    if hasattr(attention, "num_key_value_groups"):
        attention.num_key_value_groups = heads // keys
    if hasattr(attention, "split_size"):
        attention.split_size = attention.embed_dim = heads * attention.head_dim
    if hasattr(attention, "qkv_proj"):  # forward asks the config where its sections end
        dense = getattr(attention.config, "of_model", attention.config)
        attention.config = BlockConfig(dense, heads, keys)


class BlockConfig:
    """The config of a model, but for the numbers of heads of one block."""

    def __init__(self, of_model, heads, keys):
        self.of_model, self.num_attention_heads, self.num_key_value_heads = of_model, heads, keys

    def __getattr__(self, name):
        if name.startswith("__") or name == "of_model":
            raise AttributeError(name)
        return getattr(self.of_model, name)


class NoAttention(nn.Module):
    """In the place of an attention that is gone: adds nothing. What it caches, one value a token,
    tells the positions that tokens have to whoever asks the first block's cache."""

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, *args, **kwargs):
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        for cache in (*args, *kwargs.values()):
            if isinstance(cache, transformers.Cache):
                value = states.new_zeros(len(states), 1, states.shape[1], 1)
                cache.update(value, value, self.layer_idx)
        return torch.zeros_like(states), None


class NoFFN(nn.Module):
    """In the place of an FFN that is gone: adds nothing."""

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


def skip(block, kind, path):
    """Take the attention or FFN ("mlp") at a path out of a block."""
    part = block.get_submodule(path)
    none = NoFFN() if kind == "mlp" else NoAttention(getattr(part, "layer_idx", None))
    block.set_submodule(path, none)


def resize_blocks(decoder, config):
    """Give every block of a base model the sizes that its config says."""
    settings = config.cfsp_config
    blocks = decoder.get_submodule(settings["blocks"])
    for block, own in zip(blocks, config.per_layer_config, strict=True):
        for kind in getattr(own, "skip", None) or ():
            skip(block, kind, settings[kind])
        parameters, heads = dict(block.named_parameters()), settings.get("heads") or ()
        has_heads = False
        for name, (count_name, dimension, each, *added) in sizes_of(settings).items():
            if name in parameters:
                has_heads |= count_name in heads
                count = getattr(own, count_name)
                shape = list(parameters[name].shape)
                shape[dimension] = sum(added, count * each)
                set_parameter(block, name, nn.Parameter(parameters[name].new_empty(shape)))
                set_width(block, name, count)
        if has_heads:
            count, keys = (getattr(own, n) if isinstance(n, str) else n for n in heads)
            set_heads(block.get_submodule(settings["attention"]), count, keys or count)
        for path in settings["added_bias"]:
            if f"{path}.weight" in parameters:
                down = block.get_submodule(path)
                bias = down.weight.new_empty(down.out_features)
                set_parameter(block, f"{path}.bias", nn.Parameter(bias))


def sizes_of(settings):
    """Which parameters have other shapes than the family's; of older folders, FFNs alone."""
    return settings.get("sizes", settings.get("channels", {}))


@contextmanager
def one_size(config):
    """Have a config say one width and number of heads for all blocks, as the stock code reads it;
    in what else its family has blocks differ, they still do."""
    layers = config.to_dict().get("per_layer_config") or {}
    heads = config.cfsp_config.get("heads") or ()
    names = {"skip", *heads, *(name for name, *_ in sizes_of(config.cfsp_config).values())}
    rest = {n: {k: v for k, v in layer.items() if k not in names} for n, layer in layers.items()}
    config.per_layer_config = rest if any(rest.values()) else None
    try:
        yield
    finally:
        config.per_layer_config = layers or None


class PerBlockConfig:
    """Says its number of blocks under the common name too: without this file, the widths per block
    are checked against that, which AutoTokenizer has done as it looks into config.json."""

    def to_dict(self):
        if self.get_text_config() is not self:  # the widths are in there, and its blocks' number
            return super().to_dict()
        return {**super().to_dict(), "num_hidden_layers": self.num_hidden_layers}


def _family_class(cls):
    """The class of transformers that one of ours, or a class derived from that, builds upon."""
    return cls.__mro__[cls.__mro__.index(PerBlockSizes) + 1]


class PerBlockSizes:
    """Builds the stock model, then gives every block its own sizes."""

    @classmethod
    def is_custom_code(cls):
        """False: the family's own code initialises it, buffers that no file holds among them."""
        return False

    @classmethod
    def _can_set_attn_implementation(cls):
        """As of the family's class: transformers looks for its attention in the class's file."""
        return _family_class(cls)._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls):
        return _family_class(cls)._can_set_experts_implementation()

    def __init__(self, config, *args, **kwargs):
        text = config.get_text_config()
        text.allow_global_per_layer_attribute_access = True
        with one_size(text):
            super().__init__(config, *args, **kwargs)
        with torch.no_grad():
            resize_blocks(self.base_model, text)
        self.post_init()

    def initialize_weights(self):
        with one_size(self.config.get_text_config()):
            super().initialize_weights()


def register_conversions(own, stock, with_head):
    """Where checkpoints of a family have other names or shapes than its modules, so have ours; and
    a class that has the decoder under another name than the LM finds it in its weights."""
    config, stock_config = own.config_class, stock.config_class
    names = (own.__name__, stock.__name__), (config.model_type, stock_config.model_type)
    for mine, theirs in names:
        conversions = get_checkpoint_conversion_mapping(theirs)
        if conversions is not None:
            register_checkpoint_conversion_mapping(mine, conversions, overwrite=True)
    if stock.base_model_prefix not in ("", with_head.base_model_prefix):
        decoder = rf"^{with_head.base_model_prefix}\."
        renaming = WeightRenaming(decoder, f"{stock.base_model_prefix}.")
        known = get_checkpoint_conversion_mapping(own.__name__) or []
        register_checkpoint_conversion_mapping(own.__name__, [renaming, *known], overwrite=True)


def pruned_class(stock):
    """The class with per-block sizes of a class of transformers."""
    return globals().get(PREFIX + stock.__name__) or __getattr__(PREFIX + stock.__name__)


def __getattr__(name):
    """The class of transformers of the same name without the prefix, with per-block sizes."""
    stock = getattr(transformers, name.removeprefix(PREFIX), None)
    if not name.startswith(PREFIX) or not isinstance(stock, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if issubclass(stock, transformers.PreTrainedConfig):
        base, values = PerBlockConfig, {"model_type": MODEL_TYPE_PREFIX + stock.model_type}
    else:
        base, values = PerBlockSizes, {"config_class": pruned_class(stock.config_class)}
    own = globals()[name] = type(name, (base, stock), {**values, "__module__": __name__})
    if issubclass(own, PerBlockSizes):
        family = family_classes(stock.config_class)
        causal_lm = family.get("AutoModelForCausalLM")
        register_conversions(own, stock, family.get("AutoModelForImageTextToText", causal_lm))
        if stock is not family.get("AutoModel", stock):  # heads make their decoder by AutoModel
            decoder = pruned_class(family["AutoModel"])
            transformers.AutoModel.register(own.config_class, decoder, exist_ok=True)
    return own
