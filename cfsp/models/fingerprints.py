"""What made a result: versions, and fingerprints of models and tokens."""

import hashlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

from ..io.safetensors import StoredTensor, first_values
from .layouts import Layout

PACKAGES = ("cfsp", "torch", "triton", "transformers", "safetensors", "datasets")
SAMPLED_VALUES = 256


def versions(
    device: torch.device | str = "cpu", packages: Sequence[str] = PACKAGES
) -> dict[str, str]:
    """Versions of what computed a result, and the device it ran on."""
    found = {"python": platform.python_version(), **_package_versions(tuple(packages))}
    device = torch.device(device)
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    else:
        found["device"] = f"{device.type} ({platform.machine()})"
    return found


@cache
def _package_versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def samples_fingerprint(samples: Iterable[tuple[str, tuple[int, ...], torch.Tensor]]) -> str:
    """SHA-256 over names, shapes and the first values of tensors, as 64 hexadecimal digits.

    Values are rounded to bfloat16 first, so that one checkpoint has one fingerprint whether it
    is loaded in its own precision or in bfloat16.
    """
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


def model_fingerprint(model: nn.Module, layout: Layout) -> str:
    """Identifies a model by the shapes and a sample of the values of its FFN matrices."""
    return samples_fingerprint(
        (f"{number}.{name}", tuple(tensor.shape), tensor[0].flatten()[:SAMPLED_VALUES])
        for number, block in enumerate(layout.find_blocks(model))
        for name in layout.weight_names(block)
        for tensor in [block.get_parameter(name).detach()]
    )


def stored_fingerprint(
    model: nn.Module, layout: Layout, tensors: Mapping[str, StoredTensor], dtype: torch.dtype
) -> str:
    """:func:`model_fingerprint` of a skeleton whose values, on disk, are read as ``dtype``."""
    return samples_fingerprint(
        (f"{number}.{name}", stored.shape, first_values(stored, SAMPLED_VALUES).to(dtype))
        for number, block in enumerate(layout.find_blocks(model))
        for name in layout.weight_names(block)
        for stored in [tensors[layout.prefix(number) + name]]
    )


def checkpoint_fingerprint(tensors: Mapping[str, StoredTensor]) -> str:
    """Identifies tensors on disk by every one's name, shape and first values."""
    return samples_fingerprint(
        (name, stored.shape, first_values(stored, SAMPLED_VALUES).float())
        for name, stored in sorted(tensors.items())
    )
