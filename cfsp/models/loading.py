"""What transformers loads of a model: config, tokenizer, weights, or a skeleton without values."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from ..errors import CfspError, first_of, reason, shown
from ..io.safetensors import FLOATS, INDEX_FILE, WEIGHTS_FILE, Tensors
from .layouts import unsupported
from .surgery import set_buffers_

MAX_LAYERS = 2_000
DEVICE = "cfsp_device"
"""Attribute of a skeleton: the GPU that it computes on, with weights on the host meanwhile."""


def pick_device(device: str) -> torch.device:
    """The device of a name; "auto" is the first GPU where there is one. Raises CfspError for one
    that is not here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise CfspError(f"device {device!r}: {str(error).splitlines()[0]}") from None
    if chosen.type == "meta":
        raise CfspError("device 'meta' computes nothing")
    return chosen


def pick_dtype(dtype: str, config: Any, stored: Tensors, *, gguf: bool = False) -> torch.dtype:
    """The dtype that transformers loads with: as asked; fp32 from GGUF; as the config says; as
    stored, or fp32 where nothing is. Raises CfspError for one that nothing is computed in."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if gguf:
        return torch.float32
    floats = (info.dtype for info in stored.values() if info.dtype.is_floating_point)
    found = config.dtype if isinstance(config.dtype, torch.dtype) else next(floats, torch.float32)
    if found not in FLOATS:
        name = str(found).removeprefix("torch.")
        raise CfspError(f"the model is in {name}: `dtype='float32'` takes it in another type")
    return found


def cache_argument(model: nn.Module) -> str:
    """What a model's forward call takes a cache as, and its output has it as."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"  # the name before transformers 5.24


def check_seqlen(model: PreTrainedModel, seqlen: int) -> None:
    """Raise CfspError where a window is longer than the model has positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and seqlen > limit:
        raise CfspError(f"seqlen {seqlen} is beyond the model's {limit} positions")


def model_device(model: nn.Module) -> torch.device:
    """Where a model computes; of a skeleton too."""
    waiting = getattr(model, DEVICE, None)
    return waiting or model.get_input_embeddings().weight.device  # type: ignore[operator]


@contextmanager
def outer_weights(model: nn.Module) -> Iterator[None]:
    """Have the weights outside of the blocks on the model's device: those of a skeleton on a GPU
    wait on the host until windows are embedded or logits read."""
    device = getattr(model, DEVICE, None)
    waiting = [p for p in model.parameters() if p.device.type == "cpu"] if device else []
    values = [parameter.data for parameter in waiting]
    try:
        for parameter in waiting:
            parameter.data = parameter.data.to(device)
        yield
    finally:
        for parameter, value in zip(waiting, values, strict=True):
            parameter.data = value


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def load_part(name: str, kind: Any, **options: Any) -> Any:
    """``from_pretrained`` with every failure in one line: what reads the files, tokenizers and
    pickles among them, raises of many kinds. No code beside the files is run."""
    if kind is not GenerationConfig:
        options["trust_remote_code"] = False
    try:
        return kind.from_pretrained(name, **options)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise CfspError(
                f"{name} needs code of its own, which is never run: only architectures of "
                "transformers itself are read"
            ) from None
        why = f"{type(error).__name__}: {reason(error)}"
        raise CfspError(f"cannot load {name}: {why}") from error


def hub_folder(model: str | Path, patterns: list[str]) -> Path:
    """The local snapshot of a hub id, with files of these names; what the cache has where there is
    no network. Raises CfspError at once for a name that is neither a folder nor on the hub."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except RepositoryNotFoundError:
        why = "no such model, or none that you may read"
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "it cannot be reached"
    except HFValidationError:
        why = "its models are called OWNER/NAME"
    except OSError as error:
        why = reason(error)
    raise CfspError(f"no folder {model} here, and cannot load it from the hub: {why}")


def pretrained(model: str | Path) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` takes for a hub id, folder, config file or GGUF file."""
    path = Path(model)
    if path.suffix == ".gguf" and not path.is_dir():
        return str(path.parent), {"gguf_file": path.name}
    return str(model), {}


def folder_name(folder: Path) -> str:
    """What a folder is called, by the link that it was given as too; "." and ".." have no name."""
    return folder.name if folder.name not in ("", "..") else folder.resolve().name


def check_has_config(folder: str | Path) -> None:
    """Raise CfspError for a folder without a config."""
    if not (Path(folder) / "config.json").is_file():
        raise CfspError(f"{folder} is not a model folder: no config.json")


def load_config(model: str | Path) -> Any:
    """The config of a hub id, folder, config file or GGUF file."""
    (name, options), path = pretrained(model), Path(model)
    if options and find_spec("gguf") is None:
        raise CfspError("reading GGUF needs the package 'gguf': pip install gguf")
    if path.is_dir():
        check_has_config(path)
    elif not options and not path.exists():
        name = str(hub_folder(model, ["config.json"]))
    return load_part(name, AutoConfig, **options)


def auto_class(config: Any) -> Any:
    """The Auto class of a model: where its config has one of text beside others, the class that
    has those parts too, whatever text-only class the family may have."""
    text_only = config.get_text_config() is config
    return AutoModelForCausalLM if text_only else AutoModelForImageTextToText


def load_weights(name: str, config: Any, **options: Any) -> PreTrainedModel:
    """A model with every tensor read: transformers would make up those that are missing."""
    model, info = load_part(name, auto_class(config), output_loading_info=True, **options)
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if found := sorted(str(key) for key in info[kind]):
            what = kind.replace("_", " ")
            raise CfspError(f"{name}: {what} in the weights: {first_of(found)}")
    return model


def check_folder(folder: Path) -> None:
    """Find a folder that cannot be loaded before any work is done; name the file at fault."""
    if not folder.is_dir():
        raise CfspError(f"{folder} is not a folder; a model is a folder, a .gguf file or a hub id")
    check_has_config(folder)
    if not ((folder / WEIGHTS_FILE).exists() or (folder / INDEX_FILE).exists()):
        hint = ""
        if pickled := sorted(folder.glob("*.bin")):
            how = "load it with transformers, then save_pretrained"
            hint = f", only {pickled[0].name}: convert it to safetensors first ({how})"
        raise CfspError(f"{folder} has no safetensors weights, {WEIGHTS_FILE} or its index{hint}")


def make_skeleton(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters on meta; buffers are real, since no file holds the rotary ones, and
    of the values that ``from_pretrained`` gives them. Raises CfspError for a config that no causal
    LM can be built of."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise CfspError(f"num_hidden_layers {shown(layers)} is more than any model has")
    try:
        with torch.device("meta"), no_init_weights():
            model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
        buffers = model.named_buffers(remove_duplicate=False)
        set_buffers_(model, {k: torch.zeros_like(b, device="cpu") for k, b in buffers})
        model.initialize_weights()  # on meta it costs nothing
        model.tie_weights()  # left out with the values
        _keep_in_fp32_(model, dtype)
    except Exception as error:  # of whatever kind a family's own code raises
        raise unsupported(config.model_type, f"no causal LM of it: {reason(error)}") from error
    return model.eval()


def _keep_in_fp32_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give what a family keeps in fp32 that type, as ``from_pretrained`` does."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    kept, *_ = build_glob_alternation(list(plan))
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if kept.search(name) and value.is_floating_point():
            path, _, leaf = name.rpartition(".")
            new = value.to(torch.float32)
            if isinstance(value, nn.Parameter):
                new = nn.Parameter(new, requires_grad=False)
            setattr(model.get_submodule(path), leaf, new)


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
