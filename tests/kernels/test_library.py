"""The ops as PyTorch sees them: schemas, fakes, torch.compile. Eager calls it does not see."""

from functools import partial

import pytest
import torch
from kernel_cases import random_matrix, same_bits
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cfsp_kernels
from cfsp_kernels._triton import triton_installed

OPS = ["channel_statistics", "swiglu_statistics", "block_influence", "channel_importance", "gram"]
OPS.append("gather_columns")
needs_triton = pytest.mark.skipif(
    not triton_installed(), reason="the registered ops are the Triton kernels"
)


def variants(op: str, device, backend: str = "triton") -> list[partial]:
    """Public calls of ``op``, with every argument that changes what is launched or written to."""
    x, y = random_matrix(40, 30, device=device), random_matrix(40, 30, device=device, seed=1)
    fp64 = {"dtype": torch.float64, "device": device}
    offsets = torch.tensor([0, 7, 7, 40], device=device)
    of_segments = {"offsets": offsets, "totals": torch.zeros(3, 2, 30, **fp64)}
    options: list[dict] = [{}]
    match op:
        case "channel_statistics":
            options += [{"totals": torch.zeros(2, 30, **fp64)}, {"offsets": offsets}, of_segments]
            arguments = (x,)
        case "swiglu_statistics":
            options += [{"totals": torch.zeros(2, 30, **fp64)}, {"offsets": offsets}, of_segments]
            arguments = (x, y, "gelu")
        case "block_influence":
            options += [{"out": torch.zeros(4, **fp64)}]
            arguments = (x, y)
        case "channel_importance":
            matrices = {"gate": x, "down": y.T.contiguous(), "norms": torch.ones(40, device=device)}
            batch = {name: torch.stack([m, m + 1]) for name, m in matrices.items()}
            options = [matrices, batch, {"up": x, "norms": matrices["norms"]}]
            arguments = ("balanced",)
        case "gram":
            options += [
                {"out": torch.zeros(30, 30, device=device)},
                {"offsets": offsets},
                {"offsets": offsets, "out": torch.zeros(3, 30, 30, device=device)},
            ]
            arguments = (x,)
        case "gather_columns":
            options += [{"out": torch.zeros(40, 15, device=device)}]
            arguments = (x, torch.arange(0, 30, 2, device=device))
    function = getattr(cfsp_kernels, op)
    return [partial(function, *arguments, **more, backend=backend) for more in options]


class Recorder(TorchDispatchMode):
    """Calls of registered ops of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "cfsp":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_opcheck_of_what_public_calls_pass_on(device, op):
    for call in variants(op, device):
        with Recorder() as recorder:
            call()
        ((function, args, kwargs),) = recorder.calls
        assert function.name() == f"cfsp::{op}"
        results = torch.library.opcheck(function, args, kwargs)
        assert set(results.values()) == {"SUCCESS"}


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_eager_calls_do_not_enter_the_dispatcher(monkeypatch, device, op):
    """Its fixed cost is as much as all the rest of a call takes on the host."""

    def refuse(*_, **__):
        raise AssertionError("a registered op was called")

    calls = variants(op, device)
    monkeypatch.setattr(CustomOpDef, "__call__", refuse)
    for call in calls:
        call()
    with torch.inference_mode(), torch.no_grad():
        calls[0]()
    with FakeTensorMode(), pytest.raises(AssertionError, match="registered"):
        variants(op, device)[0]()


def flat(results: object) -> list:
    """Tensors and numbers of a result, in order."""
    if isinstance(results, tuple | list):
        return [part for result in results for part in flat(result)]
    return [results]


@pytest.mark.parametrize("op", OPS)
def test_fakes_have_the_shapes_of_results(backend, device, op):
    real = [flat(call()) for call in variants(op, device, backend)]
    with FakeTensorMode():
        fakes = [flat(call()) for call in variants(op, device, backend)]
    assert fakes
    for fake, expected in zip(fakes, real, strict=True):
        for a, b in zip(fake, expected, strict=True):
            if isinstance(b, torch.Tensor):
                assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
            else:
                assert a == b


def every_op(x, y, weight, index, offsets, backend):
    """All public ops in one graph."""
    totals = torch.ones(2, x.shape[1], dtype=torch.float64, device=x.device)
    influence = torch.zeros(4, dtype=torch.float64, device=x.device)
    triangle = torch.ones(x.shape[1], x.shape[1], device=x.device)
    columns = torch.zeros(x.shape[0], index.shape[0], dtype=x.dtype, device=x.device)
    experts = torch.stack([y, y + 1])
    sums = torch.ones(offsets.shape[0] - 1, *totals.shape, dtype=torch.float64, device=x.device)
    segmented = (
        *cfsp_kernels.channel_statistics(x, offsets=offsets, totals=sums, backend=backend),
        *cfsp_kernels.swiglu_statistics(x, y, offsets=offsets, backend=backend)[1],
        sums,
        cfsp_kernels.gram(x, offsets=offsets, backend=backend),
    )
    return (
        *cfsp_kernels.channel_statistics(x, backend=backend)[1:],
        *cfsp_kernels.channel_statistics(x, totals=totals, backend=backend)[1:],
        cfsp_kernels.swiglu_statistics(x, y, backend=backend)[0],
        cfsp_kernels.swiglu_statistics(x, y, totals=totals, backend=backend)[0],
        totals,
        *cfsp_kernels.block_influence(x, y, backend=backend)[1:],
        *cfsp_kernels.block_influence(x, y, out=influence, backend=backend)[1:],
        influence,
        cfsp_kernels.channel_importance("flap", down=y, variance=x[0].abs(), backend=backend),
        cfsp_kernels.channel_importance(
            "balanced", down=experts, norms=x[:2].abs(), backend=backend
        ),
        cfsp_kernels.gram(x, backend=backend),
        cfsp_kernels.gram(x, out=triangle, backend=backend),
        *cfsp_kernels.gather_ffn(weight, weight, y, index, backend=backend),
        cfsp_kernels.gather_columns(x, index, out=columns, backend=backend),
        *segmented,
    )


def test_ops_compile_to_one_graph(backend, device):
    x, y = random_matrix(8, 30, device=device), random_matrix(8, 30, device=device, seed=1)
    weight = random_matrix(30, 8, device=device, seed=2)
    index = torch.arange(0, 30, 2, device=device)
    # The reference asks where segments are, which no graph can.
    offsets = torch.tensor([0, 3, 3, 7], device=device)
    compiled = torch.compile(every_op, fullgraph=True, backend="aot_eager")
    eager = every_op(x, y, weight, index, offsets, backend)
    for a, b in zip(eager, compiled(x, y, weight, index, offsets, backend), strict=True):
        assert same_bits(a, b)


def test_parameters_are_read_without_a_graph(backend, device):
    x = random_matrix(8, 30, device=device).requires_grad_()
    y = random_matrix(8, 30, device=device, seed=1).requires_grad_()
    weight = random_matrix(30, 8, device=device, seed=2).requires_grad_()
    index = torch.arange(0, 30, 2, device=device)
    offsets = torch.tensor([0, 3, 3, 7], device=device)
    results = every_op(x, y, weight, index, offsets, backend)
    assert not any(r.requires_grad for r in results)
    out = torch.nn.Parameter(torch.zeros(8, 15, device=device))
    cfsp_kernels.gather_columns(x, index, out=out, backend=backend)
    assert torch.equal(out, x[:, index])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_no_result(backend, device, dtype):
    x, y = random_matrix(8, 30, device=device), random_matrix(8, 30, device=device, seed=1)

    def in_fp32() -> list[torch.Tensor]:
        return [
            cfsp_kernels.gram(x, backend=backend),
            cfsp_kernels.channel_statistics(x, backend=backend).sum,
            *cfsp_kernels.block_influence(x, y, backend=backend)[1:],
            cfsp_kernels.channel_importance("balanced", down=y, norms=x[0].abs(), backend=backend),
        ]

    expected = in_fp32()
    torch.set_default_dtype(dtype)
    try:
        got = in_fp32()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(same_bits(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("score", ["balanced", "eq8"])
def test_autocast_takes_no_digits_away(backend, device, score):
    gate, down = random_matrix(30, 8, device=device), random_matrix(8, 30, device=device, seed=1)
    norms = random_matrix(1, 30, device=device, seed=2)[0].abs()

    def call() -> torch.Tensor:
        return cfsp_kernels.channel_importance(
            score, gate=gate, down=down, norms=norms, backend=backend
        )

    expected = call()
    with torch.autocast(device.type, torch.bfloat16):
        assert same_bits(call(), expected)


def test_what_a_call_wrote_is_known_to_autograd(backend, device):
    x, out = random_matrix(8, 30, device=device), torch.zeros(30, 30, device=device)
    factor = torch.ones(30, 30, device=device, requires_grad=True)
    product = (factor * out).sum()
    cfsp_kernels.gram(x, out=out, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_tensors_without_memory_give_shapes():
    x = torch.zeros(10, 4, device="meta")
    assert cfsp_kernels.gram(x, out=torch.zeros(4, 4, device="meta")).is_meta
    assert cfsp_kernels.block_influence(x, x).angular.is_meta
    totals = torch.zeros(2, 4, dtype=torch.float64, device="meta")
    assert cfsp_kernels.channel_statistics(x, totals=totals).sum.is_meta
    assert cfsp_kernels.channel_importance("flap", down=x, variance=x[0]).is_meta
