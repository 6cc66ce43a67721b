"""How a checkpoint was quantised, by its config: which stored tensors make a weight, and how.

Each format by its public documentation:

* ``fp8``: the README of DeepSeek-V3's weights, transformers' ``finegrained_fp8`` and vLLM's ``fp8``
* ``fbgemm_fp8`` and ``mxfp4``: transformers' integrations of these names
* ``compressed-tensors``: the package's ``compressors`` and ``quantization`` (0.12)
* ``modelopt``: ``modelopt.torch.export`` of TensorRT Model Optimizer, and vLLM's ``modelopt``
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..errors import CfspError, named, shown
from ..typed import Count, decode
from .dequantise import Decoding
from .layouts import Parts, float8, integers, mxfp4, nvfp4, packed

BLOCK = (128, 128)
"""Rows and columns of a block of FP8, where a config does not say."""
Layout = Callable[[str, Parts], Decoding]
"""(what an error calls the weight, its parts) -> how they are decoded; CfspError where they do not
fit together."""


@dataclass(frozen=True)
class Scheme:
    """What one quantised checkpoint stores."""

    method: str
    """In the words of an error: "fp8", "compressed-tensors, pack-quantized"."""
    roles: Mapping[str, str]
    """What a stored name adds to that of its weight, "" for nothing -> the role of that part."""
    layout: Callable[[str], Layout]
    """Name of a weight -> its layout."""


def scheme_of(where: str, quantization: Mapping[str, Any]) -> Scheme:
    """The scheme that a ``quantization_config`` tells of; CfspError for one that is not read."""
    method = method_of(quantization)
    if method not in SCHEMES:
        raise refused(where, method)
    return SCHEMES[method](where, quantization)


def method_of(quantization: Mapping[str, Any]) -> str:
    """The name of a quantisation method; the oldest of compressed-tensors and the files of ModelOpt
    do not say theirs; "" where nothing does."""
    method = quantization.get("quant_method")
    if isinstance(method, str):
        return str(getattr(method, "value", method))  # transformers has an Enum of them
    if "config_groups" in quantization or "sparsity_config" in quantization:
        return "compressed-tensors"
    inner = quantization.get("quantization")
    return "modelopt" if isinstance(inner, Mapping) and "quant_algo" in inner else ""


def bits_of(quantization: Mapping[str, Any]) -> int:
    """About how many bits a quantised value takes, by a config alone."""
    method, said = method_of(quantization), str(quantization)
    if method == "compressed-tensors" and (bits := re.search(r"num_bits': (\d+)", said)):
        return int(bits[1])
    return 4 if method == "mxfp4" or "NVFP4" in said else 8


def refused(where: str, method: str) -> CfspError:
    """The error for a method or format that is not read."""
    name = named(method) or "of unknown method"
    known = "only plain float weights, GGUF files and weights in FP8, MXFP4, NVFP4, int8 or int4"
    return CfspError(
        f"{where} is quantised ({name}); {known} of {', '.join(SCHEMES)} are read: dequantise it "
        "first"
    )


def _fp8(where: str, quantization: Mapping[str, Any]) -> Scheme:
    """Blocks, or one scale; vLLM takes a config without ``weight_block_size`` as without blocks,
    transformers as with the usual ones: then the shape of the scales decides."""
    if quantization.get("expert_dtype") not in (None, "fp8"):
        raise refused(where, f"fp8 with experts in {quantization['expert_dtype']}")
    key = "weight_block_size"
    block = decode(tuple[Count, Count] | None, quantization.get(key), where, key)
    blocks = (block,) if key in quantization else (None, BLOCK)
    roles = {"": "values", "_scale_inv": "scales", "_scale": "scales"}
    return Scheme("fp8", roles, lambda _: partial(float8, blocks=blocks))


def _fbgemm_fp8(_: str, __: Mapping[str, Any]) -> Scheme:
    """One scale a row."""
    roles = {"": "values", "_scale": "scales"}
    return Scheme("fbgemm_fp8", roles, lambda _: partial(float8, blocks=(None,)))


def _mxfp4(_: str, __: Mapping[str, Any]) -> Scheme:
    return Scheme("mxfp4", {"_blocks": "values", "_scales": "scales"}, lambda _: mxfp4)


MODELOPT = {
    "FP8": (None,),
    "FP8_PER_CHANNEL_PER_TOKEN": (None,),
    "FP8_PB_WO": (BLOCK,),
    "NVFP4": (None,),
}
"""Algorithm of ModelOpt -> the blocks of its FP8 scales."""


def _modelopt(where: str, quantization: Mapping[str, Any]) -> Scheme:
    """``quantization_config`` and hf_quant_config.json, which has the same one level deeper."""
    inner = decode(dict[str, Any], quantization.get("quantization", quantization), where)
    algorithms = {"": inner}
    if inner.get("quant_algo") == "MIXED_PRECISION":
        algorithms = decode(
            dict[str, dict[str, Any]], inner.get("quantized_layers"), where, "quantized_layers"
        )
    blocks: set[tuple[int, int] | None] = set()
    for layer in algorithms.values():
        algorithm = str(layer.get("quant_algo") or "of unknown algorithm").upper()
        if algorithm not in MODELOPT:
            raise refused(where, f"modelopt, {algorithm}")
        blocks.update(MODELOPT[algorithm])
    group = decode(Count, inner.get("group_size") or 16, where, "group_size")
    one_scale_first = tuple(sorted(blocks, key=lambda block: block is not None))

    def layout(what: str, parts: Parts) -> Decoding:
        if parts["values"].dtype == torch.uint8:
            return nvfp4(what, parts, group=group)
        return float8(what, parts, blocks=one_scale_first)

    suffixes = {"_scale": "scales", "_scale_2": "global"}
    fused = {f"_weight{suffix}": role for suffix, role in suffixes.items()}
    return Scheme("modelopt", {"": "values", **suffixes, **fused}, lambda _: layout)


FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
"""Formats of compressed-tensors that keep numbers under the weight's own name."""


@dataclass(frozen=True)
class _Group:
    """One of ``config_groups``: which modules it is of, and how their weights are stored."""

    targets: tuple[str, ...]
    told: tuple[str, "_Weights"]
    """Format and what ``weights`` says."""
    layout: Layout

    def names(self, module: str) -> bool:
        """Whether it is meant by its name."""
        return any(
            re.match(target[3:], module) if target.startswith("re:") else target == module
            for target in self.targets
        )

    @property
    def of_class(self) -> bool:
        """Whether it means all modules of a class, such as Linear."""
        return any(target[:1].isupper() for target in self.targets)


def _compressed_tensors(where: str, quantization: Mapping[str, Any]) -> Scheme:
    key = "quantization_config"
    nested = decode(dict[str, Any] | None, quantization.get(key), where, key)
    inner = {**quantization, **(nested or {})}
    for key in ("sparsity_config", "transform_config"):
        extra = decode(dict[str, Any] | None, inner.get(key), where, key) or {}
        if extra.get("format", "dense") != "dense" or extra.get("config_groups"):
            raise refused(where, f"compressed-tensors with {key}")
    stated = decode(
        dict[str, dict[str, Any]], inner.get("config_groups", {}), where, "config_groups"
    )
    groups = [
        _group(where, f"config_groups.{name}", {"format": inner.get("format"), **_set(group)})
        for name, group in stated.items()
        if group.get("weights") is not None
    ]
    roles = {"": "values", "_packed": "values", "_scale": "scales", "_global_scale": "global"}
    roles |= {"_zero_point": "zeros", "_shape": "shape", "_g_idx": "g_idx"}
    return Scheme("compressed-tensors", roles, partial(_layout_of, where, groups))


def _set(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if value is not None}


def _layout_of(where: str, groups: list[_Group], name: str) -> Layout:
    """Of the group that names the module, else of those for modules of a class: these must agree,
    since a checkpoint does not say of what class a module is."""
    module = name.removesuffix(".weight")
    found = [group for group in groups if group.names(module)]
    found = found or [group for group in groups if group.of_class]
    if not found or any(group.told != found[0].told for group in found):
        raise CfspError(f"{where}: config_groups does not say how {named(name)} is quantised")
    return found[0].layout


@dataclass(frozen=True)
class _Weights:
    """What ``weights`` of a group says; the rest of it is about how the scales were found."""

    num_bits: Count
    type: str
    symmetric: bool
    strategy: str
    group_size: int | None
    block_structure: tuple[Count, Count] | None


def _group(where: str, at: str, group: Mapping[str, Any]) -> _Group:
    told = decode(dict[str, Any], group["weights"], where, f"{at}.weights")
    if told.get("actorder") in (True, "group"):
        raise refused(where, "compressed-tensors with columns in the order of activations")
    size = decode(int | None, told.get("group_size"), where, f"{at}.weights.group_size")
    strategy = told.get("strategy") or ("group" if size is not None and size > 0 else "tensor")
    kept = {key: told.get(key) for key in ("num_bits", "type", "block_structure")}
    symmetric = told.get("symmetric", True)
    weights = decode(
        _Weights,
        {**kept, "group_size": size, "strategy": strategy, "symmetric": symmetric},
        where,
        f"{at}.weights",
    )
    targets = decode(tuple[str, ...], group.get("targets", ()), where, f"{at}.targets")
    for target in targets:
        _check_pattern(where, at, target)
    form = str(group.get("format"))
    return _Group(targets, (form, weights), _compressed_layout(where, form, weights))


def _check_pattern(where: str, at: str, target: str) -> None:
    try:
        re.compile(target.removeprefix("re:"))
    except re.error:
        raise CfspError(f"{where}: {at}.targets has the bad pattern {shown(target)}") from None


def _compressed_layout(where: str, form: str, weights: _Weights) -> Layout:
    kind = (weights.type, weights.num_bits)
    size = weights.group_size or 0
    blocks = {
        "tensor": None,
        "channel": None,
        "group": (1, size),
        "tensor_group": (1, size),
        "block": weights.block_structure,
    }
    if weights.strategy not in blocks or ("group" in weights.strategy and size < 1):
        raise refused(where, f"compressed-tensors, {form} by {weights.strategy} of {size}")
    block = blocks[weights.strategy]
    zeros = not weights.symmetric
    if form in FORMATS and kind == ("float", 8):
        return partial(float8, blocks=(block,))
    if form in FORMATS and kind == ("int", 8):
        return partial(integers, block=block, zeros=zeros)
    if form == "pack-quantized" and kind in (("int", 4), ("int", 8)):
        return partial(packed, bits=weights.num_bits, block=block, zeros=zeros)
    if form == "nvfp4-pack-quantized" and kind == ("float", 4):
        return partial(nvfp4, group=size, divided=True)
    raise refused(where, f"compressed-tensors, {form} of {weights.num_bits}-bit {weights.type}")


SCHEMES: dict[str, Callable[[str, Mapping[str, Any]], Scheme]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
}
"""Name of a method that is read -> what makes its scheme of its config."""
