"""Call every op once on small, ragged shapes and compare with plain torch.

``python -m benchmarks.ops.call_every_op [--backend triton|torch]``: the program that
compute-sanitizer watches. Exit code 1 where a result is wrong.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import cfsp_kernels
from cfsp_kernels._dispatch import use_triton
from cfsp_kernels.gram import FORMS

from ..common.timing import DEVICE
from .forms import forms

TOKENS, HIDDEN, INTERMEDIATE = 67, 144, 272
OFFSETS = (0, 5, 5, 40, 60)
"""Rows of four experts, one of them without any; the last rows are nobody's."""
Call = Callable[[str | None], Any]


def calls(dtype: torch.dtype, device: str) -> dict[str, Call]:
    """Every public op as a function of the backend, on the same inputs for every device."""
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(device, dtype)

    x = random(TOKENS, INTERMEDIATE)
    strided = random(TOKENS, INTERMEDIATE + 16)[:, :INTERMEDIATE]
    hidden = random(TOKENS, HIDDEN)
    moved = random(TOKENS, HIDDEN)
    gate, up = random(INTERMEDIATE, HIDDEN), random(INTERMEDIATE, HIDDEN)
    down = random(HIDDEN, INTERMEDIATE)
    norms = torch.rand(INTERMEDIATE).to(device)
    index = torch.arange(0, INTERMEDIATE, 2).to(device)
    offsets = torch.tensor(OFFSETS, dtype=torch.int32).to(device)
    experts = {
        "gate": torch.stack([gate, up]),
        "up": torch.stack([up, gate]),
        "down": torch.stack([down, -down]),
        "norms": torch.stack([norms, norms.flip(0)]),
        "variance": torch.stack([norms, norms.flip(0)]),
    }
    kernels = cfsp_kernels

    def ones(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.ones(*shape, dtype=dtype, device=device)

    def added_to(
        op: Callable[..., Any], *inputs: Any, places: torch.Tensor | None, width: int = INTERMEDIATE
    ) -> Call:
        shape = (2, width) if places is None else (len(OFFSETS) - 1, 2, width)
        return lambda b: op(*inputs, offsets=places, totals=ones(*shape), backend=b)

    def form(name: str) -> Call:
        def call(b: str | None) -> torch.Tensor:
            out = torch.zeros(INTERMEDIATE, INTERMEDIATE, device=device)
            if use_triton("gram", x, b):
                FORMS[name](x, out)
            else:
                kernels.gram(x, out=out, backend=b)
            return out.tril()

        return call

    def swiglu(activation: str) -> Call:
        return lambda b: kernels.swiglu_statistics(x, strided, activation, backend=b)

    def importance(score: str) -> Call:
        return lambda b: kernels.channel_importance(
            score, gate=gate, up=up, down=down, norms=norms, variance=norms, backend=b
        )

    def importance_of_experts(score: str) -> Call:
        return lambda b: kernels.channel_importance(score, **experts, backend=b)

    table: dict[str, Call] = {
        "channel_statistics": lambda b: kernels.channel_statistics(x, backend=b),
        "channel_statistics, strided": lambda b: kernels.channel_statistics(strided, backend=b),
        "block_influence": lambda b: kernels.block_influence(hidden, moved, backend=b),
        "gram": lambda b: kernels.gram(x, backend=b).tril(),
        "gram, strided": lambda b: kernels.gram(strided, backend=b).tril(),
        "gather_rows": lambda b: kernels.gather_rows(gate, index, backend=b),
        "gather_columns": lambda b: kernels.gather_columns(down, index, backend=b),
        "gather_columns, int32": lambda b: kernels.gather_columns(down, index.int(), backend=b),
    }
    for name, places in {
        "": None,
        ", experts": offsets,
        ", experts, int64": offsets.long(),
    }.items():
        table[f"channel_statistics, added{name}"] = added_to(
            kernels.channel_statistics, strided, places=places
        )
        table[f"swiglu_statistics, added{name}"] = added_to(
            kernels.swiglu_statistics, x, strided, places=places
        )
    table["block_influence, into out"] = lambda b: kernels.block_influence(
        hidden, moved, out=ones(4), backend=b
    )
    table["gram, experts"] = lambda b: kernels.gram(x, offsets=offsets, backend=b).tril()
    for name in forms(dtype):
        table[f"gram, form {name}"] = form(name)
    for activation in ("silu", "gelu", "gelu_tanh", "relu2"):
        table[f"swiglu_statistics {activation}"] = swiglu(activation)
    for score in ("magnitude", "wanda", "flap", "eq8", "balanced"):
        table[f"channel_importance {score}"] = importance(score)
        table[f"channel_importance {score}, experts"] = importance_of_experts(score)
    table["gather_ffn"] = lambda b: kernels.gather_ffn(gate, up, down, index, backend=b)
    return table


def flatten(result: Any) -> torch.Tensor:
    """Every number of a result as one fp64 vector on the CPU."""
    if isinstance(result, torch.Tensor):
        return result.double().flatten().cpu()
    if isinstance(result, int):
        return torch.tensor([float(result)], dtype=torch.float64)
    return torch.cat([flatten(part) for part in result])


def difference(result: Any, expected: Any) -> float:
    """Largest difference of two results, relative to the largest expected value of each tensor."""
    if isinstance(expected, tuple):
        return max(difference(r, e) for r, e in zip(result, expected, strict=True))
    mine, theirs = flatten(result), flatten(expected)
    scale = theirs.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    # a NaN compares as equal to nothing, so it must not pass as "not above the tolerance"
    return float(((mine - theirs).abs() / scale).nan_to_num(nan=float("inf")).max())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops.call_every_op", description=__doc__
    )
    parser.add_argument("--backend", choices=("triton", "torch"), help="default: by device")
    parser.add_argument("--dtypes", default="float32,bfloat16,float16", help="comma-separated")
    options = parser.parse_args(arguments)
    wrong = 0
    for dtype in (getattr(torch, name) for name in options.dtypes.split(",")):
        # A product is rounded to dtype once by a kernel and twice by torch; sums are in fp32 or
        # better over at most 272 terms. A stray write errs by far more.
        tolerance = 2 * torch.finfo(dtype).eps + 1e-4
        # The reference runs on the CPU, so that a sanitizer sees the package's kernels.
        references = calls(dtype, "cpu")
        for name, call in calls(dtype, DEVICE).items():
            try:
                error = difference(call(options.backend), references[name]("torch"))
            # One op that does not compile here is no reason to know nothing of the others.
            except Exception as failure:
                print(f"{name} {dtype}: {type(failure).__name__}: {str(failure)[:500]}", flush=True)
                error = math.inf
            verdict = "ok" if error <= tolerance else "WRONG"
            wrong += verdict != "ok"
            print(f"{verdict} {name} {dtype} largest difference {error:.1e}", flush=True)
    if wrong:
        print(f"call_every_op: {wrong} results are wrong", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
