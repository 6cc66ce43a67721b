"""Call every op once on small, ragged shapes and compare with plain torch.

``python -m benchmarks.call_every_op [--backend triton|torch]``: the program that
compute-sanitizer watches. Exit code 1 where a result is wrong.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import cfsp_kernels

from .timing import DEVICE

TOKENS, HIDDEN, INTERMEDIATE = 67, 144, 272
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
    kernels = cfsp_kernels

    def swiglu(activation: str) -> Call:
        return lambda b: kernels.swiglu_statistics(x, strided, activation, backend=b)

    def importance(score: str) -> Call:
        return lambda b: kernels.channel_importance(
            score, gate=gate, up=up, down=down, norms=norms, variance=norms, backend=b
        )

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
    for activation in ("silu", "gelu", "gelu_tanh", "relu2"):
        table[f"swiglu_statistics {activation}"] = swiglu(activation)
    for score in ("magnitude", "wanda", "flap", "eq8", "balanced"):
        table[f"channel_importance {score}"] = importance(score)
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.call_every_op", description=__doc__)
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
            error = difference(call(options.backend), references[name]("torch"))
            verdict = "ok" if error <= tolerance else "WRONG"
            wrong += verdict != "ok"
            print(f"{verdict} {name} {dtype} largest difference {error:.1e}", flush=True)
    if wrong:
        print(f"call_every_op: {wrong} results are wrong", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
