"""What no format explains is refused in one line that names it, never guessed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cfsp.errors import CfspError
from cfsp.io.safetensors import read_tensors
from cfsp.weights.quantised import QuantisedTensor, plain_tensors

from . import quantisers
from .quantisers import Stored
from .test_formats import FP8, NVFP4, W, compressed, opened, random

CODES, SCALES, _ = quantisers.fp8(random(192, 320), (128, 128))
INT4 = compressed("pack-quantized", 4, "int", "group", group_size=32)
PACKED = {
    f"{W}_packed": torch.zeros(24, 8, dtype=torch.int32),
    f"{W}_scale": torch.ones(24, 2),
    f"{W}_shape": torch.tensor([24, 64]),
}
FP4 = {
    W: torch.zeros(24, 32, dtype=torch.uint8),
    f"{W}_scale": torch.ones(24, 4).to(torch.float8_e4m3fn),
    f"{W}_scale_2": torch.ones(()),
}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
EXPERTS = "model.layers.0.mlp.experts.down_proj"
BLOCKS = {
    f"{EXPERTS}_blocks": torch.zeros(2, 24, 2, 16, dtype=torch.uint8),
    f"{EXPERTS}_scales": torch.zeros(2, 24, 2, dtype=torch.uint8),
}


def check_refused(
    folder: Path, quantization: Mapping[str, Any], stored: Stored, message: str
) -> None:
    with pytest.raises(CfspError, match=message) as error:
        opened(folder, quantization, stored)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "method",
    ["gptq", "awq", "bitsandbytes", "hqq", "aqlm", "quanto", "torchao", "auto-round", "bitnet"],
)
def test_other_methods_are_refused_by_name(method: str) -> None:
    with pytest.raises(CfspError, match=rf"^m is quantised \({method}\); only .* dequantise it"):
        plain_tensors("m", {"quant_method": method}, {})


@pytest.mark.parametrize("config", [{}, {"bits": 4}, {"quant_method": None}])
def test_a_method_without_a_name_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CfspError, match=r"^m is quantised \(of unknown method\)"):
        plain_tensors("m", config, {})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (compressed("marlin-24", 4, "int", "group", group_size=128), "marlin-24 of 4-bit int"),
        (compressed("mxfp4-pack-quantized", 4, "float", "group", group_size=32), "mxfp4-pack"),
        (compressed("dense", 8, "int", "channel"), "dense of 8-bit int"),
        (compressed("pack-quantized", 3, "int", "channel"), "pack-quantized of 3-bit int"),
        (compressed("pack-quantized", 4, "int", "group"), "by group of 0"),
        (compressed("int-quantized", 8, "int", "token"), "by token"),
        ({**INT4, "sparsity_config": {"format": "sparse-24-bitmask"}}, "with sparsity_config"),
        ({**INT4, "transform_config": {"config_groups": {"u": {}}}}, "with transform_config"),
        (compressed(*NVFP4, group_size=16, actorder="group"), "in the order of activations"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "modelopt, W4A16_AWQ"),
        ({"quantization": {"quant_algo": "W4A8_NVFP4_FP8"}}, "modelopt, W4A8_NVFP4_FP8"),
        ({"quant_method": "modelopt"}, "modelopt, OF UNKNOWN ALGORITHM"),
        ({**FP8, "expert_dtype": "fp4"}, "fp8 with experts in fp4"),
    ],
)
def test_other_formats_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CfspError, match=rf"^m is quantised \(.*{message}.*\); only"):
        plain_tensors("m", config, {})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**FP8, "weight_block_size": 128}, "m: weight_block_size must be a list, got 128"),
        ({**FP8, "weight_block_size": [128]}, "must be a list of 2"),
        ({**FP8, "weight_block_size": [0, 128]}, r"weight_block_size\[0\] must be in"),
        ({**INT4, "quantization_config": "int4"}, "quantization_config must be a mapping"),
        (compressed("pack-quantized", 4, "int", "group", group_size="32"), "group_size must be a"),
        ({**INT4, "config_groups": [1]}, "m: config_groups must be a mapping"),
        (compressed("pack-quantized", "4", "int", "channel"), "num_bits must be a whole number"),
        (compressed("int-quantized", 8, "int", "channel", symmetric=3), "symmetric must be true"),
        (
            {**INT4, "config_groups": {"a": {"weights": {}, "targets": "Linear"}}},
            r"num_bits must be a whole number, got None",
        ),
    ],
)
def test_a_config_that_is_not_one_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CfspError, match=message):
        plain_tensors("m", config, {})


@pytest.mark.parametrize(
    ("config", "stored", "message"),
    [
        (FP8, {W: CODES}, f"{W} is stored as float8_e4m3fn without its scales"),
        (FP8, {W: CODES.view(torch.uint8)}, f"{W} is stored as uint8 without its scales"),
        (FP8, {"x.mask": torch.ones(3).to(torch.int8)}, "x.mask is stored as int8 without"),
        (INT4, {f"{W}_packed": PACKED[f"{W}_packed"]}, "stored as int32 without its scales"),
        (MODELOPT, {k: FP4[k] for k in (W, f"{W}_scale")}, "without its global"),
        ({"quant_method": "mxfp4"}, {W: CODES}, f"{W} is stored as float8_e4m3fn, which mxfp4"),
        ({"quant_method": "mxfp4"}, {W: CODES.view(torch.int8)}, "int8, which mxfp4 does not"),
        ({"quant_method": "mxfp4"}, {f"{EXPERTS}_blocks": BLOCKS[f"{EXPERTS}_blocks"]}, "without"),
    ],
)
def test_codes_without_scales_are_refused(
    config: dict[str, Any], stored: Stored, message: str, tmp_path: Path
) -> None:
    check_refused(tmp_path, config, stored, message)


@pytest.mark.parametrize(
    ("config", "stored", "message"),
    [
        (FP8, {f"{W}_scale_inv": SCALES}, f"{W}_scale_inv belongs to no weight"),
        (FP8, {W: random(192, 320), f"{W}_scale_inv": SCALES}, "which is stored as bfloat16"),
        ({"quant_method": "mxfp4"}, {f"{EXPERTS}_scales": torch.ones(2)}, "belongs to no weight"),
        (INT4, {f"{W}_shape": torch.tensor([24, 64])}, f"{W}_shape belongs to no weight"),
        (MODELOPT, {"x.pre_quant_scale": torch.ones(3)}, "x.pre_quant_scale belongs to no"),
        (MODELOPT, {W: random(24, 64), f"{W}_scale_2": torch.ones(())}, "stored as bfloat16"),
    ],
)
def test_scales_without_codes_are_refused(
    config: dict[str, Any], stored: Stored, message: str, tmp_path: Path
) -> None:
    check_refused(tmp_path, config, stored, message)


def test_a_parameter_may_be_called_a_scale(tmp_path: Path) -> None:
    stored = {
        "x.logit": torch.ones(2),
        "x.logit_scale": torch.ones(2),
        "x.grid_shape": torch.ones(1),
    }
    for config in (FP8, INT4, MODELOPT):
        assert opened(tmp_path, config, stored).keys() == stored.keys()


def test_what_is_refused_below_for_a_change_is_read_without(tmp_path: Path) -> None:
    for config, stored, name in (
        (INT4, PACKED, W),
        (MODELOPT, FP4, W),
        ({"quant_method": "mxfp4"}, BLOCKS, EXPERTS),
        (FP8, {W: CODES, f"{W}_scale_inv": SCALES}, W),
    ):
        assert opened(tmp_path, config, stored).keys() == {name}


ONE = {**FP8, "weight_block_size": None}


@pytest.mark.parametrize("shape", [(3, 2), (1, 3), (2, 2), (192, 1), (1, 1), (2, 3, 1), (6,)])
def test_a_grid_that_does_not_fit_its_blocks_is_refused(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    stored = {W: CODES, f"{W}_scale_inv": torch.ones(shape)}
    message = rf"{W}: scales of \[{', '.join(map(str, shape))}\] do not fit \[192, 320\] in blocks"
    check_refused(tmp_path, FP8, stored, message)


@pytest.mark.parametrize("shape", [(2, 3), (1, 320), (320,), (192, 2)])
def test_a_grid_where_no_blocks_are_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    check_refused(tmp_path, ONE, {W: CODES, f"{W}_scale_inv": torch.ones(shape)}, "do not fit")


@pytest.mark.parametrize("shape", [(2, 64, 1), (2, 64), (2, 1, 64), (64, 1)])
def test_a_scale_for_a_row_of_fused_experts_is_refused(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    codes = torch.zeros(2, 64, 64).to(torch.float8_e4m3fn)
    stored = {EXPERTS: codes, f"{EXPERTS}_scale": torch.ones(shape)}
    check_refused(tmp_path, {"quant_method": "fbgemm_fp8"}, stored, "do not fit")


@pytest.mark.parametrize(
    ("config", "stored", "change", "message"),
    [
        (INT4, PACKED, {f"{W}_shape": torch.tensor([24, 72])}, r"do not fit \[24, 9\]"),
        (INT4, PACKED, {f"{W}_shape": torch.tensor([-24, 64])}, "do not fit"),
        (INT4, PACKED, {f"{W}_shape": torch.tensor([24, 64, 1])}, "must be two whole numbers"),
        (
            INT4,
            PACKED,
            {f"{W}_scale": torch.ones(24, 3)},
            r"do not fit \[24, 64\] in blocks of 1 x",
        ),
        (INT4, PACKED, {f"{W}_scale": torch.ones(1, 2)}, "do not fit"),
        (INT4, PACKED, {f"{W}_g_idx": torch.zeros(64)}, "unexpected part, its g_idx"),
        (INT4, PACKED, {f"{W}_zero_point": torch.zeros(24, 2)}, "zeros in float32"),
        (INT4, PACKED, {W: random(24, 64)}, "are one weight"),
        (MODELOPT, FP4, {f"{W}_scale": torch.ones(24, 4)}, "scales in float32"),
        (MODELOPT, FP4, {f"{W}_scale": torch.ones(24, 2).to(torch.float8_e4m3fn)}, "do not fit"),
        (MODELOPT, FP4, {f"{W}_scale_2": torch.ones(24)}, r"global scale of \[24\]"),
        ({"quant_method": "mxfp4"}, BLOCKS, {f"{EXPERTS}_scales": SCALES}, "scales in float32"),
        (
            {"quant_method": "mxfp4"},
            BLOCKS,
            {f"{EXPERTS}_scales": torch.zeros(2, 24, 3, dtype=torch.uint8)},
            "do not fit",
        ),
        (FP8, {W: CODES, f"{W}_scale_inv": SCALES}, {f"{W}_scale": SCALES + 1}, "are one weight"),
        (FP8, {W: CODES.view(torch.int8)}, {f"{W}_scale_inv": SCALES}, "values in int8"),
        (FP8, {W: CODES}, {f"{W}_scale_inv": SCALES.int()}, "scales in int32"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(
    config: dict[str, Any], stored: Stored, change: Stored, message: str, tmp_path: Path
) -> None:
    check_refused(tmp_path, config, {**stored, **change}, message)


@pytest.mark.parametrize(
    ("role", "value"),
    [("scales", "nan"), ("scales", -1), ("global", "nan"), ("global", "inf"), ("global", -1)],
)
def test_scales_that_are_no_sizes_are_refused_when_read(
    role: str, value: str | int, tmp_path: Path
) -> None:
    tensor = opened(tmp_path, MODELOPT, FP4)[W]
    assert isinstance(tensor, QuantisedTensor)
    parts = read_tensors(tensor.parts)
    assert not tensor.decode(parts, torch.bfloat16).any()
    parts[role].flatten()[-1:].copy_(torch.tensor([float(value)]))
    with pytest.raises(CfspError, match=f"^{tmp_path}: {W}: its scales hold NaN, infinity or"):
        tensor.decode(parts, torch.bfloat16)


@pytest.mark.parametrize("method", ["mxfp4", "fp8", "global"])
def test_exponents_and_divisors_that_are_no_numbers_are_refused_when_read(
    method: str, tmp_path: Path
) -> None:
    nan = torch.tensor(255, dtype=torch.uint8)
    name, config, stored = {
        "mxfp4": (
            EXPERTS,
            {"quant_method": "mxfp4"},
            {**BLOCKS, f"{EXPERTS}_scales": nan.repeat(2, 24, 2)},
        ),
        "fp8": (W, FP8, {W: CODES, f"{W}_scale_inv": nan.repeat(2, 3)}),
        "global": (
            W,
            compressed(*NVFP4, group_size=16),
            {
                f"{W}_packed": FP4[W],
                f"{W}_scale": FP4[f"{W}_scale"],
                f"{W}_global_scale": torch.zeros(1),
            },
        ),
    }[method]
    tensor = opened(tmp_path, config, stored)[name]
    assert isinstance(tensor, QuantisedTensor)
    with pytest.raises(CfspError, match=f"{name}: its scales hold"):
        tensor.decode(read_tensors(tensor.parts), torch.bfloat16)


GROUPS = {
    "a": {
        "targets": ["re:.*self_attn.*"],
        "format": "float-quantized",
        "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    },
    "b": {
        "targets": ["Linear"],
        "format": "pack-quantized",
        "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    },
}
MIXED = {**INT4, "format": "mixed-precision", "config_groups": GROUPS}
Q = "model.layers.0.self_attn.q_proj.weight"


def test_groups_are_told_by_the_names_of_modules(tmp_path: Path) -> None:
    stored = {Q: CODES, f"{Q}_scale": torch.ones(1), **PACKED}
    assert opened(tmp_path, MIXED, stored).keys() == {Q, W}
    check_refused(tmp_path, MIXED, {W: CODES, f"{W}_scale": torch.ones(1)}, "without its shape")


def test_groups_that_do_not_tell_are_refused(tmp_path: Path) -> None:
    two = {"a": {**GROUPS["a"], "targets": ["Embedding"]}, "b": GROUPS["b"]}
    message = f"config_groups does not say how {W} is quantised"
    check_refused(tmp_path, {**MIXED, "config_groups": two}, PACKED, message)
    for groups in ({}, {"a": GROUPS["a"]}, {"a": {"targets": ["Linear"], "weights": None}}):
        check_refused(tmp_path, {**MIXED, "config_groups": groups}, PACKED, message)
    broken = {"a": {**GROUPS["a"], "targets": ["re:("]}}
    check_refused(tmp_path, {**MIXED, "config_groups": broken}, PACKED, "bad pattern 're:\\('")
