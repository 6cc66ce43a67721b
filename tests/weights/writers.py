"""Tiny quantised checkpoints of tiny plain ones, with the configs that real ones have.

Each writer reads the saved folder of a bf16 model, quantises its linear weights under their names
on the hub and returns the tensors, by name, that the result stands for; :func:`write_plain` writes
these as a checkpoint to compare with.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cfsp.io.safetensors import read_index, read_tensors

from . import quantisers
from .quantisers import Stored

Quantised = tuple[Stored, torch.Tensor]
"""Suffix or whole name -> what is stored; the values that it stands for."""
BLOCK = (128, 128)
KEPT = ("embed", "lm_head", "norm", "router", "mlp.gate.", "gate.weight", "conv", "vis", "A_log")
"""Parts of names that quantisers leave alone."""
STATIC = torch.tensor(0.25)
"""A scale of activations."""


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """Whether quantisers take a tensor for the weight of a Linear of a block."""
    left = any(part in name for part in KEPT) and "gate_proj" not in name
    return tensor.ndim == 2 and name.endswith(".weight") and not left


def write_plain(folder: Path, out: Path, tensors: Stored) -> None:
    """The model of ``folder`` with other weights."""
    _write(folder, out, tensors, {})


def write_fp8(
    folder: Path,
    out: Path,
    block: tuple[int, int] | None = BLOCK,
    scales: torch.dtype = torch.float32,
    static: bool = False,
) -> Stored:
    """As DeepSeek-V3 and Qwen3-FP8, by blocks; None: as Mistral's, one scale a tensor. ``static``:
    with scales of activations."""

    def quantise(weight: torch.Tensor) -> Quantised:
        tile = block or (weight.shape[0], weight.shape[1])
        codes, scale, values = quantisers.fp8(weight, tile, scales)
        stored = {"weight": codes, "weight_scale_inv": scale if block else scale[0, 0]}
        return stored | ({"activation_scale": STATIC} if static else {}), values

    scheme = "static" if static else "dynamic"
    config = {"activation_scheme": scheme, "fmt": "e4m3", "quant_method": "fp8"}
    return _quantised(folder, out, quantise, {**config, "weight_block_size": block})


def write_mxfp4(folder: Path, out: Path) -> Stored:
    """As gpt-oss: the experts of each block."""
    tensors = read_tensors(read_index(folder))
    stored, plain = {}, {}
    for name, tensor in tensors.items():
        plain[name] = tensor
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found = quantisers.mxfp4(tensor)
            stored[f"{name}_blocks"], stored[f"{name}_scales"], plain[name] = found
        else:
            stored[name] = tensor
    names = ["self_attn", "mlp.router"]
    kept = [*(f"model.layers.*.{name}" for name in names), "model.embed_tokens", "lm_head"]
    config = {"modules_to_not_convert": kept, "quant_method": "mxfp4"}
    _write(folder, out, stored, {"quantization_config": config})
    return plain


def write_compressed(
    folder: Path,
    out: Path,
    form: str = "float-quantized",
    strategy: str = "channel",
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
) -> Stored:
    """As llm-compressor: "float-quantized" by "tensor", "channel" or "block"; "int-quantized" by
    "channel"; "pack-quantized" of 4 or 8 ``bits`` by "group" or "channel"; "nvfp4-pack-quantized"
    by "tensor_group"."""
    bits = {"pack-quantized": bits, "nvfp4-pack-quantized": 4}.get(form, 8)
    group = 16 if form.startswith("nvfp4") else group

    def quantise(weight: torch.Tensor) -> Quantised:
        rows, columns = weight.shape
        if form == "float-quantized":
            tile = {"tensor": (rows, columns), "channel": (1, columns), "block": BLOCK}[strategy]
            codes, scales, values = quantisers.fp8(weight, tile, torch.bfloat16)
            scales = scales[0] if strategy == "tensor" else scales
            return {"weight": codes, "weight_scale": scales}, values
        if form == "nvfp4-pack-quantized":
            codes, scales, whole, values = quantisers.nvfp4(weight, inverse=True)
            whole = whole.reshape(1)
            names = ("weight_packed", "weight_scale", "weight_global_scale")
            return dict(zip(names, (codes, scales, whole), strict=True)), values
        size = group if strategy == "group" else columns
        numbers, scales, zeros, values = quantisers.integers(weight, bits, size, symmetric)
        stored = {"weight_scale": scales}
        if form == "int-quantized":
            stored["weight"] = numbers.to(torch.int8)
            if zeros is not None:
                stored["weight_zero_point"] = zeros.to(torch.int8)
        else:
            stored["weight_packed"] = quantisers.packed_ints(numbers, bits)
            stored["weight_shape"] = torch.tensor(weight.shape)
            if zeros is not None:
                stored["weight_zero_point"] = quantisers.packed_ints(zeros.T, bits).T.contiguous()
        return stored, values

    weights = {
        "actorder": None,
        "block_structure": list(BLOCK) if strategy == "block" else None,
        "dynamic": False,
        "group_size": group if "group" in strategy else None,
        "num_bits": bits,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": strategy,
        "symmetric": symmetric,
        "type": "float" if "float" in form or "fp4" in form else "int",
    }
    one = {"input_activations": None, "output_activations": None, "targets": ["Linear"]}
    config = {
        "config_groups": {"group_0": {**one, "weights": weights}},
        "format": form,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    return _quantised(folder, out, quantise, config)


def write_modelopt(
    folder: Path, out: Path, algorithm: str = "FP8", beside: bool = False, kv_cache: bool = False
) -> Stored:
    """As ModelOpt: "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO" or "NVFP4". ``beside``: told in
    hf_quant_config.json alone; ``kv_cache``: with scales of keys and values."""

    def quantise(weight: torch.Tensor) -> Quantised:
        rows, columns = weight.shape
        if algorithm == "NVFP4":
            codes, scales, whole, values = quantisers.nvfp4(weight, inverse=False)
            stored = {"weight": codes, "weight_scale": scales, "weight_scale_2": whole}
        else:
            tiles = {"FP8": (rows, columns), "FP8_PB_WO": BLOCK}
            codes, scales, values = quantisers.fp8(weight, tiles.get(algorithm, (1, columns)))
            if algorithm == "FP8_PB_WO":
                scales = scales[:, None, :, None]
            else:
                scales = scales[0, 0] if algorithm == "FP8" else scales[:, 0]
            stored = {"weight": codes, "weight_scale": scales.contiguous()}
        return stored | {"input_scale": STATIC}, values

    told: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": None}
    if algorithm == "NVFP4":
        told["group_size"] = 16
    extra = {"k_proj": "k_scale", "v_proj": "v_scale"} if kv_cache else {}
    config = {"ignore": ["lm_head"], "quant_method": "modelopt", **told}
    plain = _quantised(folder, out, quantise, {} if beside else config, extra)
    if beside:
        document = {
            "producer": {"name": "modelopt", "version": "0.39.0"},
            "quantization": {**told, "exclude_modules": ["lm_head"]},
        }
        (out / "hf_quant_config.json").write_text(json.dumps(document))
    return plain


def _quantised(
    folder: Path,
    out: Path,
    quantise: Callable[[torch.Tensor], Quantised],
    config: dict[str, Any],
    extra: dict[str, str] | None = None,
) -> Stored:
    """``extra``: end of a module's name -> a scale that it has beside its weight."""
    stored, plain = {}, {}
    for name, tensor in read_tensors(read_index(folder)).items():
        plain[name] = tensor
        if not is_linear(name, tensor):
            stored[name] = tensor
            continue
        module = name.removesuffix("weight")
        parts, plain[name] = quantise(tensor)
        stored |= {f"{module}{part}": value for part, value in parts.items()}
        for end, scale in (extra or {}).items():
            if module.endswith(f"{end}."):
                stored[f"{module}{scale}"] = STATIC
    _write(folder, out, stored, {"quantization_config": config} if config else {})
    return plain


def _write(folder: Path, out: Path, tensors: Stored, changes: dict[str, Any]) -> None:
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if ".safetensors" not in file.name:
            shutil.copy(file, out / file.name)
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **changes}))
    own = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(own, out / "model.safetensors", metadata={"format": "pt"})
