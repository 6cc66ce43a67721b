"""One test per (op, shape, implementation), and a JSON without names of hosts or people."""

import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.common import environment, harness, timing
from benchmarks.common.shapes import DEFAULT_SHAPES, SHAPES

HERE = Path(__file__).parent
described = functools.cache(environment.describe)
started = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shapes",
        default=None,
        help=f"comma-separated names of {', '.join(SHAPES)} (default: by device)",
    )
    parser.addoption(
        "--threads",
        type=int,
        default=None,
        help="threads of torch on the CPU (default: torch's own). Use 1 on a shared machine: with "
        "more, every parallel loop waits for whichever core is taken, and medians measure that",
    )
    parser.addoption(
        "--seconds",
        type=float,
        default=math.inf,
        help="measure nothing more after so many seconds: what is left is skipped",
    )


def pytest_configure(config: pytest.Config) -> None:
    threads = config.getoption("--threads")
    if threads is not None:
        torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not {"spec", "shape", "implementation"} <= set(metafunc.fixturenames):
        return
    chosen = metafunc.config.getoption("--shapes")
    names = chosen.split(",") if chosen else DEFAULT_SHAPES[timing.DEVICE]
    if unknown := sorted(set(names) - set(SHAPES)):
        raise pytest.UsageError(f"--shapes: unknown {unknown}, expected some of {list(SHAPES)}")
    cases = [
        (spec, SHAPES[shape], implementation)
        for spec in metafunc.module.BENCHMARKS
        for shape in names
        if spec.experts == bool(SHAPES[shape].experts)
        for implementation in spec.names(timing.DEVICE)
    ]
    ids = [f"{spec.op}-{shape.name}-{name}".replace(" ", "_") for spec, shape, name in cases]
    metafunc.parametrize(("spec", "shape", "implementation"), cases, ids=ids)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=timing.timer))


@pytest.fixture(scope="session")
def stage(pytestconfig: pytest.Config) -> Iterator[harness.Stage]:
    """The inputs of the group at hand, shared by its implementations."""
    stage = harness.Stage()
    stage.deadline = started + pytestconfig.getoption("--seconds")
    yield stage
    stage.clear()


@pytest.fixture
def measure(benchmark: BenchmarkFixture, stage: harness.Stage, pytestconfig: pytest.Config) -> Any:
    """``measure(spec, shape, implementation)``: see :func:`benchmarks.common.harness.measure`."""

    def run(spec: harness.OpBenchmark, shape: Any, implementation: str) -> None:
        harness.measure(benchmark, stage, spec, shape, implementation)
        # pytest-benchmark saves when all is over; a run that hangs or is killed keeps what it has
        pytestconfig._benchmarksession.handle_saving()

    return run


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    return described()  # asked for with every save, and the same


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    # The digest of the sources in the machine information says more than a commit that may be
    # dirty, and exists on a machine that holds no repository.
    return {"sources": environment.sources_digest()}


def pytest_benchmark_update_json(benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    harness.add_ratios(output_json["benchmarks"])
    for entry in output_json["benchmarks"]:
        entry["params"] = None  # the parameters are objects; extra_info names them
