"""Rivals compute what the op computes: a faster wrong answer is no rival."""

import importlib

import pytest
import torch

from benchmarks.common.harness import OpBenchmark
from benchmarks.common.shapes import SHAPES, Shape
from benchmarks.common.timing import DEVICE

FILES = (
    "test_block_influence",
    "test_channel_importance",
    "test_channel_statistics",
    "test_experts",
    "test_gather",
    "test_gram",
    "test_swiglu_statistics",
)
SPECS = [
    spec for file in FILES for spec in importlib.import_module(f"benchmarks.ops.{file}").BENCHMARKS
]


def tiny(spec: OpBenchmark) -> Shape:
    return SHAPES["tiny-experts" if spec.experts else "tiny"]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op)
def test_every_implementation_agrees_with_the_reference(spec: OpBenchmark) -> None:
    torch.manual_seed(0)
    inputs = spec.make_inputs(tiny(spec))
    expected = spec.digest(spec.reference(spec.clear(inputs))).double().clone()
    assert expected.isfinite().all()
    assert expected.abs().max() > 0
    rivals = {**spec.implementations}
    if spec.compiled is not None:
        rivals["torch.compile, not compiled"] = spec.compiled
    for name, implementation in rivals.items():
        result = spec.digest(implementation(spec.clear(inputs))).double()
        torch.testing.assert_close(
            result, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()), msg=name
        )


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op)
def test_every_op_has_the_package_and_published_code_among_its_implementations(
    spec: OpBenchmark,
) -> None:
    names = spec.names(DEVICE)
    assert names[:2] == ["copy", "cfsp"]
    assert {"eager", "torch op"} <= set(names)
    # the compiler cannot slice by sizes that lie on the device
    assert ("torch.compile" in names) == (spec.op != "gram[experts]")
    assert ("matmul" in names) == spec.op.startswith("gram")
    assert spec.bytes_moved(spec.make_inputs(tiny(spec))) > 0


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op)
def test_what_implementations_add_to_is_theirs_all_and_can_be_cleared(spec: OpBenchmark) -> None:
    """A second call without a reset doubles every implementation's result, or none's."""
    if spec.reset is None:
        return
    torch.manual_seed(0)
    inputs = spec.make_inputs(tiny(spec))
    for name, implementation in spec.implementations.items():
        once = spec.digest(implementation(spec.clear(inputs))).double().clone()
        twice = spec.digest(implementation(inputs)).double()
        torch.testing.assert_close(twice, 2 * once, msg=name, rtol=1e-5, atol=1e-5)


def test_forms_of_gram_are_implementations_where_they_run() -> None:
    spec = next(spec for spec in SPECS if spec.op == "gram")
    assert {"form tiles", "form panels"} <= set(spec.gpu_implementations)
    assert set(spec.gpu_implementations) <= set(spec.names("cuda"))


def test_routing_covers_every_row_and_is_uneven() -> None:
    from benchmarks.ops.test_experts import route

    shape = SHAPES["qwen3-30b-a3b-8192"]
    expert, offsets = route(shape)
    counts = offsets.diff()
    assert offsets.tolist()[0] == 0
    assert offsets.tolist()[-1] == shape.tokens == len(expert)
    assert torch.equal(expert.bincount(minlength=shape.experts).int(), counts)
    assert counts.max() > 3 * counts.min() > 0
