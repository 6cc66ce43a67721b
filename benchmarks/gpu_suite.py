"""Everything that one visit to a GPU needs, in steps that a lost connection cannot undo.

``python -m benchmarks.gpu_suite [--list | --dry-run] [--step NAME ...] [--out DIR] [--budget S]``

A step is one command with a time limit below eight minutes, and leaves ``DIR/NAME.json``. A step
whose result is complete, of these sources and this card, is not run again. Exit code 0: all
passed or were skipped for a reason; 1: some failed or did not end; 2: no GPU, or bad arguments.
"""

import argparse
import dataclasses
import datetime
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import environment
from .tune import RESULTS, SWEEPS, TABLE, write_entry

ROOT = environment.ROOT
LIMIT_SECONDS = 470
TAIL_CHARACTERS = 6000
FINAL = ("passed", "failed", "skipped")
BENCHMARK_FILES = {
    "channel-statistics": "test_channel_statistics.py",
    "swiglu-statistics": "test_swiglu_statistics.py",
    "block-influence": "test_block_influence.py",
    "channel-importance": "test_channel_importance.py",
    "gram": "test_gram.py",
    "gather": "test_gather.py",
}
END_TO_END = (("llama-3-8b", 32), ("llama-3-70b", 8))
"""Model and blocks: 80 of the larger one do not fit the disk of a rented machine."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of the visit."""

    name: str
    purpose: str
    command: tuple[str, ...]
    limit: int = LIMIT_SECONDS
    variables: tuple[tuple[str, str], ...] = ()
    tool: str | None = None
    """A program that must be there, else the step is skipped."""
    path: str | None = None
    """A path below the repository that must be there, else the step is skipped."""
    sources: tuple[str, ...] = ()
    """Folders, beside the kernels and benchmarks, whose change makes a result out of date."""
    scratch: Path | None = None
    """A folder that the command fills and that nobody needs afterwards."""

    def shown(self) -> str:
        """The command as one would type it."""
        variables = [f"{name}={value}" for name, value in self.variables]
        command = ["python" if part == sys.executable else part for part in self.command]
        return " ".join([*variables, shlex.join(command)])


def _python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def tune_name(entry: str) -> str:
    """The step that tunes ``entry``."""
    return f"tune-{entry.replace('_', '-')}"


def sanitizer() -> str:
    """compute-sanitizer on the path or where CUDA puts it; the bare name where it is absent."""
    usual = "/usr/local/cuda/bin/compute-sanitizer"
    return shutil.which("compute-sanitizer") or (
        usual if Path(usual).exists() else "compute-sanitizer"
    )


def steps(out: Path, rehearsal: bool = False) -> list[Step]:
    """The visit, in order of what a later step relies on."""
    interpreter = (("TRITON_INTERPRET", "1"), ("CFSP_BACKEND", "triton"))
    found = [
        Step(
            "environment",
            "card, driver, versions",
            _python("-m", "benchmarks.gpu_suite", "--describe", str(out / "described.json")),
            120,
        ),
        Step(
            "device-tests",
            "correctness of every kernel on this card",
            _python("-m", "pytest", "tests/kernels", "-q", "--benchmark-disable")
            + (("--collect-only",) if rehearsal else ()),
            path="tests/kernels",
            sources=("tests/kernels",),
        ),
    ]
    every_op = _python("-m", "benchmarks.call_every_op")
    for tool in ("memcheck", "racecheck"):
        # racecheck replays every access to shared memory: one dtype keeps it below the limit
        dtypes = ("--dtypes", "bfloat16,float32" if tool == "memcheck" else "bfloat16")
        watch = (sanitizer(), "--tool", tool, "--error-exitcode", "9")
        found.append(
            Step(
                f"sanitizer-{tool}",
                f"compute-sanitizer {tool} over every op at small shapes",
                (*every_op, "--dtypes", "float32")
                if rehearsal
                else (*watch, *every_op, *dtypes, "--backend", "triton"),
                # torch's caching allocator hides an overrun into a neighbour from the tool
                variables=interpreter if rehearsal else (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
                tool=None if rehearsal else sanitizer(),
            )
        )
    table = ("--table", str(out / "rehearsed_launch_configs.json"), "--rehearsal")
    for entry in SWEEPS:
        found.append(
            Step(
                tune_name(entry),
                f"launch configurations of {entry}",
                _python("-m", "benchmarks.tune", "--op", entry, "--out", str(out))
                + (table if rehearsal else ("--seconds", str(LIMIT_SECONDS - 80))),
                path="cfsp_kernels/launch_configs.json",
            )
        )
    for name, file in BENCHMARK_FILES.items():
        shapes = ("tiny",) if rehearsal else ("llama-3-8b", "llama-3-70b")
        for shape in shapes:
            goal = out / f"benchmark-{name}-{shape}.json"
            found.append(
                Step(
                    f"bench-{name}-{shape}",
                    f"{file} beside its rivals at {shape}",
                    _python("-m", "pytest", f"benchmarks/{file}", "--benchmark-only", "-q")
                    + ("--shapes", shape, f"--benchmark-json={goal}", "-p", "no:cacheprovider")
                    + (("-k", "not compile") if rehearsal else ()),
                    variables=interpreter if rehearsal else (),
                )
            )
    # tuning has changed what is launched: only tests of the tuned table vouch for the benchmarks
    found.append(dataclasses.replace(found[1], name="device-tests-tuned"))
    for model, blocks in (("tiny", 2),) if rehearsal else END_TO_END:
        name = f"{model}-{blocks}-blocks"
        found.append(
            Step(
                f"end-to-end-{name}",
                f"cfsp.prune on a random checkpoint of {blocks} blocks of the shapes of {model}",
                (
                    *_python("-m", "benchmarks.end_to_end", "--model", model),
                    *("--blocks", str(blocks), "--work", str(out / f"work-{name}")),
                    *("--json", str(out / f"result-{name}.json")),
                ),
                sources=("cfsp",),
                scratch=out / f"work-{name}",
            )
        )
    return found


def complete(step: Step, path: Path, described: dict[str, Any]) -> dict[str, Any] | None:
    """The result at ``path`` if ``step`` ended, with these sources, on this card; else None."""
    try:
        result = json.loads(path.read_text("utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    if not isinstance(result, dict) or result.get("status") not in FINAL:
        return None
    then = result.get("environment", {})
    same_card = all(then.get(key) == described[key] for key in ("machine", "driver"))
    same_sources = result.get("sources") == environment.sources_digest(*step.sources)
    return result if same_card and same_sources else None


def missing(step: Step) -> str | None:
    """Why ``step`` cannot run here, or None."""
    if step.tool is not None and shutil.which(step.tool) is None:
        return f"{Path(step.tool).name} is not installed"
    if step.path is not None and not (ROOT / step.path).exists():
        return f"{step.path} does not exist"
    return None


def anonymous(text: str, out: Path | None = None) -> str:
    """``text`` without where this checkout, its interpreter and the results lie."""
    places = {str(ROOT): ".", sys.prefix: "<python>", sys.base_prefix: "<python>"}
    if out is not None and ROOT not in out.parents:
        places[str(out)] = "OUT"
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, places[place])
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def clear(step: Step) -> None:
    """Remove what the command of ``step`` leaves behind when it is killed."""
    if step.scratch is not None:
        shutil.rmtree(step.scratch, ignore_errors=True)


def execute(step: Step, limit: float, out: Path | None = None) -> dict[str, Any]:
    """Run the command of ``step``; its status, return code, seconds and the end of its output."""
    reason = missing(step)
    if reason is not None:
        return {"status": "skipped", "reason": reason, "returncode": None, "wall_seconds": 0.0}
    clear(step)  # a run that was killed may have left its files
    variables = os.environ | dict(step.variables) | {"PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        code: int | None = process.returncode
        status = "passed" if code == 0 else "failed"
    except subprocess.TimeoutExpired:
        # its children hold the GPU and the pipe: the whole group has to go
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        code, status = None, "out of time"
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    finally:
        clear(step)
    output = anonymous(output, out)
    return {
        "status": status,
        "returncode": code,
        "wall_seconds": time.monotonic() - start,
        "limit_seconds": limit,
        "output_tail": output[-TAIL_CHARACTERS:],
    }


def restore_tuning(step: Step, out: Path) -> None:
    """Put what ``step`` tuned on an earlier visit into the table of a fresh checkout."""
    for entry in SWEEPS:
        kept = out / f"tuning-{environment.arch()}-{entry}.json"
        if step.name == tune_name(entry) and kept.exists():
            write_entry(
                TABLE, entry, environment.arch(), json.loads(kept.read_text("utf-8"))["chosen"]
            )


def run(
    chosen: Sequence[Step], out: Path, *, force: bool, retry: bool, budget: float, rehearsal: bool
) -> int:
    """Run the steps that have no complete result; returns the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    if rehearsal and TABLE.exists():
        shutil.copyfile(TABLE, out / "rehearsed_launch_configs.json")
    described = environment.describe()
    del described["sources"]  # each step has its own
    deadline = time.monotonic() + budget
    bad = 0
    for number, step in enumerate(chosen, 1):
        heading = f"[{number}/{len(chosen)}] {step.name}"
        goal = out / f"{step.name}.json"
        earlier = None if force else complete(step, goal, described)
        if earlier is not None and not (retry and earlier["status"] == "failed"):
            bad += earlier["status"] == "failed"
            print(f"{heading}: {earlier['status']} earlier, not run again", flush=True)
            if not rehearsal:
                restore_tuning(step, out)
            continue
        left = deadline - time.monotonic()
        if left < 20:
            print(f"{heading}: not started, the budget of {budget:.0f} s is spent", flush=True)
            bad += 1
            continue
        print(f"{heading}: {step.shown()}", flush=True)
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        result = {
            "step": step.name,
            "purpose": step.purpose,
            "rehearsal": rehearsal,
            "command": anonymous(step.shown(), out),
            "started": started,
            "sources": environment.sources_digest(*step.sources),
            **execute(step, min(step.limit, left), out),
            "environment": described,
        }
        partial = goal.with_suffix(".json.partial")
        partial.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        partial.replace(goal)
        reason = f": {result['reason']}" if "reason" in result else ""
        print(f"    {result['status']} in {result['wall_seconds']:.1f} s{reason}", flush=True)
        if result["status"] not in ("passed", "skipped"):
            bad += 1
            print("    " + "\n    ".join(result["output_tail"].splitlines()[-15:]), flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} steps passed or were skipped; results in {out}")
    return 1 if bad else 0


def default_out(rehearsal: bool) -> Path:
    """One folder per card."""
    if rehearsal:
        return RESULTS / "rehearsal"
    card = re.sub(r"[^a-z0-9]+", "-", environment.machine().lower()).strip("-")
    return RESULTS / f"{environment.arch()}-{card}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--list", action="store_true", help="names and purposes of the steps")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    parser.add_argument("--step", action="append", metavar="NAME", help="only this one; repeatable")
    parser.add_argument("--out", type=Path, help="folder of the results (default: one per card)")
    parser.add_argument("--force", action="store_true", help="run complete steps again")
    parser.add_argument("--retry-failed", action="store_true", help="run failed steps again")
    parser.add_argument(
        "--budget", type=float, default=1e9, metavar="S", help="start no step after S seconds"
    )
    parser.add_argument(
        "--cpu-rehearsal",
        action="store_true",
        help="every step at tiny shapes under Triton's interpreter: proves the plumbing only",
    )
    parser.add_argument("--describe", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.describe:
        text = json.dumps(environment.describe(), indent=1)
        options.describe.write_text(text + "\n", "utf-8")
        print(text)
        return 0
    rehearsal = options.cpu_rehearsal
    out = (options.out or default_out(rehearsal)).resolve()
    chosen = steps(out, rehearsal)
    if options.step:
        by_name = {step.name: step for step in chosen}
        if unknown := [name for name in options.step if name not in by_name]:
            parser.error(f"--step: unknown {', '.join(unknown)}; --list names them")
        chosen = [by_name[name] for name in options.step]
    if options.list:
        for step in chosen:
            print(f"{step.name:32} {step.purpose}")
        return 0
    if options.dry_run:
        for step in chosen:
            print(f"# {step.name}, at most {step.limit} s\n{step.shown()}")
        return 0
    if not rehearsal and not torch.cuda.is_available():
        print(
            "gpu_suite: no GPU is available; --list and --dry-run show the steps, "
            "--cpu-rehearsal runs them at tiny shapes",
            file=sys.stderr,
        )
        return 2
    return run(
        chosen,
        out,
        force=options.force,
        retry=options.retry_failed,
        budget=options.budget,
        rehearsal=rehearsal,
    )


if __name__ == "__main__":
    raise SystemExit(main())
