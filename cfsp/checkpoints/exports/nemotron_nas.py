"""``nemotron-nas``: the DeciLM format, which vLLM runs natively with a width per block, and blocks
without attention or FFN.

The weights are those of the pruned model; config.json and a small config class are new. vLLM
honours an exact ``intermediate_size`` where ``ffn_mult`` is absent. SGLang and TensorRT-LLM read
``ffn_mult`` alone and round the width up to 256: it is written where all widths are multiples.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import CfspError
from ...models.modeling_cfsp import NoAttention, NoFFN
from ..folder import write_companions
from . import configuration_decilm
from .padded import add_zero_biases_
from .source import Details, ExportOptions, ExportSource, check_family, write_changed_weights

FFN_MULT_STEP = 256
CONFIG_FILE = Path(configuration_decilm.__file__)
CARRIED = (
    "vocab_size",
    "hidden_size",
    "hidden_act",
    "num_hidden_layers",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Values of the model's config that mean the same here."""
CHECKED = ("num_attention_heads", "max_position_embeddings", "mlp_bias", "block_configs")
NORMS = (
    ("input_layernorm", "self_attn", NoAttention),
    ("post_attention_layernorm", "mlp", NoFFN),
)
"""The norm before a part, the part, and what is there if it is gone."""


def check(source: ExportSource, options: ExportOptions) -> None:
    """Raise CfspError for an architecture that DeciLM does not compute."""
    check_family(source, ("llama", "mistral"), "nemotron-nas", "vllm serve runs the folder itself")
    if source.config.hidden_act != "silu":
        raise CfspError(f"nemotron-nas computes silu, not {source.config.hidden_act!r}")
    heads = sorted({query for query, _ in source.heads if query})
    if len(heads) > 1:
        raise CfspError(
            f"nemotron-nas has as many query heads in every block, not {heads[0]} to {heads[-1]}; "
            f"{source.runs}"
        )
    if source.config.hidden_size % heads[-1]:
        raise CfspError(
            f"nemotron-nas has no {heads[-1]} query heads, by which the hidden size "
            f"{source.config.hidden_size} cannot be divided; {source.runs}"
        )
    if not source.heads[0][0]:
        raise CfspError(f"nemotron-nas has no block 0 without attention; {source.runs}")
    if any(path.startswith("self_attn.") for path in source.added_bias):
        raise CfspError(f"nemotron-nas has no bias on o_proj alone; {source.runs}")


def write(source: ExportSource, options: ExportOptions, folder: Path, progress: bool) -> Details:
    """Write a folder. Details: ``ffn_mult``, whether SGLang and TensorRT-LLM read the widths."""
    values = decilm_config(source)
    write_changed_weights(source, folder, partial(as_decilm_, source=source), progress)
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    shutil.copyfile(CONFIG_FILE, folder / CONFIG_FILE.name)
    write_companions(source.opened, folder)
    loaded = configuration_decilm.DeciLMConfig.from_pretrained(str(folder)).to_dict()
    for name in (*CARRIED, *CHECKED):
        if loaded[name] != values[name]:
            raise RuntimeError(f"config.json loads with {name} {loaded[name]}, not {values[name]}")
    return {"ffn_mult": any("ffn_mult" in block["ffn"] for block in values["block_configs"])}


def as_decilm_(block: nn.Module, source: ExportSource) -> None:
    """Change a block in place: biases of zero beside an added one, no norm before what is gone."""
    add_zero_biases_(block, source)
    for norm, part, none in NORMS:
        if isinstance(block.get_submodule(part), none):
            block.get_submodule(norm).register_parameter("weight", None)


def decilm_config(source: ExportSource) -> dict[str, Any]:
    config, rope = source.config, source.config.rope_parameters
    exact = all(width % FFN_MULT_STEP == 0 for width in source.widths)
    query, keys = max(source.heads)
    return {
        **{name: getattr(config, name) for name in CARRIED},
        # Where transformers before 5 looks; it would take its defaults for the rope_parameters.
        "rope_theta": rope["rope_theta"],
        **({"rope_scaling": rope} if rope["rope_type"] != "default" else {}),
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{CONFIG_FILE.stem}.DeciLMConfig"},
        "dtype": str(source.opened.model.dtype).removeprefix("torch."),
        "max_position_embeddings": source.context,
        "num_attention_heads": query,
        "num_key_value_heads": keys,
        "intermediate_size": max(source.widths),
        "attention_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False) or bool(source.added_bias),
        "block_configs": [
            block_config(own, width, config.hidden_size, exact)
            for own, width in zip(source.heads, source.widths, strict=True)
        ],
    }


def block_config(
    heads: tuple[int, int], width: int, hidden_size: int, ffn_mult: bool
) -> dict[str, Any]:
    query, keys = heads
    mult = {"ffn_mult": 3 * width / (2 * hidden_size)} if ffn_mult and width else {}
    return {
        "attention": {"n_heads_in_group": query // keys if query else None, **kind_of(query)},
        "ffn": {"intermediate_size": width or None, **mult, **kind_of(width)},
    }


def kind_of(size: int) -> dict[str, bool]:
    """What a part of this size is; 0: none."""
    return {"no_op": not size, "replace_with_linear": False}
