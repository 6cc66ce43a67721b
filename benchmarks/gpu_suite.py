"""Everything that one visit to a GPU needs, in steps that a lost connection cannot undo.

``python -m benchmarks.gpu_suite [--list | --dry-run] [--step NAME ...] [--out DIR] [--budget S]``

A step is one command with a time limit, and leaves ``DIR/NAME.json``. What matters most comes
first, and all limits together are 25 minutes. A step whose result is complete, of these sources and
this card, is not run again. After each step ``DIR/headline.md`` says what is known so far, and
``DIR/bundle.tar.gz`` holds all results. Exit code 0: all passed or were skipped for a reason; 1:
some failed or did not end; 2: no GPU, or bad arguments.

It needs a checkout and no installation: commands run with its root on the path.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cfsp.io.files import write_json

from . import report
from .common import environment
from .common.environment import anonymous
from .ops.tune import RESULTS, SWEEPS, TABLE, write_entry

ROOT = environment.ROOT
REHEARSAL_SECONDS = 470
STARTING_SECONDS = 15
"""What a step takes beside measuring: to import torch, to end what it is at."""
ENDING_SECONDS = 25
"""And what a sweep takes beside timing: the fastest has to pass the gate."""
TAIL_CHARACTERS = 6000
FINAL = ("passed", "failed")
MICRO_BATCH, EXPERTS = "llama-3-8b-8192", "qwen3-30b-a3b-8192"
CALLS = f"{MICRO_BATCH},llama-3-8b-1024,llama-3-8b-131072"
BENCHMARKS = {
    "swiglu-statistics": ("test_swiglu_statistics.py", CALLS, 50),
    "channel-statistics": ("test_channel_statistics.py", CALLS, 50),
    "block-influence": ("test_block_influence.py", CALLS, 40),
    "gram": ("test_gram.py", f"{MICRO_BATCH},llama-3-8b-1024,llama-3-8b-16384", 60),
    "channel-importance": ("test_channel_importance.py", MICRO_BATCH, 50),
    "gather": ("test_gather.py", MICRO_BATCH, 35),
    "experts": ("test_experts.py", EXPERTS, 50),
}
"""Step -> file, shapes in order of value, seconds."""
ALL_FILES = tuple(f"benchmarks/ops/{file}" for file, _, _ in BENCHMARKS.values())
TUNED = {
    "swiglu_statistics": 55,
    "channel_statistics": 50,
    "block_influence": 45,
    "gram_tma": 55,
    "gather_columns": 50,
    "row_sums": 45,
    "column_sums": 45,
}
"""Entry of the launch table -> seconds. The others are tuned when they are named."""
END_TO_END = (("llama-3-8b", 8, 110), ("llama-3-70b", 8, 470))
"""Model, blocks (all of them do not fit the disk of a rented machine) and seconds."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of the visit."""

    name: str
    purpose: str
    command: tuple[str, ...]
    limit: int
    variables: tuple[tuple[str, str], ...] = ()
    tool: str | None = None
    """A program that must be there, else the step is skipped."""
    path: str | None = None
    """A path below the repository that must be there, else the step is skipped."""
    package: str | None = None
    """A package that must be installed, else the step is skipped."""
    sources: tuple[str, ...] = ()
    """Folders, beside the kernels and benchmarks, whose change makes a result out of date."""
    scratch: Path | None = None
    """A folder that the command fills and that nobody needs afterwards."""
    after_tuning: bool = False
    """Whether it is skipped where tuning changed nothing."""
    headline: bool = False
    """Whether the headline table is printed after it."""
    extra: bool = False
    """Whether it runs only when it is named."""

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
    """The visit, in order of value; what was tuned is tested before it is measured."""
    interpreter = (("TRITON_INTERPRET", "1"), ("CFSP_BACKEND", "triton"))
    tests = Step(
        "device-tests",
        "correctness of every kernel on this card",
        _python("-m", "benchmarks.ops.device_tests", "--logs", str(out / "device-tests")),
        120,
        path="tests/kernels",
        sources=("tests/kernels",),
    )
    found = [
        Step(
            "environment",
            "card, driver, versions, clocks",
            _python("-m", "benchmarks.gpu_suite", "--describe", str(out / "described.json")),
            25,
        ),
        tests,
    ]

    def bench(
        name: str,
        purpose: str,
        files: Sequence[str],
        shapes: str,
        limit: int,
        **more: Any,
    ) -> Step:
        """Benchmarks that stop by themselves and save as they go."""
        seconds = (REHEARSAL_SECONDS if rehearsal else limit) - STARTING_SECONDS
        command = (
            *("-m", "pytest", *files, "--benchmark-only", "--benchmark-quiet", "-q"),
            *("--shapes", "tiny,tiny-experts" if rehearsal else shapes),
            *("--seconds", str(seconds), f"--benchmark-json={out / f'benchmark-{name}.json'}"),
            *("-p", "no:cacheprovider", *(("--threads", "1") if rehearsal else ())),
            # one file shows that the compiler is a rival; the others would take a minute each
            *(("-k", "not compile") if rehearsal and name != "channel-statistics" else ()),
        )
        variables = interpreter if rehearsal else ()
        return Step(f"bench-{name}", purpose, _python(*command), limit, variables, **more)

    for name, (file, shapes, limit) in BENCHMARKS.items():
        purpose = f"{file} beside its rivals, launched as the table has it"
        found.append(bench(name, purpose, [f"benchmarks/ops/{file}"], shapes, limit))
    found[-1] = dataclasses.replace(found[-1], headline=True)

    for model, blocks, limit in (("tiny", 2, 110),) if rehearsal else END_TO_END:
        name = f"{model}-{blocks}-blocks"
        found.append(
            Step(
                f"end-to-end-{name}",
                f"cfsp.prune on a random checkpoint of {blocks} blocks of the shapes of {model}",
                (
                    *_python("-m", "benchmarks.jobs.end_to_end", "--model", model),
                    *("--blocks", str(blocks), "--work", str(out / f"work-{name}")),
                    *("--json", str(out / f"result-{name}.json")),
                ),
                limit,
                package="transformers",
                sources=("cfsp",),
                scratch=out / f"work-{name}",
                extra=model == "llama-3-70b",
            )
        )
    calibration = bench(
        "calibration",
        "what calibration adds to a forward",
        ["benchmarks/jobs/test_calibration.py"],
        MICRO_BATCH,
        45,
        sources=("cfsp",),
    )
    found.append(calibration)

    every_op = _python("-m", "benchmarks.ops.call_every_op")
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
                90,
                # torch's caching allocator hides an overrun into a neighbour from the tool
                variables=interpreter if rehearsal else (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
                tool=None if rehearsal else sanitizer(),
            )
        )

    table = ("--table", str(out / "rehearsed_launch_configs.json"), "--rehearsal")
    for entry in sorted(SWEEPS, key=lambda entry: [*TUNED, entry].index(entry)):
        limit = TUNED.get(entry, 120)
        timed = ["--seconds", str(limit - ENDING_SECONDS)]
        if entry.startswith("gram"):  # the longest call of all is none of the product's
            timed += ["--shapes", f"{MICRO_BATCH},llama-3-70b-8192"]
        found.append(
            Step(
                tune_name(entry),
                f"launch configurations of {entry}",
                _python("-m", "benchmarks.ops.tune", "--op", entry, "--out", str(out))
                + (table if rehearsal else tuple(timed)),
                limit,
                path="cfsp_kernels/launch_configs.json",
                extra=entry not in TUNED,
            )
        )
    # only tests of the tuned table vouch for benchmarks of it
    logs = _python("-m", "benchmarks.ops.device_tests", "--logs", str(out / "device-tests-tuned"))
    found += [
        dataclasses.replace(
            tests, name="device-tests-tuned", command=logs, limit=95, after_tuning=True
        ),
        bench(
            "tuned",
            "every op again with the tuned table",
            ALL_FILES,
            f"{MICRO_BATCH},{EXPERTS}",
            115,
            after_tuning=True,
        ),
        bench(
            "llama-3-70b",
            "every op at the shapes of llama-3-70b",
            ALL_FILES,
            "llama-3-70b-8192",
            130,
        ),
    ]
    if not rehearsal:
        return found
    again = ("device-tests-tuned", "bench-llama-3-70b")  # they would be the same as others
    return [
        dataclasses.replace(step, limit=REHEARSAL_SECONDS)
        for step in found
        if step.name not in again
    ]


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none, or none that is whole."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def complete(step: Step, path: Path, described: dict[str, Any]) -> dict[str, Any] | None:
    """The result at ``path`` if ``step`` ended, with these sources, on this card; else None."""
    result = read(path)
    if result.get("status") not in FINAL:
        return None
    then = result.get("environment", {})
    same_card = all(then.get(key) == described[key] for key in ("machine", "driver"))
    same_sources = result.get("sources") == environment.sources_digest(*step.sources)
    return result if same_card and same_sources else None


def was_tuned(out: Path) -> bool:
    """Whether a sweep whose result is in ``out`` changed the table."""
    return any(read(sweep).get("written") for sweep in out.glob("tuning-*.json"))


def missing(step: Step, out: Path) -> str | None:
    """Why ``step`` cannot run here, or None."""
    if step.after_tuning and not was_tuned(out):
        return "tuning did not change the table"
    if step.tool is not None and shutil.which(step.tool) is None:
        return f"{Path(step.tool).name} is not installed"
    if step.path is not None and not (ROOT / step.path).exists():
        return f"{step.path} does not exist"
    if step.package is not None and importlib.util.find_spec(step.package) is None:
        return f"{step.package} is not installed"
    return None


def clear(step: Step) -> None:
    """Remove what the command of ``step`` leaves behind when it is killed."""
    if step.scratch is not None:
        shutil.rmtree(step.scratch, ignore_errors=True)


def execute(step: Step, out: Path) -> dict[str, Any]:
    """Run the command of ``step``; its status, return code, seconds and the end of its output."""
    reason = missing(step, out)
    if reason is not None:
        return {"status": "skipped", "reason": reason, "returncode": None, "wall_seconds": 0.0}
    clear(step)  # a run that was killed may have left its files
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = os.environ | dict(step.variables) | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
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
        output, _ = process.communicate(timeout=step.limit)
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
        "limit_seconds": step.limit,
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


def headline(out: Path) -> str:
    """What the results in ``out`` say so far, as markdown."""
    lines = ["| step | result | seconds |", "| --- | --- | ---: |"]
    ended = [result for result in map(read, out.glob("*.json")) if "step" in result]
    for result in sorted(ended, key=lambda result: result["started"]):
        told = result.get("reason", result["status"])
        lines.append(f"| {result['step']} | {told} | {result['wall_seconds']:.0f} |")
    for title, names in {"Before": BENCHMARKS, "After": ("tuned", "llama-3-70b")}.items():
        saved = [read(out / f"benchmark-{name}.json") for name in names]
        if any(saved):
            table = report.headline([result for result in saved if result])
            lines += ["", f"{title} tuning:", "", table]
    for entry in read(out / "benchmark-calibration.json").get("benchmarks", []):
        lines += ["", f"Calibration adds {entry['extra_info']['overhead']:.1%} to a plain forward."]
    for result in map(read, sorted(out.glob("result-*.json"))):
        if result.get("run"):
            model = f"{result['model']}, {result['shapes']['blocks']} blocks"
            tokens, seconds = result["calibration_tokens"], result["prune_seconds"]
            speed = f"then {result['forward_speedup']:.2f} times as fast"
            lines += ["", f"{model}, {tokens} tokens: pruned in {seconds:.1f} s, {speed}."]
    return "\n".join([*lines, ""])


def leave(out: Path, archive: Path) -> str:
    """Write the headline and one archive of all results, without owners; returns the headline."""
    known = headline(out)
    (out / "headline.md").write_text(known, "utf-8")

    def anonymously(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    partial = archive.with_name(archive.name + ".partial")
    with tarfile.open(partial, "w:gz") as tar:
        for path in sorted(out.rglob("*")):
            if path.is_file() and path not in (archive, partial):
                tar.add(path, path.relative_to(out), filter=anonymously)
    partial.replace(archive)
    return known


def run(
    chosen: Sequence[Step],
    out: Path,
    *,
    force: bool,
    retry: bool,
    budget: float,
    rehearsal: bool,
    archive: Path | None = None,
) -> int:
    """Run the steps that have no complete result; returns the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    archive = archive or out / "bundle.tar.gz"
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
        if deadline - time.monotonic() < step.limit:
            print(f"{heading}: not started, it may take {step.limit} s of the budget", flush=True)
            bad += 1
            continue
        print(f"{heading}: {step.shown()}", flush=True)
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        result = {
            "step": step.name,
            "purpose": step.purpose,
            "rehearsal": rehearsal,
            "command": anonymous(step.shown(), out),
            "started": started,
            "sources": environment.sources_digest(*step.sources),
            **execute(step, out),
            "environment": described,
        }
        write_json(goal, result)
        reason = f": {result['reason']}" if "reason" in result else ""
        print(f"    {result['status']} in {result['wall_seconds']:.1f} s{reason}", flush=True)
        if result["status"] not in ("passed", "skipped"):
            bad += 1
            print("    " + "\n    ".join(result["output_tail"].splitlines()[-15:]), flush=True)
        known = leave(out, archive)
        if step.headline:
            print(known, flush=True)
    print(leave(out, archive))
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
    parser.add_argument("--bundle", type=Path, help="the archive (default: bundle.tar.gz in --out)")
    parser.add_argument(
        "--budget",
        type=float,
        default=1e9,
        metavar="S",
        help="start no step that may end after S s",
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
    elif options.list:
        for step in chosen:
            print(f"{step.name:32} {step.purpose}{' (when named)' if step.extra else ''}")
        return 0
    else:
        chosen = [step for step in chosen if not step.extra]
    if options.dry_run:
        seconds = 0
        for step in chosen:
            seconds += step.limit
            print(f"# {step.name}, at most {step.limit} s, {seconds} s in all\n{step.shown()}")
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
        archive=options.bundle and options.bundle.resolve(),
    )


if __name__ == "__main__":
    raise SystemExit(main())
