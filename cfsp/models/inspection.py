"""What is wrong with a checkpoint, by its config and the headers of its weights: told before a
value is read, where transformers would drop, make up or convert without a word."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedModel

from ..errors import CfspError
from ..io.documents import check_regular, read_json
from ..io.files import format_bytes
from ..io.safetensors import FLOATS, read_index
from ..weights.mapping import sources_of
from ..weights.quantised import QuantisedTensor, plain_tensors
from ..weights.schemes import method_of, refused
from ..weights.sources import Source
from .layouts import PRUNED_PREFIX, unsupported
from .loading import make_skeleton, pick_dtype

MODELOPT_FILE = "hf_quant_config.json"
"""Where ModelOpt says how it quantised, beside or instead of the config."""
QUANTISED_FILES = ("quantize_config.json", "quant_config.json")
"""Where GPTQ and AWQ do."""
QUANTISED_KEYS = ("quantization_config", "compression_config")
"""What a config says it under."""
ADAPTER_FILE = "adapter_config.json"
MAX_JSON_BYTES = 1 << 30
"""The largest vocabularies take a tenth of that."""
PLAIN = "only plain float weights and GGUF files are read: dequantise it first"


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
    """Raise CfspError for the config of anything but a decoder of transformers, or one of text
    beside a vision tower."""
    kind = config.model_type
    try:
        parts = [config, config.get_text_config()]
    except ValueError:  # several of them
        raise unsupported(kind, "it is made of several models") from None
    for part in parts:
        for choice in ("attn_implementation", "experts_implementation"):
            code = getattr(part, f"_{choice}", None)
            if "/" in str(code):
                raise CfspError(f"{name}: {choice} {code!r} of its config is code from the hub")
    if any(part.is_encoder_decoder for part in parts):
        raise unsupported(kind, "an encoder-decoder")
    *_, text = parts
    if text is not config and type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise unsupported(kind, "it is multimodal, and no model of images and text")
    if text is not getattr(config, "text_config", text) or (text is config and config.sub_configs):
        raise unsupported(kind, "it is multimodal, with no text decoder of its own")
    known = kind.startswith(PRUNED_PREFIX) or type(text)().is_heterogeneous
    if text.is_heterogeneous and not known:
        raise unsupported(kind, "its blocks have sizes of their own")


def quantization_of(name: str | Path, config: Any) -> Mapping[str, Any] | None:
    """How a checkpoint is quantised: by its config, that of its text model or, where ``name`` is a
    folder, ModelOpt's file there; None: it is not. Raises CfspError where none of these says."""
    for part in (config, config.get_text_config()):
        for key in QUANTISED_KEYS:
            told = getattr(part, key, None)
            if told is not None:
                return _mapping(name, told.to_dict() if hasattr(told, "to_dict") else told)
    file = Path(name) / MODELOPT_FILE
    return _mapping(name, read_json(file)) if file.is_file() else None


def _mapping(name: str | Path, told: Any) -> Mapping[str, Any]:
    if not isinstance(told, Mapping) or not method_of(told):
        raise refused(str(name), "")
    return told


def check_plain(name: str | Path, config: Any) -> None:
    """Raise CfspError for a quantised model."""
    quantization = quantization_of(name, config)
    if quantization is not None:
        raise CfspError(f"{name} is quantised ({method_of(quantization)}); {PLAIN}")


def check_live(model: PreTrainedModel) -> None:
    """Raise CfspError for a live model whose weights are elsewhere, quantised or in part those of
    adapters."""
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise CfspError(f"{name} of the live model is an adapter's: merge it before pruning")
    if model.get_output_embeddings() is None:
        raise CfspError(f"expected a causal LM with its head, got {type(model).__name__}")
    check_plain(type(model).__name__, model.config)
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


@dataclass(frozen=True)
class Inspected:
    """A checkpoint of which no value was read yet."""

    skeleton: PreTrainedModel
    sources: dict[str, Source]
    """See :func:`cfsp.weights.mapping.sources_of`; {} where no headers are at hand."""
    quantization: Mapping[str, Any] | None
    """As of :func:`quantization_of`."""


def inspect(
    where: Path | str, config: Any, folder: Path | None, dtype: str, *, gguf: bool = False
) -> Inspected:
    """What config and headers say of a checkpoint together; without ``folder``, the config alone.
    Raises CfspError for whatever is wrong with them."""
    check_config(where, config)
    quantization = quantization_of(where, config)
    weights = plain_tensors(where, quantization, read_index(folder) if folder else {})
    plain = config
    if quantization is not None:
        plain = _dequantised(config)
        if weights and not any(isinstance(x, QuantisedTensor) for x in weights.values()):
            raise CfspError(
                f"{where} has plain weights, and says that it is quantised "
                f"({method_of(quantization)}): take that out of its config"
            )
    skeleton = make_skeleton(plain, pick_dtype(dtype, config, weights, gguf=gguf))
    return Inspected(skeleton, sources_of(where, skeleton, weights), quantization)


def _dequantised(config: Any) -> Any:
    """The config of the same model in plain floats."""
    plain = copy.deepcopy(config)
    for part in (plain, plain.get_text_config()):
        for key in QUANTISED_KEYS:
            if hasattr(part, key):
                delattr(part, key)
    return plain
