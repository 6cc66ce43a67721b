"""``nemotron-nas``: the DeciLM format, which vLLM runs natively with a width per block.

The weights are those of the pruned model; config.json and a small config class are new. vLLM
honours an exact ``intermediate_size`` where ``ffn_mult`` is absent. SGLang and TensorRT-LLM read
``ffn_mult`` alone and round the width up to 256: it is written where all widths are multiples.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import CfspError
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
    "num_attention_heads",
    "num_key_value_heads",
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


def check(source: ExportSource, options: ExportOptions) -> None:
    """Raise CfspError for an architecture that DeciLM does not compute."""
    check_family(source, ("llama", "mistral"), "nemotron-nas", "vllm serve runs the folder itself")
    if source.config.hidden_act != "silu":
        raise CfspError(f"nemotron-nas computes silu, not {source.config.hidden_act!r}")


def write(source: ExportSource, options: ExportOptions, folder: Path, progress: bool) -> Details:
    """Write a folder. Details: ``ffn_mult``, whether SGLang and TensorRT-LLM read the widths."""
    values = decilm_config(source)
    write_changed_weights(source, folder, partial(add_zero_biases_, source=source), progress)
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    shutil.copyfile(CONFIG_FILE, folder / CONFIG_FILE.name)
    write_companions(source.opened, folder)
    loaded = configuration_decilm.DeciLMConfig.from_pretrained(str(folder)).to_dict()
    for name in (*CARRIED, "max_position_embeddings", "mlp_bias", "block_configs"):
        if loaded[name] != values[name]:
            raise RuntimeError(f"config.json loads with {name} {loaded[name]}, not {values[name]}")
    return {"ffn_mult": "ffn_mult" in values["block_configs"][0]["ffn"]}


def decilm_config(source: ExportSource) -> dict[str, Any]:
    config, rope = source.config, source.config.rope_parameters
    exact = all(width % FFN_MULT_STEP == 0 for width in source.widths)
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
        "intermediate_size": max(source.widths),
        "attention_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False) or source.added_bias,
        "block_configs": [block_config(config, width, exact) for width in source.widths],
    }


def block_config(config: Any, width: int, ffn_mult: bool) -> dict[str, Any]:
    present = {"no_op": False, "replace_with_linear": False}
    group = config.num_attention_heads // config.num_key_value_heads
    mult = {"ffn_mult": 3 * width / (2 * config.hidden_size)} if ffn_mult else {}
    return {
        "attention": {"n_heads_in_group": group, **present},
        "ffn": {"intermediate_size": width, **mult, **present},
    }
