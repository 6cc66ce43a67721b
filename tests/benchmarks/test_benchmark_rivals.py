"""Rivals compute what the op computes: a faster wrong answer is no rival."""

import importlib

import pytest
import torch

from benchmarks.harness import OpBenchmark
from benchmarks.shapes import SHAPES
from benchmarks.timing import DEVICE

FILES = (
    "test_block_influence",
    "test_channel_importance",
    "test_channel_statistics",
    "test_gather",
    "test_gram",
    "test_swiglu_statistics",
)
SPECS = [
    spec for file in FILES for spec in importlib.import_module(f"benchmarks.{file}").BENCHMARKS
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op)
def test_every_implementation_agrees_with_the_reference(spec: OpBenchmark) -> None:
    torch.manual_seed(0)
    inputs = spec.make_inputs(SHAPES["tiny"])
    expected = spec.digest(spec.reference(inputs)).double()
    assert expected.isfinite().all()
    assert expected.abs().max() > 0
    rivals = {**spec.implementations, "torch.compile, not compiled": spec.compiled}
    for name, implementation in rivals.items():
        result = spec.digest(implementation(inputs)).double()
        torch.testing.assert_close(
            result, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()), msg=name
        )


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op)
def test_every_op_has_the_package_and_published_code_among_its_implementations(
    spec: OpBenchmark,
) -> None:
    names = spec.names(DEVICE)
    assert names[:2] == ["copy", "cfsp"]
    assert {"eager", "torch op", "torch.compile"} <= set(names)
    assert spec.bytes_moved(spec.make_inputs(SHAPES["tiny"])) > 0
