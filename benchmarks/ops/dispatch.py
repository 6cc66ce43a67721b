"""Host time of every public call, from Python to the launch, which does nothing. Needs no GPU.

``python -m benchmarks.ops.dispatch [--against REV] [--rounds N] [--json RESULT.json]``

Triton's JIT is real and its launcher is not (``fake_device``), so what is left is what a CPU does
before a kernel starts. With ``--against``, the kernels of another commit are measured in turns
with these, in processes of their own. Ratios count: the microseconds are this machine's.
"""

import argparse
import inspect
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..common import environment
from ..common.results import write_result

TOKENS, HIDDEN, INTERMEDIATE = 16, 64, 128  # small: torch's own work on the CPU is not of interest
CALLS, LOOPS = 100, 15
BARE = "(a bare torch op)"
Times = dict[str, float]


def calls() -> dict[str, Callable[[], Any]]:
    """Every public call by name, those with newer arguments where this version has them."""
    import cfsp_kernels as kernels

    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).bfloat16()

    x, gate, up = (random(TOKENS, INTERMEDIATE) for _ in range(3))
    before, after = random(TOKENS, HIDDEN), random(TOKENS, HIDDEN)
    weights = {
        "gate": random(INTERMEDIATE, HIDDEN),
        "up": random(INTERMEDIATE, HIDDEN),
        "down": random(HIDDEN, INTERMEDIATE),
        "norms": torch.rand(INTERMEDIATE),
    }
    totals = torch.zeros(2, INTERMEDIATE, dtype=torch.float64)
    influence = torch.zeros(4, dtype=torch.float64)
    triangle = torch.zeros(INTERMEDIATE, INTERMEDIATE)
    index = torch.arange(0, INTERMEDIATE, 2, dtype=torch.int32)
    kept = random(HIDDEN, INTERMEDIATE // 2)
    accumulator = kernels.ChannelAccumulator()
    table: dict[str, Callable[[], Any]] = {
        BARE: lambda: influence.add_(1),
        "channel_statistics": lambda: kernels.channel_statistics(x),
        "ChannelAccumulator.update": lambda: accumulator.update(x),
        "swiglu_statistics": lambda: kernels.swiglu_statistics(gate, up),
        "block_influence": lambda: kernels.block_influence(before, after),
        "gram(out=)": lambda: kernels.gram(x, out=triangle),
        "gather_columns(out=)": lambda: kernels.gather_columns(weights["down"], index, out=kept),
        "channel_importance wanda": lambda: kernels.channel_importance("wanda", **weights),
        "channel_importance balanced": lambda: kernels.channel_importance("balanced", **weights),
    }
    newer: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
        "channel_statistics(totals=)": (
            kernels.channel_statistics,
            lambda: kernels.channel_statistics(x, totals=totals),
        ),
        "swiglu_statistics(totals=)": (
            kernels.swiglu_statistics,
            lambda: kernels.swiglu_statistics(gate, up, totals=totals),
        ),
        "block_influence(out=)": (
            kernels.block_influence,
            lambda: kernels.block_influence(before, after, out=influence),
        ),
    }
    for name, (op, call) in newer.items():
        if name.partition("(")[2].removesuffix("=)") in inspect.signature(op).parameters:
            table[name] = call
    return table


def measure() -> Times:
    """Least microseconds of every call here and now, out of several loops over each in turns."""
    from .fake_device import fake_device

    torch.set_num_threads(1)
    best: Times = {}
    with fake_device("sm_90"):
        table = calls()
        for call in table.values():
            call()  # compiles
        for _ in range(LOOPS):
            for name, call in table.items():
                start = time.process_time()
                for _ in range(CALLS):
                    call()
                passed = (time.process_time() - start) / CALLS * 1e6
                best[name] = min(best.get(name, passed), passed)
    return best


WORKER = """
import json, pathlib, sys
sys.path[:0] = sys.argv[1:]
import cfsp_kernels
from benchmarks.ops.dispatch import measure
assert pathlib.Path(cfsp_kernels.__file__).parents[1].samefile(sys.argv[1])
print(json.dumps(measure()))
"""


def measure_in(folder: Path) -> Times:
    """:func:`measure` in a process of its own, of the ``cfsp_kernels`` that lies in ``folder``."""
    result = subprocess.run(
        [sys.executable, "-c", WORKER, str(folder), str(environment.ROOT)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(result.stderr[-4000:])
    return json.loads(result.stdout)


def measure_in_turns(folders: Sequence[Path], rounds: int) -> list[Times]:
    """:func:`measure_in` of every folder in each round; the least of the rounds of each."""
    found = [[measure_in(folder) for folder in folders] for _ in range(rounds)]
    return [
        {name: min(times[name] for times in of_one) for name in of_one[0]}
        for of_one in zip(*found, strict=True)
    ]


def extract(revision: str, folder: Path) -> None:
    """``cfsp_kernels`` of a commit, into ``folder``."""
    command = ["git", "-C", str(environment.ROOT), "archive", revision, "cfsp_kernels"]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")


def table(now: Times, then: Times | None, revision: str | None) -> str:
    """A line for every call: microseconds, and where there is another version its and the ratio."""
    width = max(map(len, now))
    lines = [f"{'host microseconds':{width}}  {'now':>7}"]
    if then is not None:
        lines[0] += f"  {revision:>12}  ratio"
    for name, value in now.items():
        line = f"{name:{width}}  {value:7.1f}"
        if then is not None and name in then:
            line += f"  {then[name]:12.1f}  {value / then[name]:5.2f}"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops.dispatch", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--against", metavar="REV", help="a commit to measure beside this tree")
    parser.add_argument("--rounds", type=int, default=5, help="processes for each version")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as other:
        folders = [environment.ROOT]
        if options.against:
            extract(options.against, Path(other))
            folders.append(Path(other))
        now, *then = measure_in_turns(folders, options.rounds)
    print(table(now, then[0] if then else None, options.against))
    if options.json:
        result = {
            "environment": environment.describe(),
            "rounds": options.rounds,
            "microseconds": now,
            "against": {"revision": options.against, "microseconds": then[0]} if then else None,
        }
        write_result(options.json, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
