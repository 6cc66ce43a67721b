"""The tensors of a quantised checkpoint as those that were quantised: same names, same shapes.

Whatever reads weights asks :func:`plain_tensors` what there is, reads the parts of a
:class:`QuantisedTensor` as they are stored, and has them decoded where they are wanted.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CfspError, named
from ..io.safetensors import StoredTensor, TensorInfo, read_tensors
from .layouts import kind_of
from .schemes import Scheme, scheme_of

UNUSED = re.compile(
    r"(^|[._])(input|activation|output)_(scale(_ub)?|zero_point|global_scale)$"
    r"|(^|\.)([qkv]|kv)_(scale|zero_point)$|[kv]_proj\.[kv]_bias$"
)
"""Scales of activations and of the KV cache, which weights have nothing to do with."""
ACCEPTED = (torch.int64, torch.bool)
"""What else than floats of 2 bytes or more a buffer is stored in."""
OF_WEIGHT = re.compile(r"(^|[._])(weight|proj|pre_quant)$")
"""The end of a name whose scales can belong to nothing else."""


@dataclass(frozen=True)
class QuantisedTensor(TensorInfo):
    """A weight that is stored as codes and scales; dtype and shape are those it is decoded to."""

    parts: dict[str, StoredTensor]
    """Role ("values", "scales", ...) -> what is stored."""
    decode: Callable[[Mapping[str, torch.Tensor], torch.dtype], torch.Tensor]
    """(the parts as read, on any device; wanted dtype) -> the weight, contiguous; computed in fp32,
    rounded once. Raises CfspError for scales that are no numbers of 0 or more."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of the parts."""
        return sum(part.nbytes for part in self.parts.values())


def plain_tensors(
    where: str | Path,
    quantization: Mapping[str, Any] | None,
    tensors: Mapping[str, StoredTensor],
) -> dict[str, StoredTensor | QuantisedTensor]:
    """The weights of a checkpoint under the names that they had before it was quantised, in the
    order stored.

    Args:
        where: what an error calls the checkpoint.
        quantization: ``quantization_config`` or ``compression_config`` of its config, or what
            ModelOpt's hf_quant_config.json says; None: nothing is quantised.
        tensors: all that is stored, by name.

    Raises:
        CfspError: for a method or format that is not read, and for tensors that it does not
            explain: codes without scales, scales without codes, shapes that do not fit.
    """
    if quantization is None:
        return dict(tensors)
    place, scheme = str(where), scheme_of(str(where), quantization)
    groups = _grouped(place, scheme, tensors)
    stated = [roles["shape"] for roles in groups.values() if {"values", "shape"} <= roles.keys()]
    shapes = _stated_shapes(place, {name: tensors[name] for name in stated})
    plain: dict[str, StoredTensor | QuantisedTensor] = {}
    for name, roles in groups.items():
        parts = {role: tensors[stored] for role, stored in roles.items()}
        if "values" in parts and _is_coded(parts["values"]):
            known: dict[str, TensorInfo] = {**parts}
            if "shape" in roles:
                known["shape"] = shapes[roles["shape"]]
                del parts["shape"]
            decoding = scheme.layout(name)(f"{place}: {named(name)}", known)
            plain[name] = QuantisedTensor(torch.bfloat16, decoding.result, parts, decoding)
        else:
            _check_plain(place, scheme, name, roles, parts)
            plain |= {roles[role]: part for role, part in parts.items()}
    return plain


def _grouped(
    where: str, scheme: Scheme, tensors: Mapping[str, StoredTensor]
) -> dict[str, dict[str, str]]:
    """Name of a weight -> role -> the stored name that has it; what has none is "plain"."""
    groups: dict[str, dict[str, str]] = {}
    suffixes = sorted(scheme.roles, key=len, reverse=True)
    for stored in tensors:
        if UNUSED.search(stored):
            continue
        suffix = next((end for end in suffixes if stored.endswith(end)), "")
        roles = groups.setdefault(stored[: len(stored) - len(suffix)], {})
        role = scheme.roles.get(suffix, "plain")
        if role in roles:
            raise CfspError(f"{where}: {named(roles[role])} and {named(stored)} are one weight")
        roles[role] = stored
    return groups


def _stated_shapes(where: str, tensors: Mapping[str, StoredTensor]) -> dict[str, TensorInfo]:
    """Name of a ``weight_shape`` -> the shape that it holds: rows are padded in what is packed."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.int32, torch.int64) or tensor.shape != (2,):
            raise CfspError(f"{where}: {named(name)} must be two whole numbers")
    return {
        name: TensorInfo(torch.bfloat16, tuple(values.tolist()))
        for name, values in read_tensors(tensors).items()
    }


def _is_coded(tensor: StoredTensor) -> bool:
    plain = tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
    return not plain and tensor.dtype not in ACCEPTED


def _check_plain(
    where: str,
    scheme: Scheme,
    name: str,
    roles: Mapping[str, str],
    parts: Mapping[str, StoredTensor],
) -> None:
    """Raise CfspError for scales without codes, and for codes that the scheme does not know."""
    for role, part in parts.items():
        stored = f"{where}: {named(roles[role])}"
        if _is_coded(part):
            raise CfspError(
                f"{stored} is stored as {kind_of(part)}, which {scheme.method} does not explain"
            )
        if role not in ("values", "plain") and OF_WEIGHT.search(name):
            kind = kind_of(parts["values"]) if "values" in parts else ""
            lacks = f"{named(name)}, which is stored as {kind}" if kind else "no weight"
            raise CfspError(f"{stored} belongs to {lacks}")
