"""Measure one implementation of one op: cold caches, medians, memory, agreement, bandwidth.

A benchmark file holds a list ``BENCHMARKS`` of :class:`OpBenchmark`; ``conftest.py`` makes one
test of each (op, shape, implementation). All tests of one (op, shape) share one group of the
pytest-benchmark report and one set of inputs. Ratios are formed within a group only.
"""

import gc
import math
import os
import signal
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import environment
from .shapes import Shape
from .timing import DEVICE, ON_GPU, ColdCache, seconds_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROUNDS = (5, 30) if ON_GPU else (3, 15)
SECONDS_PER_MEASUREMENT = 0.3 if ON_GPU else 0.5
VERSIONS = environment.versions()
COMPILE_LIMIT_SECONDS = 45 if ON_GPU else 60
LARGEST_COPY_BYTES = 2 << 30
PRODUCT_SIZE = 8192 if ON_GPU else 512
ROOFS = ("copy", "matmul")
REFERENCE_IMPLEMENTATIONS = ("eager", "torch.compile", "torch op")

Implementation = Callable[[Any], Any]


@dataclass(frozen=True)
class OpBenchmark:
    """One op, how to feed it, and who competes."""

    op: str
    make_inputs: Callable[[Shape], Any]
    """Inputs on :data:`DEVICE`, passed as they are to every implementation."""
    bytes_moved: Callable[[Any], int]
    """The fewest bytes that the op can move; every implementation is rated by them."""
    implementations: dict[str, Implementation]
    """By name: "cfsp" always, "eager" as published code writes it, "torch op" the best one."""
    compiled: Implementation | None
    """Plain torch for torch.compile to fuse, or None."""
    reference: Implementation
    """The op's specification, for the agreement of results."""
    digest: Callable[[Any], torch.Tensor]
    """What is compared of a result: a small tensor."""
    gpu_implementations: dict[str, Implementation] = field(default_factory=dict)
    """Rivals and forms of the op that need a GPU, or the interpreter."""
    reset: Callable[[Any], Any] | None = None
    """Zeroes what implementations add to, outside of what is timed."""
    tokens: Callable[[Shape], int] | None = None
    """Tokens of one call, or None where weights are all that is read."""
    experts: bool = False
    """Whether it is for shapes with experts, or for those without."""
    multiply_adds: Callable[[Any], int] | None = None
    """Multiply-adds that the op needs, for those bound by arithmetic."""

    def names(self, device: str) -> list[str]:
        """Implementations to measure on ``device``, the copy and the op first."""
        names = ["copy", *self.implementations]
        names += ["matmul"] if self.multiply_adds is not None else []
        if device == "cuda" or INTERPRETED:
            names += self.gpu_implementations
        return names + (["torch.compile"] if self.compiled is not None else [])

    def clear(self, inputs: Any) -> Any:
        """``inputs`` with their running totals at zero."""
        if self.reset is not None:
            self.reset(inputs)
        return inputs


class Stage:
    """The inputs of the group at hand. Freed when the next group needs the memory."""

    def __init__(self) -> None:
        self.key: tuple[str, str] | None = None
        self.inputs: Any = None
        self.expected: torch.Tensor | None = None
        self.cold_cache = ColdCache()
        self.clocks = environment.clocks()
        self.deadline = math.inf
        """When to measure nothing more, by ``time.monotonic``."""

    def load(self, spec: OpBenchmark, shape: Shape) -> Any:
        """Inputs of (op, shape), made once, together with the digest of the reference."""
        if self.key != (spec.op, shape.name):
            self.clear()
            torch.manual_seed(0)
            self.inputs = spec.make_inputs(shape)
            result = spec.reference(spec.clear(self.inputs))
            self.expected = spec.digest(result).double().cpu().clone()
            self.key = (spec.op, shape.name)
            self.clocks = environment.clocks()
            _collect()
        return self.inputs

    def clear(self) -> None:
        """Drop the inputs."""
        self.key = self.inputs = self.expected = None
        _collect()


def _collect() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def _resident(key: str) -> int | None:
    """A line of /proc/self/status in bytes: VmRSS now, VmHWM its peak. None where there is none."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def peak_extra_bytes(call: Callable[[], Any]) -> tuple[int | None, str]:
    """Bytes that ``call`` needs beyond what was allocated before, results included, and the source.

    On a CPU it is the growth of the resident set, so memory that the allocator kept is not seen.
    """
    _collect()
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, "torch.cuda.max_memory_allocated"
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except OSError:
        return None, "not measured: the peak of the resident set cannot be reset here"
    resident = _resident("VmRSS")
    call()
    peak = _resident("VmHWM")
    if resident is None or peak is None:
        return None, "not measured: no /proc/self/status"
    return max(0, peak - resident), "growth of VmHWM"


@contextmanager
def time_limit(seconds: int, what: str) -> Iterator[None]:
    """Raise TimeoutError in the body after ``seconds`` (where the system has SIGALRM)."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def expire(_signal: int, _frame: types.FrameType | None) -> None:
        raise TimeoutError(f"{what} took longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def compile_for(
    inputs: Any, function: Implementation, limit: float = COMPILE_LIMIT_SECONDS
) -> tuple[Implementation, float]:
    """``torch.compile`` of ``function`` for these inputs and its seconds; skips with the reason."""
    torch._dynamo.reset()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "16" if ON_GPU else "1")
    compiled = torch.compile(function, dynamic=False, fullgraph=True)
    start = time.perf_counter()
    try:
        # without gradients as it is called later, or it would be compiled again
        with time_limit(max(1, int(limit)), "torch.compile"), torch.no_grad():
            compiled(inputs)
    except torch.OutOfMemoryError:
        raise
    # Whatever the compiler stumbles over (no C++ compiler, an internal error, the limit above) is
    # a reason to leave this rival out, not to lose the run.
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        pytest.skip(f"torch.compile: {first_line[:200]}")
    return compiled, time.perf_counter() - start


def make_copy(nbytes: int) -> tuple[Callable[[], Any], int]:
    """A device copy that moves ``nbytes`` (at most twice the largest copy), and its bytes.

    Of random bytes: a CPU reads zeros that nobody wrote from one page in its cache.
    """
    half = max(1, min(nbytes // 2, LARGEST_COPY_BYTES))
    source = torch.empty(half, dtype=torch.int8, device=DEVICE).random_(-128, 127)
    goal = torch.empty_like(source)
    return lambda: goal.copy_(source), 2 * half


def make_matmul(dtype: torch.dtype) -> tuple[Callable[[], Any], int, int]:
    """A large square product of random matrices, its bytes and its multiply-adds."""
    shape = (PRODUCT_SIZE, PRODUCT_SIZE)
    a, b, out = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(3))
    return lambda: torch.mm(a, b, out=out), 3 * a.nbytes, PRODUCT_SIZE**3


def _largest_difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest expected value; NaN where either has one."""
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((result - expected).abs().max() / scale)


def measure(
    benchmark: BenchmarkFixture,
    stage: Stage,
    spec: OpBenchmark,
    shape: Shape,
    name: str,
) -> None:
    """Time implementation ``name`` of ``spec`` at ``shape`` and fill ``extra_info``.

    The median is over cold rounds. Ratios within the group join when the JSON is written.
    """
    if time.monotonic() > stage.deadline:
        pytest.skip("not reached: the seconds of this run are spent")
    benchmark.group = f"{spec.op} {shape.name}"
    try:
        _measure(benchmark, stage, spec, shape, name)
    except torch.OutOfMemoryError:
        stage.clear()
        pytest.skip(f"{name} of {benchmark.group}: out of device memory")


def _measure(
    benchmark: BenchmarkFixture, stage: Stage, spec: OpBenchmark, shape: Shape, name: str
) -> None:
    inputs = stage.load(spec, shape)
    info = benchmark.extra_info
    nbytes = spec.bytes_moved(inputs)
    multiply_adds = spec.multiply_adds(inputs) if spec.multiply_adds is not None else 0
    compile_seconds = None
    if name == "copy":
        call, nbytes = make_copy(nbytes)
        multiply_adds = 0
    elif name == "matmul":
        call, nbytes, multiply_adds = make_matmul(shape.dtype)
    elif name == "torch.compile":
        if spec.compiled is None:
            raise ValueError(f"{spec.op} has nothing to compile")
        limit = min(COMPILE_LIMIT_SECONDS, stage.deadline - time.monotonic())
        function, compile_seconds = compile_for(inputs, spec.compiled, limit)
        call = _bind(function, inputs)
    else:
        call = _bind({**spec.implementations, **spec.gpu_implementations}[name], inputs)

    with torch.no_grad():
        spec.clear(inputs)
        result = call()  # also compiles kernels outside of every measurement
        if name not in ROOFS and stage.expected is not None:
            digest = spec.digest(result).double().cpu()
            info["largest_relative_difference"] = _largest_difference(digest, stage.expected)
        del result
        peak, source = peak_extra_bytes(call)
        seconds = seconds_of(call, stage.cold_cache)
        low, high = ROUNDS
        rounds = max(low, min(high, int(SECONDS_PER_MEASUREMENT / max(seconds, 1e-9))))
        benchmark.pedantic(call, setup=stage.cold_cache, rounds=rounds)
    before, stage.clocks = stage.clocks, environment.clocks()

    info.update(
        op=spec.op,
        shape=shape.name,
        implementation=name,
        dtype=str(shape.dtype).removeprefix("torch."),
        tokens=spec.tokens(shape) if spec.tokens is not None else None,
        bytes=nbytes,
        clocks={"before": before, "after": stage.clocks},
        peak_extra_bytes=None if name in ROOFS else peak,
        peak_source=source,
        compile_seconds=compile_seconds,
        device=environment.machine(),
        versions={name: VERSIONS[name] for name in ("python", "torch", "triton", "cuda")},
    )
    if name == "cfsp":
        info["backend"] = backend_of(spec)
    if benchmark.stats is not None:  # None under --benchmark-disable
        median = benchmark.stats.stats.median
        info["gigabytes_per_second"] = nbytes / median / 1e9
        if multiply_adds:
            info["tera_flops"] = 2 * multiply_adds / median / 1e12


def _bind(function: Implementation, inputs: Any) -> Callable[[], Any]:
    return lambda: function(inputs)


def backend_of(spec: OpBenchmark) -> str:
    """The backend that the op picks here by itself."""
    from cfsp_kernels._dispatch import use_triton

    op = spec.op.split("[")[0]
    if op == "gather_rows":  # index_select on either backend
        return "torch"
    return "triton" if use_triton(op, torch.empty(0, device=DEVICE), None) else "torch"


def add_ratios(benchmarks: list[dict[str, Any]]) -> None:
    """Fill in percents of the roofs and speedups, each within its group, in place."""
    medians: dict[tuple[str, str], float] = {}
    rates: dict[str, float] = {}
    products: dict[str, float] = {}
    for entry in benchmarks:
        info = entry["extra_info"]
        if "implementation" not in info:
            continue
        medians[entry["group"], info["implementation"]] = entry["stats"]["median"]
        if info["implementation"] == "copy":
            rates[entry["group"]] = info["gigabytes_per_second"]
        if info["implementation"] == "matmul":
            products[entry["group"]] = info["tera_flops"]
    for entry in benchmarks:
        info, group = entry["extra_info"], entry["group"]
        if "implementation" not in info:
            continue
        if group in rates:
            info["percent_of_copy"] = 100 * info["gigabytes_per_second"] / rates[group]
        if group in products and "tera_flops" in info:
            info["percent_of_matmul"] = 100 * info["tera_flops"] / products[group]
        for rival in REFERENCE_IMPLEMENTATIONS:
            if (group, rival) in medians and info["implementation"] not in ROOFS:
                ratio = medians[group, rival] / entry["stats"]["median"]
                info[f"speedup_over_{rival.replace(' ', '_').replace('.', '_')}"] = ratio
