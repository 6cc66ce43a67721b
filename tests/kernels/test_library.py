"""The ops as PyTorch sees them: schemas, fakes, torch.compile, gradients."""

import pytest
import torch
from kernel_cases import random_matrix, same_bits

import cfsp_kernels
from cfsp_kernels._triton import triton_installed

OPS = ["channel_statistics", "swiglu_statistics", "block_influence", "channel_importance", "gram"]


def arguments(op: str, device: torch.device) -> tuple:
    x, y = random_matrix(40, 30, device=device), random_matrix(40, 30, device=device, seed=1)
    totals = torch.zeros(2, 30, dtype=torch.float64, device=device)
    norms = torch.ones(40, device=device)
    index = torch.arange(0, 30, 2, device=device)
    return {
        "channel_statistics": (x, totals),
        "swiglu_statistics": (x, y, "silu", totals),
        "block_influence": (x, y),
        "channel_importance": ("balanced", x, None, y.T.contiguous(), norms),
        "gram": (x, torch.zeros(30, 30, device=device)),
        "gather_columns": (x, index, torch.zeros(40, 15, device=device)),
    }[op]


@pytest.mark.skipif(not triton_installed(), reason="the registered ops are the Triton kernels")
@pytest.mark.parametrize("op", [*OPS, "gather_columns"])
def test_opcheck(device, op):
    results = torch.library.opcheck(getattr(torch.ops.cfsp, op).default, arguments(op, device))
    assert set(results.values()) == {"SUCCESS"}


def every_op(x, y, weight, index, backend):
    """All public ops in one graph."""
    return (
        *cfsp_kernels.channel_statistics(x, backend=backend)[1:],
        cfsp_kernels.swiglu_statistics(x, y, backend=backend)[0],
        *cfsp_kernels.block_influence(x, y, backend=backend)[1:],
        cfsp_kernels.channel_importance("flap", down=y, variance=x[0].abs(), backend=backend),
        cfsp_kernels.gram(x, backend=backend),
        *cfsp_kernels.gather_ffn(weight, weight, y, index, backend=backend),
    )


def test_ops_compile_to_one_graph(backend, device):
    x, y = random_matrix(8, 30, device=device), random_matrix(8, 30, device=device, seed=1)
    weight = random_matrix(30, 8, device=device, seed=2)
    index = torch.arange(0, 30, 2, device=device)
    compiled = torch.compile(every_op, fullgraph=True, backend="aot_eager")
    eager = every_op(x, y, weight, index, backend)
    for a, b in zip(eager, compiled(x, y, weight, index, backend), strict=True):
        assert same_bits(a, b)


def test_parameters_are_read_without_a_graph(backend, device):
    x = random_matrix(8, 30, device=device).requires_grad_()
    y = random_matrix(8, 30, device=device, seed=1).requires_grad_()
    weight = random_matrix(30, 8, device=device, seed=2).requires_grad_()
    index = torch.arange(0, 30, 2, device=device)
    assert not any(r.requires_grad for r in every_op(x, y, weight, index, backend))
    out = torch.nn.Parameter(torch.zeros(8, 15, device=device))
    cfsp_kernels.gather_columns(x, index, out=out, backend=backend)
    assert torch.equal(out, x[:, index])
