"""Sweep launch configurations on a GPU and write the fastest to the package's table.

``python -m benchmarks.ops.tune [--op ENTRY ...] [--seconds 420]``

Every entry of ``cfsp_kernels/launch_configs.json`` that this file knows is swept at the shapes of
Llama-3-8B and 70B. A candidate is timed where the compile gate finds no fault in it, and counts
where it runs and its result agrees with that of the configuration in force; the best geometric mean
over the shapes that passes the gate in every variant wins, and replaces the one in force only when
it is faster by more than the noise.
The whole sweep is kept as JSON.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..common import environment
from ..common.shapes import SHAPES, Shape
from ..common.timing import DEVICE, ON_GPU, ColdCache, median_seconds

Config = dict[str, int]
TABLE = environment.ROOT / "cfsp_kernels" / "launch_configs.json"
RESULTS = environment.ROOT / "benchmarks" / "results"
LEAST_GAIN = 0.02  # below this a difference of medians is noise, and the table stays as it is
TOLERANCE = 2e-3
ROUNDS = 15
OUT_OF_TIME = "not reached: out of time"
REHEARSED_TARGET = "sm_90"
"""What the gate compiles for where there is no GPU."""
TUNING_SHAPES = ("llama-3-8b-8192", "llama-3-70b-8192", "llama-3-8b-131072")


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a launch configuration is timed on."""

    make_inputs: Callable[[Shape], Any]
    call: Callable[[Any], Any]
    digest: Callable[[Any], torch.Tensor]
    bytes_moved: Callable[[Any], int]
    clear: Callable[[Any], Any] = lambda inputs: inputs
    """The inputs with what a call adds to at zero."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Candidate values by parameter, which combinations make sense, and the workload."""

    values: dict[str, tuple[int, ...]]
    sensible: Callable[[Config], bool]
    workload: Callable[[], Workload]


def _of_benchmark(module: str, position: int = 0) -> Callable[[], Workload]:
    """The workload of a benchmark file, imported when used."""

    def load() -> Workload:
        import importlib

        spec = importlib.import_module(f"benchmarks.ops.{module}").BENCHMARKS[position]
        call = spec.implementations["cfsp"]
        return Workload(spec.make_inputs, call, spec.digest, spec.bytes_moved, spec.clear)

    return load


def _column_sums() -> Workload:
    from .test_channel_importance import make_inputs, ours

    return Workload(make_inputs, ours("wanda"), lambda score: score, lambda w: w.down.nbytes)


def _row_sums() -> Workload:
    from cfsp_kernels import channel_importance

    from .test_channel_importance import make_inputs

    return Workload(
        make_inputs,
        lambda w: channel_importance("magnitude", gate=w.gate, up=w.up),
        lambda score: score,
        lambda w: w.gate.nbytes + w.up.nbytes,
    )


def _fold_partials() -> Workload:
    from cfsp_kernels._partials import fold_partials

    def make_inputs(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        partials = torch.randn(max(1, shape.tokens // 256), 2, shape.intermediate, device=DEVICE)
        return partials, torch.zeros_like(partials[0], dtype=torch.float64)

    def call(inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        fold_partials(*inputs)
        return inputs[1]

    def clear(inputs: tuple[torch.Tensor, torch.Tensor]) -> Any:
        inputs[1].zero_()
        return inputs

    return Workload(make_inputs, call, torch.flatten, lambda inputs: inputs[0].nbytes, clear)


def _gram(form: str) -> Callable[[], Workload]:
    """One form of gram, whichever the op takes."""

    def load() -> Workload:
        from .test_gram import in_form

        workload = _of_benchmark("test_gram")()
        return dataclasses.replace(workload, call=lambda inputs: in_form(form, inputs))

    return load


def _gram_ragged() -> Workload:
    workload = _gram("tiles")()

    def make_inputs(shape: Shape) -> Any:
        # rows that do not start at 16-byte addresses
        return workload.make_inputs(dataclasses.replace(shape, intermediate=shape.intermediate - 7))

    return dataclasses.replace(workload, make_inputs=make_inputs)


def _gram_fp32() -> Workload:
    workload = _gram("tiles")()

    def make_inputs(shape: Shape) -> Any:
        fewer = min(shape.gram_tokens, 4096)
        return workload.make_inputs(
            dataclasses.replace(shape, dtype=torch.float32, gram_tokens=fewer)
        )

    return dataclasses.replace(workload, make_inputs=make_inputs)


def _tile(rows: str, columns: str, least: int, most: int) -> Callable[[Config], bool]:
    """Tiles of so many elements per thread: fewer leave loads idle, more spill registers."""

    def sensible(config: Config) -> bool:
        per_thread = config[rows] * config[columns] / (32 * config["num_warps"])
        return least <= per_thread <= most

    return sensible


def _fits(config: Config) -> bool:
    """A stage holds one tile of each operand in shared memory, of which an SM has 227 KiB."""
    stage = config["BLOCK_T"] * (config["BLOCK_M"] + config["BLOCK_N"]) * 2
    return (
        config["num_stages"] * stage <= 227 << 10
        and config["BLOCK_M"] * config["BLOCK_N"] / (32 * config["num_warps"]) <= 128
    )


SWEEPS: dict[str, Sweep] = {
    "channel_statistics": Sweep(
        {"BLOCK_T": (8, 16, 32, 64), "BLOCK_C": (64, 128, 256), "num_warps": (2, 4, 8)},
        _tile("BLOCK_T", "BLOCK_C", 8, 32),
        _of_benchmark("test_channel_statistics"),
    ),
    "swiglu_statistics": Sweep(
        {"BLOCK_T": (8, 16, 32), "BLOCK_C": (64, 128, 256), "num_warps": (2, 4, 8)},
        _tile("BLOCK_T", "BLOCK_C", 8, 32),
        _of_benchmark("test_swiglu_statistics"),
    ),
    "fold_partials": Sweep(
        {"BLOCK_C": (32, 64, 128, 256), "UNROLL": (4, 8, 16, 32), "num_warps": (1, 2, 4)},
        lambda config: config["BLOCK_C"] <= 64 * config["num_warps"],
        _fold_partials,
    ),
    "block_influence": Sweep(
        {"BLOCK_D": (256, 512, 1024, 2048, 4096, 8192), "num_warps": (1, 2, 4, 8, 16)},
        lambda config: 4 <= config["BLOCK_D"] / (32 * config["num_warps"]) <= 32,
        _of_benchmark("test_block_influence"),
    ),
    "column_sums": Sweep(
        {"BLOCK_R": (8, 16, 32, 64), "BLOCK_C": (64, 128, 256), "num_warps": (2, 4, 8)},
        _tile("BLOCK_R", "BLOCK_C", 8, 32),
        _column_sums,
    ),
    "row_sums": Sweep(
        {"BLOCK_R": (1, 2, 4, 8), "BLOCK_C": (256, 512, 1024, 2048), "num_warps": (2, 4, 8)},
        _tile("BLOCK_R", "BLOCK_C", 8, 32),
        _row_sums,
    ),
    "gather_columns": Sweep(
        {"BLOCK_R": (1, 2, 4, 8), "BLOCK_K": (256, 512, 1024, 2048), "num_warps": (2, 4, 8)},
        _tile("BLOCK_R", "BLOCK_K", 4, 32),
        _of_benchmark("test_gather", 1),
    ),
    "gram": Sweep(
        {
            "BLOCK_M": (128,),
            "BLOCK_N": (128, 256),
            "BLOCK_T": (32, 64, 128),
            "GROUP": (4, 8, 16),
            "num_warps": (4, 8),
            "num_stages": (3, 4),
        },
        _fits,
        _gram("tiles"),
    ),
    "gram_tma": Sweep(
        {
            "BLOCK_M": (128,),
            "BLOCK_N": (128, 256),
            "BLOCK_T": (32, 64, 128),
            "num_warps": (4, 8),
            "num_stages": (3, 4, 6),
        },
        _fits,
        _gram("tma"),
    ),
    "gram_ragged": Sweep(
        {
            "BLOCK_M": (64, 128),
            "BLOCK_N": (64, 128),
            "BLOCK_T": (32, 64),
            "GROUP": (8,),
            "num_warps": (4, 8),
            "num_stages": (2, 3),
        },
        _tile("BLOCK_M", "BLOCK_N", 0, 64),
        _gram_ragged,
    ),
    "gram_fp32": Sweep(
        {
            "BLOCK_M": (64, 128),
            "BLOCK_N": (64, 128),
            "BLOCK_T": (16, 32),
            "GROUP": (8,),
            "num_warps": (4, 8),
            "num_stages": (2, 3),
        },
        _tile("BLOCK_M", "BLOCK_N", 0, 64),
        _gram_fp32,
    ),
}


def candidates(entry: str, in_force: Config) -> list[Config]:
    """Configurations to try, the one in force first.

    Raises:
        ValueError: the kernel's parameters are not those that the sweep knows.
    """
    sweep = SWEEPS[entry]
    unknown = set(sweep.values) ^ set(in_force)
    if unknown:
        raise ValueError(f"{entry}: table and sweep differ in {', '.join(sorted(unknown))}")
    found = [dict(in_force)]
    for values in itertools.product(*sweep.values.values()):
        config = dict(zip(sweep.values, values, strict=True))
        if config != in_force and sweep.sensible(config):
            found.append(config)
    return found


def gate(
    entry: str, target: str, configs: Sequence[Config], *, first: bool = False
) -> list[list[str]]:
    """What the compile gate finds wrong with each configuration in all that may be launched with
    it, or in the first of these; in a process of its own, since this one may have Triton's
    interpreter, and since the gate compiles several at a time.

    Raises:
        CalledProcessError: the gate itself failed.
    """
    command = ["-m", "benchmarks.ops.compile_gate", "--candidates", entry, "--target", target]
    command += ["--first"] if first else []
    found = subprocess.run(
        [sys.executable, *command],
        cwd=environment.ROOT,
        input=json.dumps(configs),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(found.stdout)


@contextmanager
def in_table(entry: str, arch: str, config: Config) -> Iterator[None]:
    """Launch ``entry`` with ``config`` in the body; the package's table is as before afterwards."""
    from cfsp_kernels._configs import config_table

    entries = config_table()[entry]
    before = dict(entries)
    entries[arch] = config
    try:
        yield
    finally:
        entries.clear()
        entries.update(before)


def _time(
    workload: Workload, inputs: Any, expected: torch.Tensor | None, rounds: int, cold: ColdCache
) -> tuple[float, torch.Tensor]:
    """Median seconds and the digest. Raises ValueError where the result differs."""
    digest = workload.digest(workload.call(workload.clear(inputs))).double().clone()
    if expected is not None:
        scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        error = float((digest - expected).abs().max() / scale)
        if not error <= TOLERANCE:
            raise ValueError(f"result differs by {error:.1e}")
    return median_seconds(lambda: workload.call(inputs), cold, rounds), digest


def sweep_entry(
    entry: str, arch: str, shapes: Sequence[Shape], rounds: int, deadline: float, limit: int | None
) -> dict[str, Any]:
    """Time every candidate that passes the gate at every shape and say which to use."""
    from cfsp_kernels._configs import config_for

    in_force, *others = candidates(entry, config_for(entry, arch))[:limit]
    trials: list[dict[str, Any]] = [
        {"config": config, "seconds": {}, "gigabytes_per_second": {}, "error": None}
        for config in (in_force, *others)
    ]
    target = arch if ON_GPU else REHEARSED_TARGET
    for trial, found in zip(trials[1:], gate(entry, target, others, first=True), strict=True):
        if found:
            trial["error"] = f"compile gate: {', '.join(found)}"
    workload, cold = SWEEPS[entry].workload(), ColdCache()
    torch.manual_seed(0)
    inputs = {shape.name: workload.make_inputs(shape) for shape in shapes}
    expected: dict[str, torch.Tensor] = {}
    for trial in trials:
        if trial["error"] is None and time.monotonic() > deadline and expected:
            trial["error"] = OUT_OF_TIME
        if trial["error"] is not None:
            continue
        try:
            for name, given in inputs.items():
                with in_table(entry, arch, trial["config"]):
                    seconds, digest = _time(workload, given, expected.get(name), rounds, cold)
                expected.setdefault(name, digest)
                trial["seconds"][name] = seconds
                rate = workload.bytes_moved(given) / seconds / 1e9
                trial["gigabytes_per_second"][name] = rate
        # A candidate may ask for more registers or shared memory than there are, or fail in the
        # compiler; each is a result of the sweep. The one in force has to run.
        except Exception as error:
            if trial is trials[0]:
                raise
            first_line = (str(error).strip() or "no message").splitlines()[0]
            trial["error"] = f"{type(error).__name__}: {first_line[:200]}"
        # a sweep that is killed leaves these lines
        times = ", ".join(f"{name} {s * 1e3:.4g} ms" for name, s in trial["seconds"].items())
        print(f"{trial['config']}: {trial['error'] or times}", flush=True)
    names = [shape.name for shape in shapes]
    return choose(entry, trials, names, lambda config: gate(entry, target, [config])[0])


def choose(
    entry: str,
    trials: list[dict[str, Any]],
    shapes: Sequence[str],
    faults: Callable[[Config], Sequence[str]] = lambda config: (),
) -> dict[str, Any]:
    """The fastest configuration by geometric mean over ``shapes`` that has no ``faults``; the first
    is in force."""
    base = trials[0]["seconds"]
    for trial in trials:
        if trial["error"] is None:
            logs = [math.log(trial["seconds"][name] / base[name]) for name in shapes]
            trial["relative_time"] = math.exp(sum(logs) / len(logs))
    ran = [trial for trial in trials if trial["error"] is None]
    for best in sorted(ran, key=lambda trial: trial["relative_time"]):
        if best["relative_time"] > 1 - LEAST_GAIN:
            best = trials[0]
            break
        found = faults(best["config"])
        if not found:
            break
        best["error"] = f"compile gate: {', '.join(found)}"
    return {
        "entry": entry,
        "chosen": best["config"],
        "in_force": trials[0]["config"],
        "relative_time": best["relative_time"],
        "complete": not any(trial["error"] == OUT_OF_TIME for trial in trials),
        "trials": trials,
    }


def dump_table(table: dict[str, dict[str, Config]]) -> str:
    """The table as JSON, one configuration a line."""
    ops = []
    for op in sorted(table):
        lines = [f'    "{arch}": {json.dumps(config)}' for arch, config in table[op].items()]
        ops.append(f'  "{op}": {{\n' + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(ops) + "\n}\n"


def write_entry(path: Path, entry: str, arch: str, config: Config) -> bool:
    """Put ``config`` into the table at ``path``, unless its default says the same already."""
    table = json.loads(path.read_text("utf-8"))
    entries = table.setdefault(entry, {})
    if entries.get(arch, entries.get("default")) == config:
        return False
    entries[arch] = config
    partial = path.with_suffix(".json.partial")
    partial.write_text(dump_table(table), "utf-8")
    partial.replace(path)
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops.tune", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--op", action="append", help=f"one of {', '.join(SWEEPS)}; default all")
    parser.add_argument("--seconds", type=float, default=420, help="time limit for each entry")
    parser.add_argument("--shapes", default=",".join(TUNING_SHAPES), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed calls per candidate")
    parser.add_argument("--limit", type=int, help="try only so many candidates")
    parser.add_argument("--table", type=Path, default=TABLE, help="the table to write")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the sweeps' JSON")
    parser.add_argument(
        "--rehearsal",
        action="store_true",
        help="two candidates at a tiny shape under Triton's interpreter, to test this program",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.rehearsal:
        if options.table.resolve() == TABLE.resolve():
            parser.error("--rehearsal needs --table: its timings must not reach the package")
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CFSP_BACKEND"] = "triton"
        options.shapes, options.rounds, options.limit = "tiny", 1, 2
    elif not ON_GPU:
        print("tune: no GPU is available; timings elsewhere mean nothing", file=sys.stderr)
        return 2
    if unknown := sorted(set(options.shapes.split(",")) - set(SHAPES)):
        parser.error(f"--shapes: unknown {', '.join(unknown)}")
    from cfsp_kernels._configs import config_table

    entries = options.op or sorted(config_table())
    if unknown := sorted(set(entries) - (set(SWEEPS) & set(config_table()))):
        print(f"tune: no sweep or no table entry for {', '.join(unknown)}", file=sys.stderr)
        return 2

    # under the interpreter tensors are on the CPU, which has the default configuration
    arch = environment.arch() if ON_GPU else "default"
    shapes = [SHAPES[name] for name in options.shapes.split(",")]
    options.out.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        start = time.monotonic()
        deadline = start + options.seconds
        try:
            result = sweep_entry(entry, arch, shapes, options.rounds, deadline, options.limit)
        except ValueError as error:
            print(f"tune: {error}", file=sys.stderr)
            return 2
        result["arch"], result["wall_seconds"] = arch, time.monotonic() - start
        result["environment"] = environment.describe()
        result["written"] = write_entry(options.table, entry, arch, result["chosen"])
        if options.table.parent.resolve() != options.out.resolve():
            # beside the sweeps as well, for a machine of which only the results come back
            shutil.copyfile(options.table, options.out / "launch_configs.json")
        goal = options.out / f"tuning-{arch}-{entry}.json"
        goal.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        failed = sum(trial["error"] is not None for trial in result["trials"])
        print(
            f"{entry} {arch}: {result['chosen']}, {result['relative_time']:.3f} of the time of "
            f"{result['in_force']}; {len(result['trials'])} candidates, {failed} without a time",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
