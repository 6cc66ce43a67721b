"""Feed damaged inputs to every reader, in processes of bounded memory and time, and count."""

import faulthandler
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cfsp.errors import CfspError

from .targets import Target, WrongAccepted, every_target

MOST_SECONDS = 20
MOST_BYTES = 2 << 30
"""Of the process that reads: what it held before is 0.7 GB, of PyTorch and transformers."""
SHRINKING_SECONDS = 20
PART = 200
"""Inputs that a process reads at least."""
ROOT = str(Path(__file__).resolve().parents[2] / "cfsp")


class Hang(BaseException):
    """An input took too long; no reader may catch it."""


@dataclass
class Fault:
    """An input that was neither refused in one line nor rightly accepted."""

    kind: str
    number: int
    data: bytes
    trace: str


@dataclass
class Row:
    """What became of the inputs of one target."""

    inputs: int = 0
    refused: int = 0
    accepted: int = 0
    tracebacks: int = 0
    wrong: int = 0
    slowest: float = 0.0
    peak: int = 0
    """Bytes that the process held at most."""
    faults: dict[str, Fault] = field(default_factory=dict)
    """The first of every kind."""

    def add(self, other: "Row") -> None:
        for name in ("inputs", "refused", "accepted", "tracebacks", "wrong"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.slowest, self.peak = max(self.slowest, other.slowest), max(self.peak, other.peak)
        self.faults = {**other.faults, **self.faults}


def input_of(target: Target, seed: int, number: int) -> bytes:
    """The input of a number, the same wherever it is made."""
    return target.make(random.Random(f"{seed}/{target.name}/{number}"))


def _alarm(*_: object) -> None:
    raise Hang


def outcome_of(target: Target, data: bytes, folder: Path) -> tuple[str, str]:
    """ "refused", "accepted", "traceback" or "wrong"; and of the last two kind and trace."""
    before = signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    faulthandler.dump_traceback_later(3 * MOST_SECONDS, exit=True)
    try:
        target.judge(target.read(data, folder), data, folder)
        return "accepted", ""
    except CfspError as error:
        if "\n" in str(error) or len(str(error)) > 5000:
            return "wrong", f"an error of several or endless lines: {str(error)[:200]!r}"
        return "refused", ""
    except WrongAccepted as error:
        return "wrong", str(error)
    except SystemExit as error:
        return ("refused", "") if error.code == 2 else ("traceback", f"SystemExit {error.code}")
    except (Exception, Hang) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename.startswith(ROOT)] or frames
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
        return "traceback", f"{type(error).__name__} in {own[-1].name} ({place})\n" + "".join(
            traceback.format_exception(error, limit=-6)
        )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def _limit_memory() -> None:
    with open("/proc/self/statm") as stream:
        held = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MOST_BYTES, resource.RLIM_INFINITY))


def isolated(target: Target, data: bytes, folder: Path) -> tuple[str, str]:
    """:func:`outcome_of` in a process of its own, which may crash."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _limit_memory()
        try:
            with os.fdopen(writer, "wb") as stream:
                pickle.dump(outcome_of(target, data, folder), stream)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    if answer:
        return pickle.loads(answer)
    return "traceback", f"the process ended with status {status}"


def _shrunk(target: Target, data: bytes, kind: str, folder: Path) -> bytes:
    """A smaller input of the same fault, by leaving out parts."""
    run = isolated if target.isolated else outcome_of
    end, size = time.monotonic() + SHRINKING_SECONDS, len(data) // 2
    while size and time.monotonic() < end:
        at = 0
        while at < len(data) and time.monotonic() < end:
            smaller = data[:at] + data[at + size :]
            if run(target, smaller, folder)[1].partition("\n")[0] == kind:
                data = smaller
            else:
                at += size
        size //= 2
    return data


def run_share(target: Target, numbers: Iterable[int], seed: int, folder: Path) -> Row:
    """The row of these numbers."""
    row, run = Row(), isolated if target.isolated else outcome_of
    for number in numbers:
        data = input_of(target, seed, number)
        begun = time.monotonic()
        what, trace = run(target, data, folder)
        row.slowest = max(row.slowest, time.monotonic() - begun)
        row.inputs += 1
        name = {"traceback": "tracebacks"}.get(what, what)
        setattr(row, name, getattr(row, name) + 1)
        kind = trace.partition("\n")[0]
        if trace and kind not in row.faults:
            row.faults[kind] = Fault(kind, number, data, trace)
    for fault in row.faults.values():
        fault.data = _shrunk(target, fault.data, fault.kind, folder)
    whose = resource.RUSAGE_CHILDREN if target.isolated else resource.RUSAGE_SELF
    row.peak = resource.getrusage(whose).ru_maxrss * 1024
    return row


def _child(job: tuple[str, range, int, Path], answer: Connection) -> None:
    name, numbers, seed, folder = job
    null = os.open(os.devnull, os.O_WRONLY)  # what the libraries print; the parent prints the table
    os.dup2(null, 1)
    os.dup2(null, 2)
    _limit_memory()
    own = Path(tempfile.mkdtemp(dir=folder))
    (target,) = (target for target in every_target(folder) if target.name == name)
    answer.send(run_share(target, numbers, seed, own))


def _in_child(job: tuple[str, range, int, Path]) -> Row:
    """The row of a job, in a process of its own; where that dies, its input is a fault."""
    context = get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, writer))
    process.start()
    writer.close()
    try:
        row: Row = reader.recv()
    except EOFError:
        process.join()
        kind = f"the process of inputs {job[1]} ended with code {process.exitcode}"
        row = Row(inputs=1, tracebacks=1, faults={kind: Fault(kind, job[1][0], b"", kind)})
    process.join()
    return row


def run(inputs: int, seed: int, jobs: int, names: Sequence[str] = ()) -> dict[str, Row]:
    """Rows of about so many inputs, shared out over the targets by their weights."""
    with tempfile.TemporaryDirectory(prefix="cfsp-fuzz-") as name, ThreadPoolExecutor(jobs) as pool:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
        targets = [t for t in every_target(folder) if not names or t.name in names]
        total = sum(target.weight for target in targets)
        rows = {target.name: Row() for target in targets}
        waiting = []
        for target in targets:
            numbers = range(max(1, round(inputs * target.weight / total)))
            for start in numbers[:: max(PART, len(numbers) // jobs + 1)]:
                part = numbers[start : start + max(PART, len(numbers) // jobs + 1)]
                job = (target.name, part, seed, folder)
                waiting.append((target.name, pool.submit(_in_child, job)))
        for name, result in waiting:
            rows[name].add(result.result())
    return rows


def table(rows: dict[str, Row]) -> str:
    """In Markdown, with a line of all."""
    whole = Row()
    for row in rows.values():
        whole.add(row)
    titles = "target inputs refused accepted tracebacks wrong slowest peak"
    lines = ["| " + " | ".join(titles.split()) + " |", "|---|" + "---:|" * 7]
    for name, row in [*rows.items(), ("**all**", whole)]:
        counts = (row.inputs, row.refused, row.accepted, row.tracebacks, row.wrong)
        ends = f"{row.slowest:.2f} s", f"{row.peak / 1e9:.2f} GB"
        lines.append("| " + " | ".join([name, *(f"{n:,}" for n in counts), *ends]) + " |")
    return "\n".join(lines)


def told(rows: dict[str, Row], seed: int) -> str:
    """Every kind of fault, with the input that shows it."""
    lines: list[str] = []
    for name, row in rows.items():
        for fault in row.faults.values():
            lines += [
                f"{name}, seed {seed}, input {fault.number}: {fault.trace.rstrip()}",
                f"    {fault.data[:1000]!r}",
            ]
    return "\n".join(lines)


def main(arguments: Any) -> int:
    rows = run(arguments.inputs, arguments.seed, arguments.jobs, arguments.target or ())
    print(table(rows))
    faults = told(rows, arguments.seed)
    print(faults, file=sys.stderr)
    return 1 if faults else 0
