"""Open a model by hub id, folder or GGUF file, and check that it can be pruned."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from ..errors import CfspError
from ..io.shards import read_header
from .blocks import Blocks, LiveBlocks
from .detection import detect_layout
from .layouts import Layout, known_layout, unsupported
from .registration import register_pruned


@dataclass(frozen=True)
class OpenModel:
    """A model with its tokenizer, in memory whole or one block at a time."""

    model: PreTrainedModel
    tokenizer: Any
    layout: Layout
    name: str
    """What the user called it: hub id, folder or file name; for a live module, its config's."""
    blocks: Blocks
    """Where the weights of its blocks are."""


def pick_device(device: str) -> torch.device:
    """The device of a name; "auto" is the first GPU where there is one.

    Raises:
        CfspError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise CfspError(f"device {device!r}: {str(error).splitlines()[0]}") from None
    return chosen


def check_seqlen(model: PreTrainedModel, seqlen: int) -> None:
    """Raise CfspError where a window is longer than the model has positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and seqlen > limit:
        raise CfspError(f"seqlen {seqlen} is beyond the model's {limit} positions")


def model_device(model: PreTrainedModel) -> torch.device:
    """Where a model computes; of a skeleton too."""
    return model.get_input_embeddings().weight.device


def model_layout(model: nn.Module) -> Layout:
    """The layout of a live model.

    Raises:
        CfspError: not a transformers model, or an unsupported architecture.
    """
    if not isinstance(model, PreTrainedModel):
        raise CfspError(f"expected a transformers causal LM, got {type(model).__name__}")
    return known_layout(model.config.model_type) or detect_layout(model)


def adopt(model: nn.Module, tokenizer: Any) -> OpenModel:
    """A live module as an OpenModel."""
    layout = model_layout(model)
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return OpenModel(model, tokenizer, layout, _short(name), LiveBlocks(model, layout))


def open_model(model: str | Path, dtype: str = "auto", device: str = "auto") -> OpenModel:
    """Load a model with its tokenizer onto a device, in eval mode.

    Args:
        model: hub id, local folder, or path of a .gguf file.
        dtype: "auto" (as stored; fp32 for GGUF), "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", "cuda:1".

    Raises:
        CfspError: not found, no weights, corrupt weights, unsupported architecture.
    """
    where = pick_device(device)
    path = Path(model)
    if path.suffix == ".gguf":
        return _open_gguf(path, dtype, where)
    if path.exists():
        check_folder(path)
    elif path.is_absolute() or str(model).startswith(".") or str(model).count("/") > 1:
        raise CfspError(f"no such model folder: {model}")
    name = str(model)
    config = load_config(name)
    layout = find_layout(config)
    loaded = _load_weights(name, dtype=_dtype(dtype))
    tokenizer = load_part(name, AutoTokenizer)
    loaded = loaded.to(where).eval()
    short = path.name if path.exists() else name
    return OpenModel(loaded, tokenizer, layout, short, LiveBlocks(loaded, layout))


def _short(name: str) -> str:
    """The last part of a local folder, which says nothing elsewhere; a hub id as it is."""
    return Path(name).resolve().name if Path(name).exists() else name


def _dtype(dtype: str) -> Any:
    return dtype if dtype == "auto" else getattr(torch, dtype)


def load_part(name: str, kind: Any, **options: Any) -> Any:
    """``from_pretrained`` with the failures a user can mend in one line."""
    try:
        return kind.from_pretrained(name, **options)
    except SafetensorError as error:
        raise CfspError(f"{name}: corrupt safetensors: {error}") from None
    except (OSError, ValueError, KeyError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CfspError(f"cannot load {name}: {reason}") from error


def load_config(name: str) -> Any:
    """The config of a hub id or folder; a pruned family that is not registered yet becomes so."""
    values = load_part(name, _ConfigValues)
    register_pruned(values.get("model_type"))
    return load_part(name, AutoConfig)


class _ConfigValues:
    """config.json as it is, for :func:`load_part`."""

    @staticmethod
    def from_pretrained(name: str) -> dict[str, Any]:
        return PreTrainedConfig.get_config_dict(name)[0]


def find_layout(config: Any) -> Layout:
    """The layout of an architecture: the one written down, or what a skeleton of it shows.

    Raises:
        CfspError: an architecture that is not supported; says why.
    """
    layout = known_layout(config.model_type)
    if layout is not None:
        return layout
    try:
        with quiet_loading():
            skeleton = make_skeleton(config, torch.float32)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise unsupported(config.model_type, f"no causal LM of it: {reason}") from error
    return detect_layout(skeleton)


def _load_weights(name: str, **options: Any) -> PreTrainedModel:
    """A causal LM with every tensor read: transformers would make up those that are missing."""
    model, info = load_part(name, AutoModelForCausalLM, output_loading_info=True, **options)
    for kind in ("missing_keys", "mismatched_keys"):
        if found := sorted(str(key) for key in info[kind]):
            raise CfspError(
                f"{name}: {kind.replace('_', ' ')} in the weights: {', '.join(found[:3])}"
                + (f" and {len(found) - 3} more" if len(found) > 3 else "")
            )
    return model


def check_folder(folder: Path) -> None:
    """Find a folder that cannot be loaded before any work is done; name the file at fault."""
    if not folder.is_dir():
        raise CfspError(f"{folder} is not a folder; a model is a folder, a .gguf file or a hub id")
    if not (folder / "config.json").is_file():
        raise CfspError(f"{folder} is not a model folder: no config.json")
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickled = sorted(folder.glob("*.bin"))
        hint = ""
        if pickled:
            how = "load it with transformers, then save_pretrained"
            hint = f", only {pickled[0].name}: convert it to safetensors first ({how})"
        raise CfspError(f"{folder} has no safetensors weights{hint}")
    for shard in shards:
        read_header(shard)


def require_gguf() -> None:
    """Raise CfspError where the package that reads GGUF files is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise CfspError("reading GGUF needs the package 'gguf': pip install gguf") from None


def _open_gguf(path: Path, dtype: str, device: torch.device) -> OpenModel:
    """A GGUF file, dequantised and rebuilt as an ordinary model that can be saved."""
    if not path.is_file():
        raise CfspError(f"no such file: {path}")
    require_gguf()
    folder, name = str(path.parent), path.name
    config = load_part(folder, AutoConfig, gguf_file=name)
    layout = find_layout(config)
    precision = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    loaded = _load_weights(folder, gguf_file=name, dtype=precision)
    tokenizer = load_part(folder, AutoTokenizer, gguf_file=name)
    rebuilt = _as_ordinary_model(loaded).to(device).eval()
    return OpenModel(rebuilt, tokenizer, layout, path.stem, LiveBlocks(rebuilt, layout))


def _as_ordinary_model(loaded: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that knows nothing of GGUF, and so lets itself be saved."""
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = make_skeleton(config, loaded.dtype)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model


def make_skeleton(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters on meta; buffers are real, since no file holds the rotary ones."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # left out with the values
    return model.eval()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' progress bars and warnings while a model is loaded for a check."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model; tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
