"""What is wrong with a checkpoint, by its config and the headers of its weights: told before a
value is read, where transformers would drop, make up or convert without a word."""

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ..errors import CfspError, first_of
from ..io.documents import check_regular
from ..io.files import format_bytes
from ..io.safetensors import FLOATS, StoredTensor
from .layouts import PRUNED_PREFIX, unsupported

QUANTISED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Where ModelOpt, GPTQ and AWQ say how they quantised, beside or instead of the config."""
ADAPTER_FILE = "adapter_config.json"
MAX_JSON_BYTES = 1 << 30
"""The largest vocabularies take a tenth of that."""
PLAIN = "only plain float weights and GGUF files are read: dequantise it first"
REMADE = re.compile(r"\b(inv_freq|position_ids|(attn|attention)\.(masked_)?bias)$")
"""Buffers that older checkpoints hold and every model makes itself."""


def check_folder_files(folder: Path) -> None:
    """Raise CfspError for a folder with a pipe or device, a huge document, quantised weights or an
    adapter, by its files."""
    for file in sorted(folder.iterdir()):
        if file.exists() and not file.is_dir():
            check_regular(file)
        if file.suffix == ".json" and file.is_file() and file.stat().st_size > MAX_JSON_BYTES:
            raise CfspError(f"{file} has more than {format_bytes(MAX_JSON_BYTES)}")
    for name in QUANTISED_FILES:
        if (folder / name).exists():
            raise CfspError(f"{folder} is quantised, it has {name}; {PLAIN}")
    if (folder / ADAPTER_FILE).exists():
        raise CfspError(
            f"{folder} has an adapter, {ADAPTER_FILE}: merge it into its model first (peft's "
            "merge_and_unload, then save_pretrained)"
        )


def check_config(name: str | Path, config: Any) -> None:
    """Raise CfspError for the config of anything but a plain decoder of transformers."""
    kind = config.model_type
    try:
        parts = [config, config.get_text_config()]
    except ValueError:  # several of them
        raise unsupported(kind, "it is made of several models") from None
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            quantised = getattr(part, key, None)
            if quantised is not None:
                method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
                raise CfspError(f"{name} is quantised ({method or 'of unknown method'}); {PLAIN}")
        for choice in ("attn_implementation", "experts_implementation"):
            code = getattr(part, f"_{choice}", None)
            if "/" in str(code):
                raise CfspError(f"{name}: {choice} {code!r} of its config is code from the hub")
    if parts[1] is not config or config.sub_configs:
        raise unsupported(
            kind, "it is multimodal, and its text decoder is not pruned apart from the rest"
        )
    if config.is_encoder_decoder:
        raise unsupported(kind, "an encoder-decoder")
    if config.is_heterogeneous and not kind.startswith(PRUNED_PREFIX):
        raise unsupported(kind, "its blocks have sizes of their own")


def check_live(model: PreTrainedModel) -> None:
    """Raise CfspError for a live model whose weights are elsewhere, quantised or in part those of
    adapters."""
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise CfspError(f"{name} of the live model is an adapter's: merge it before pruning")
    if model.get_output_embeddings() is None:
        raise CfspError(f"expected a causal LM with its head, got {type(model).__name__}")
    kept = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    devices = set()
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise CfspError(f"{name} of the live model has no values here, it is on meta")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise CfspError(
                f"{name} of the live model has no values here, it is offloaded or on meta"
            )
        kind = str(parameter.dtype).removeprefix("torch.")
        if parameter.dtype not in FLOATS:
            raise CfspError(f"{name} of the live model is {kind}: only fp32, bf16 and fp16 are cut")
        if parameter.dtype != model.dtype and not any(part in name for part in kept):
            raise CfspError(f"{name} of the live model is {kind}, others are not: use one dtype")
        devices.add(parameter.device)
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise CfspError(f"the live model is on several devices ({names}): move it to one")


def placed(
    folder: Path, skeleton: PreTrainedModel, tensors: Mapping[str, StoredTensor]
) -> dict[str, list[str]]:
    """Parameter or buffer of a model -> the stored tensors that transformers makes it of.

    Raises CfspError for stored tensors that have no place in the model, and for a parameter stored
    in a type that holds no plain numbers; warns of those that transformers leaves out on purpose.
    """
    mapping = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state, prefix = skeleton.state_dict(), skeleton.base_model_prefix
    found: dict[str, list[str]] = {}
    homeless = []
    for name in sorted(tensors, key=dot_natural_key):
        target, converted = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target = name
        if target in state:
            found.setdefault(target, []).append(name)
            if len(found[target]) > 1 and converted is None:
                twice = " and ".join(found[target])
                raise CfspError(f"{folder}: {twice} of the weights are one parameter")
        else:
            homeless.append(name)
    _check_homeless(folder, skeleton, homeless)
    parameters = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    for name in (name for target in found.keys() & parameters for name in found[target]):
        dtype = tensors[name].dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            kind = str(dtype).removeprefix("torch.")
            raise CfspError(f"{folder} is quantised: {name} is stored as {kind}; {PLAIN}")
    return found


def _check_homeless(folder: Path, skeleton: PreTrainedModel, names: Collection[str]) -> None:
    ignored = skeleton._keys_to_ignore_on_load_unexpected or ()
    left = [name for name in names if not REMADE.search(name)]
    unknown = [name for name in left if not any(re.search(pattern, name) for pattern in ignored)]
    if unknown:
        raise CfspError(
            f"{folder}: its weights and config.json do not belong together: "
            f"{type(skeleton).__name__} has no place for {first_of(unknown)}"
        )
    if left:
        kind = type(skeleton).__name__
        text = f"{first_of(left)} of {folder} is left out of the result: {kind} does not use it"
        warnings.warn(text, stacklevel=2)
