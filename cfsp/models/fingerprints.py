"""What made a result: versions, and fingerprints of models and tokens."""

import hashlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from ..weights.sources import Source
from .layouts import Layout

PACKAGES = ("cfsp", "torch", "triton", "transformers", "safetensors", "datasets")
SAMPLED_VALUES = 256


def versions(
    device: torch.device | str = "cpu", packages: Sequence[str] = PACKAGES
) -> dict[str, str]:
    """Versions of what computed a result, and the device it ran on."""
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    device = torch.device(device)
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    else:
        found["device"] = f"{device.type} ({platform.machine()})"
    return found


def device_name(device: torch.device) -> str:
    """What a device is called; of a CPU the threads that compute on it too."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        name = "CPU"
    return f"{name}, {torch.get_num_threads()} threads"


def samples_fingerprint(samples: Iterable[tuple[str, tuple[int, ...], torch.Tensor]]) -> str:
    """SHA-256 over names, shapes and first values, rounded to bfloat16: a checkpoint has the same
    fingerprint whether it is loaded in its own precision or in bfloat16."""
    digest = hashlib.sha256()
    for name, shape, values in samples:
        digest.update(f"{name} {tuple(shape)}".encode())
        digest.update(values.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def tokens_fingerprint(windows: torch.Tensor) -> str:
    """SHA-256 of token windows [N, S], as 64 hexadecimal digits."""
    digest = hashlib.sha256(f"{tuple(windows.shape)}".encode())
    digest.update(windows.to(torch.int64).contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def model_fingerprint(
    model: nn.Module, layout: Layout, sources: Mapping[str, Source] | None = None
) -> str:
    """Identifies a model by the shapes and a sample of the values of its FFN matrices, those of a
    skeleton from its ``sources``."""

    def sample(number: int, name: str, weight: torch.Tensor) -> torch.Tensor:
        if sources is None:
            return weight.detach()[0].flatten()[:SAMPLED_VALUES]
        name = layout.prefix(number) + name
        return sources[name].first_values(name, SAMPLED_VALUES)

    return samples_fingerprint(
        (f"{number}.{name}", tuple(weight.shape), sample(number, name, weight))
        for number, block in enumerate(layout.find_blocks(model))
        for ffn in layout.block_ffns(block)
        for name in ffn.weight_names
        for weight in [block.get_parameter(name)]
    )


def block_kind(block: nn.Module) -> str:
    """Tells blocks that take different times apart, by shapes and by plain values of modules such
    as the attention's window."""
    shapes = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
    settings = {
        f"{path}.{name}": value
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float | str)
        and name[:1] != "_"
        and name not in ("training", "layer_idx", "layer_id")
    }
    values = (type(block).__name__, sorted(shapes.items()), sorted(settings.items()))
    return hashlib.sha256(repr(values).encode()).hexdigest()
