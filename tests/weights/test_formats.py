"""Every format that is read, against quantisers that share no code with it."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from cfsp.io.safetensors import StoredTensor, read_index, read_tensors
from cfsp.weights import dequantise
from cfsp.weights.quantised import QuantisedTensor, plain_tensors

from . import quantisers
from .quantisers import FP4, Stored

W = "model.layers.0.mlp.up_proj.weight"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """bf16, with rows and columns of very different sizes."""
    torch.manual_seed(seed)
    spread = torch.randn(shape[-2], 1).exp() * torch.randn(shape[-1]).exp()
    return (torch.randn(shape) * spread).bfloat16()


def opened(
    folder: Path, quantization: Mapping[str, Any], stored: Stored
) -> dict[str, StoredTensor | QuantisedTensor]:
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in stored.items()}, folder / "model.safetensors")
    return plain_tensors(folder, quantization, read_index(folder))


def decoded(
    tensor: StoredTensor | QuantisedTensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    if isinstance(tensor, StoredTensor):
        return read_tensors({"": tensor})[""]
    weight = tensor.decode(read_tensors(tensor.parts), dtype)
    assert weight.is_contiguous()
    assert (weight.dtype, weight.shape) == (dtype, tensor.shape)
    return weight


def check(
    folder: Path, quantization: Mapping[str, Any], stored: Stored, values: torch.Tensor
) -> None:
    """That one weight of just these values results."""
    (name, tensor) = next(iter(opened(folder, quantization, stored).items()))
    assert isinstance(tensor, QuantisedTensor)
    assert tensor.dtype == torch.bfloat16
    assert name == next(iter(stored)).removesuffix("_packed").removesuffix("_blocks")
    assert torch.equal(decoded(tensor), values)


@pytest.mark.parametrize("rows", [64, 128, 192, 256, 576])
@pytest.mark.parametrize("columns", [256, 320])
def test_fp8_blocks_may_be_partial(rows: int, columns: int, tmp_path: Path) -> None:
    weight = random(rows, columns)
    codes, scales, values = quantisers.fp8(weight, (128, 128))
    check(tmp_path, FP8, {W: codes, f"{W}_scale_inv": scales}, values)
    # 3 bits of mantissa, and what is less than 448 / 2^15 of a block's largest is subnormal.
    error = (values.float() - weight.float()).abs()
    floor = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns] * 2**-10
    assert (error <= weight.float().abs() * 2**-4 * 1.01 + floor).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_of_fp8_are_floats_of_any_size(dtype: torch.dtype, tmp_path: Path) -> None:
    codes, scales, values = quantisers.fp8(random(192, 320), (128, 128), dtype)
    check(tmp_path, FP8, {W: codes, f"{W}_scale_inv": scales}, values)


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.uint8])
def test_scales_of_fp8_are_powers_of_two(dtype: torch.dtype, tmp_path: Path) -> None:
    codes = random(192, 320).to(torch.float8_e4m3fn)
    exponents = torch.tensor([[3, -4, 0], [-20, 7, 1]])
    scales = (exponents + 127).to(torch.uint8).view(dtype)
    each = 2.0 ** exponents.repeat_interleave(128, 0).repeat_interleave(128, 1)[:192, :320]
    values = (codes.float() * each).bfloat16()
    check(tmp_path, FP8, {W: codes, f"{W}_scale_inv": scales}, values)


def test_blocks_of_other_sizes_and_of_experts_that_lie_together(tmp_path: Path) -> None:
    found = [quantisers.fp8(random(192, 96, seed=seed), (128, 64)) for seed in range(3)]
    codes, scales, values = (torch.stack(parts) for parts in zip(*found, strict=True))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    config = {**FP8, "weight_block_size": [128, 64]}
    check(tmp_path, config, {name: codes, f"{name}_scale_inv": scales}, values)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("config", [{"weight_block_size": None}, {}], ids=["null", "unsaid"])
def test_one_scale_for_all(shape: tuple[int, ...], config: dict[str, None], tmp_path: Path) -> None:
    codes, scales, values = quantisers.fp8(random(64, 96), (64, 96))
    stored = {W: codes, f"{W}_scale": scales.reshape(shape)}
    check(tmp_path, {"quant_method": "fp8", **config}, stored, values)


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1)])
def test_one_scale_for_an_expert(shape: tuple[int, ...], tmp_path: Path) -> None:
    found = [quantisers.fp8(random(64, 96, seed=seed), (64, 96)) for seed in range(3)]
    codes, scales, values = (torch.stack(parts) for parts in zip(*found, strict=True))
    name = "model.layers.0.mlp.experts.down_proj"
    config = {"quant_method": "fp8", "weight_block_size": None}
    check(tmp_path, config, {name: codes, f"{name}_scale_inv": scales.reshape(shape)}, values)


def test_one_scale_for_each_half_of_fused_experts(tmp_path: Path) -> None:
    found = [quantisers.fp8(random(64, 96, seed=seed), (32, 96)) for seed in range(3)]
    codes, scales, values = (torch.stack(parts) for parts in zip(*found, strict=True))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    config = {"quant_method": "fp8", "weight_block_size": None}
    check(tmp_path, config, {name: codes, f"{name}_scale_inv": scales}, values)


def test_a_config_without_blocks_has_the_usual_ones(tmp_path: Path) -> None:
    codes, scales, values = quantisers.fp8(random(192, 320), (128, 128))
    check(tmp_path, {"quant_method": "fp8"}, {W: codes, f"{W}_scale_inv": scales}, values)


@pytest.mark.parametrize("flat", [False, True])
def test_one_scale_for_a_row(flat: bool, tmp_path: Path) -> None:
    codes, scales, values = quantisers.fp8(random(72, 96), (1, 96))
    stored = {W: codes, f"{W}_scale": scales[:, 0] if flat else scales}
    check(tmp_path, {"quant_method": "fbgemm_fp8"}, stored, values)


def test_all_codes_and_scales_of_mxfp4(tmp_path: Path) -> None:
    codes = torch.arange(16).repeat(2 * 255, 2).reshape(2, 255, 32)
    exponents = torch.arange(255).repeat(2, 1)[..., None]
    each = 2.0 ** (exponents - 127).double()
    values = (FP4[codes].double() * each).float().bfloat16()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks = quantisers.packed_fp4(codes)[:, :, None]
    stored = {f"{name}_blocks": blocks, f"{name}_scales": exponents.to(torch.uint8)}
    check(tmp_path, {"quant_method": "mxfp4"}, stored, values.mT)


def test_mxfp4_is_transposed_as_its_plain_checkpoint_is(tmp_path: Path) -> None:
    weight = random(3, 96, 40)
    blocks, scales, values = quantisers.mxfp4(weight)
    name = "model.layers.0.mlp.experts.down_proj"
    stored = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    check(tmp_path, {"quant_method": "mxfp4"}, stored, values)
    assert torch.equal(convert_moe_packed_tensors(blocks, scales), values)
    largest = weight.float().mT.unflatten(-1, (-1, 32)).abs().amax(-1).repeat_interleave(32, -1).mT
    assert ((values.float() - weight.float()).abs() <= largest / 3).all()


def compressed(form: str, bits: int, kind: str, strategy: str, **more: object) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    config = {"format": form, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    return {"quant_method": "compressed-tensors", **config}


@pytest.mark.parametrize("form", ["float-quantized", "naive-quantized"])
@pytest.mark.parametrize(
    ("strategy", "block", "more"),
    [
        ("tensor", (192, 320), {}),
        ("channel", (1, 320), {}),
        ("block", (128, 128), {"block_structure": [128, 128]}),
        ("group", (1, 64), {"group_size": 64}),
    ],
)
def test_fp8_of_compressed_tensors(
    form: str, strategy: str, block: tuple[int, int], more: dict[str, Any], tmp_path: Path
) -> None:
    codes, scales, values = quantisers.fp8(random(192, 320), block, torch.bfloat16)
    scales = scales[0] if strategy == "tensor" else scales
    config = compressed(form, 8, "float", strategy, **more)
    check(tmp_path, config, {W: codes, f"{W}_scale": scales}, values)


@pytest.mark.parametrize("form", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_of_compressed_tensors(form: str, symmetric: bool, tmp_path: Path) -> None:
    numbers, scales, zeros, values = quantisers.integers(random(40, 72), 8, 72, symmetric)
    stored = {W: numbers.to(torch.int8), f"{W}_scale": scales}
    if zeros is not None:
        stored[f"{W}_zero_point"] = zeros.to(torch.int8)
    check(tmp_path, compressed(form, 8, "int", "channel", symmetric=symmetric), stored, values)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(24, 64), (21, 77), (3, 33)])
def test_packed_integers_of_odd_sizes(
    bits: int, group: int, symmetric: bool, shape: tuple[int, int], tmp_path: Path
) -> None:
    weight = random(*shape)
    numbers, scales, zeros, values = quantisers.integers(weight, bits, group or shape[1], symmetric)
    stored = {f"{W}_packed": quantisers.packed_ints(numbers, bits), f"{W}_scale": scales}
    stored[f"{W}_shape"] = torch.tensor(shape)
    if zeros is not None:
        stored[f"{W}_zero_point"] = quantisers.packed_ints(zeros.T, bits).T
    more = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    config = compressed("pack-quantized", bits, "int", symmetric=symmetric, **more)
    check(tmp_path, config, stored, values)
    each = scales.float().repeat_interleave(group or shape[1], 1)[:, : shape[1]]
    assert ((values.float() - weight.float()).abs() <= each * 1.6 + values.abs() * 2**-8).all()


def test_all_codes_and_scales_of_nvfp4(tmp_path: Path) -> None:
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    codes = torch.arange(16).repeat(127, 1)
    for whole, config, end in (
        (torch.tensor(0.37), {"quant_method": "modelopt", "quant_algo": "NVFP4"}, ""),
        (torch.tensor([0.37]), compressed(*NVFP4, group_size=16), "_packed"),
    ):
        each = scales.float() / whole if end else scales.float() * whole
        stored = {f"{W}{end}": quantisers.packed_fp4(codes), f"{W}_scale": scales}
        stored[f"{W}_global_scale" if end else f"{W}_scale_2"] = whole
        check(tmp_path, config, stored, (FP4[codes] * each).bfloat16())


NVFP4 = ("nvfp4-pack-quantized", 4, "float", "tensor_group")


def test_groups_for_classes_may_agree(tmp_path: Path) -> None:
    codes, scales, values = quantisers.fp8(random(192, 320), (1, 320), torch.bfloat16)
    config = compressed("float-quantized", 8, "float", "channel")
    same = {**config["config_groups"]["group_0"], "targets": ["Linear", "Embedding"]}
    other = {**same, "targets": ["lm_head"], "weights": {"num_bits": 8, "type": "int"}}
    config["config_groups"] |= {"group_1": same, "group_2": other}
    check(tmp_path, config, {W: codes, f"{W}_scale": scales}, values)


def test_slabs_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, scales, zeros, values = quantisers.integers(random(37, 77), 4, 32, symmetric=False)
    assert zeros is not None
    stored = {f"{W}_packed": quantisers.packed_ints(numbers, 4), f"{W}_scale": scales}
    stored |= {f"{W}_shape": torch.tensor([37, 77])}
    stored |= {f"{W}_zero_point": quantisers.packed_ints(zeros.T, 4).T}
    monkeypatch.setattr(dequantise, "SLAB", 300)  # three rows
    config = compressed("pack-quantized", 4, "int", "group", group_size=32, symmetric=False)
    check(tmp_path, config, stored, values)


@pytest.mark.parametrize("shape", [(256, 384), (128, 128), (512, 256)])
def test_transformers_says_the_same_where_blocks_are_whole(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    codes, scales, _ = quantisers.fp8(random(*shape), (128, 128))
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    check(tmp_path, FP8, {W: codes, f"{W}_scale_inv": scales}, theirs)


def test_a_weight_in_other_dtypes_is_rounded_once(tmp_path: Path) -> None:
    codes, scales, _ = quantisers.fp8(random(64, 96), (64, 96))
    tensor = opened(tmp_path, FP8, {W: codes, f"{W}_scale_inv": scales})[W]
    exact = codes.double() * scales.double()
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(decoded(tensor, dtype), exact.float().to(dtype))


def test_a_quantised_tensor_is_a_value(tmp_path: Path) -> None:
    codes, scales, values = quantisers.fp8(random(64, 96), (128, 128))
    stored = {W: codes, f"{W}_scale_inv": scales}
    one, other = (opened(tmp_path, FP8, stored)[W] for _ in range(2))
    assert one == other == pickle.loads(pickle.dumps(one))
    assert isinstance(one, QuantisedTensor)
    assert (one.stored_bytes, one.nbytes) == (64 * 96 + 4, 64 * 96 * 2)
    assert torch.equal(decoded(pickle.loads(pickle.dumps(one))), values)
