"""A visit to a GPU can be cut off anywhere and goes on where it was."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.common import environment
from benchmarks.common.shapes import SHAPES
from benchmarks.gpu_suite import Step
from benchmarks.ops import device_tests

OPTIONS: dict[str, Any] = {"force": False, "retry": False, "budget": 1e9, "rehearsal": False}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks that a test starts are no part of this test run."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
        monkeypatch.delenv(name)


def script(name: str, code: str, **more: Any) -> Step:
    return Step(name, "a test", (sys.executable, "-c", code), **{"limit": 60, **more})


def counting(folder: Path, code: int = 0) -> Step:
    """A step that leaves a mark each time it runs."""
    return script(
        "counted", f"open(r'{folder / 'runs'}', 'a').write('x'); raise SystemExit({code})"
    )


def runs(folder: Path) -> int:
    return len((folder / "runs").read_text())


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="refuses only without a GPU")
def test_without_a_gpu_it_refuses_and_names_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_suite.main(["--out", str(tmp_path)]) == 2
    assert "--cpu-rehearsal" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_list_and_dry_run_need_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert gpu_suite.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    for part in ("environment", "device-tests", "memcheck", "racecheck", "tune-gram", "bench-gram"):
        assert part in listed
        assert part in printed
    assert "cfsp.prune" in listed
    assert sys.executable not in printed


def test_steps_have_unique_names_and_end_within_eight_minutes(tmp_path: Path) -> None:
    for rehearsal in (False, True):
        steps = gpu_suite.steps(tmp_path, rehearsal)
        assert len({step.name for step in steps}) == len(steps)
        assert all(step.limit < 480 for step in steps)


def test_the_visit_fits_in_25_minutes_and_its_headline_in_eight(tmp_path: Path) -> None:
    visit = [step for step in gpu_suite.steps(tmp_path) if not step.extra]
    seconds = {step.name: sum(s.limit for s in visit[: i + 1]) for i, step in enumerate(visit)}
    assert max(seconds.values()) <= 1500
    headline = next(step for step in visit if step.headline)
    assert seconds[headline.name] <= 480
    order = list(seconds)
    assert order[:2] == ["environment", "device-tests"]
    benched = [name for name in order if name.startswith("bench-")]
    assert benched[0] == "bench-swiglu-statistics"
    for name in gpu_suite.BENCHMARKS:
        assert seconds[f"bench-{name}"] <= seconds[headline.name]
    first_tuning = order.index(gpu_suite.tune_name(next(iter(gpu_suite.TUNED))))
    assert all(
        order.index(f"sanitizer-{tool}") < first_tuning for tool in ("memcheck", "racecheck")
    )
    assert order[-3:] == ["device-tests-tuned", "bench-tuned", "bench-llama-3-70b"]
    assert set(gpu_suite.TUNED) <= set(gpu_suite.SWEEPS)


def test_every_benchmark_of_an_op_is_part_of_the_visit() -> None:
    files = {path.name for path in (gpu_suite.ROOT / "benchmarks").rglob("test_*.py")}
    visited = {file for file, _, _ in gpu_suite.BENCHMARKS.values()}
    assert files == visited | {"test_calibration.py"}
    shapes = {s for _, names, _ in gpu_suite.BENCHMARKS.values() for s in names.split(",")}
    assert shapes <= set(SHAPES)


def test_dry_run_adds_the_limits_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--dry-run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    assert lines[0] == "# environment, at most 25 s, 25 s in all"
    assert lines[1] == "# device-tests, at most 120 s, 145 s in all"
    assert not any("tune-gram-fp32" in line for line in lines)
    assert gpu_suite.main(["--dry-run", "--step", "tune-gram-fp32"]) == 0
    assert capsys.readouterr().out.startswith("# tune-gram-fp32, at most ")


def test_an_unknown_step_is_an_error() -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_suite.main(["--step", "nonsense", "--dry-run"])
    assert stopped.value.code == 2


def test_a_result_tells_what_ran_where_and_how_it_ended(tmp_path: Path) -> None:
    steps = [script("good", "print('measured')"), script("bad", "raise SystemExit(7)")]
    assert gpu_suite.run(steps, tmp_path, **OPTIONS) == 1
    good, bad = read(tmp_path, "good"), read(tmp_path, "bad")
    assert (good["status"], good["returncode"]) == ("passed", 0)
    assert good["output_tail"] == "measured\n"
    assert good["command"] == "python -c 'print('\"'\"'measured'\"'\"')'"
    assert good["environment"]["versions"]["torch"] == torch.__version__
    assert good["environment"]["machine"] == environment.machine()
    assert good["wall_seconds"] > 0
    assert (bad["status"], bad["returncode"]) == ("failed", 7)


def test_what_is_complete_is_not_run_again(tmp_path: Path) -> None:
    step = counting(tmp_path)
    for _ in range(2):
        assert gpu_suite.run([step], tmp_path, **OPTIONS) == 0
    assert runs(tmp_path) == 1
    assert gpu_suite.run([step], tmp_path, **{**OPTIONS, "force": True}) == 0
    assert runs(tmp_path) == 2


def test_a_failure_stays_a_failure_until_it_is_retried(tmp_path: Path) -> None:
    step = counting(tmp_path, code=1)
    for _ in range(2):
        assert gpu_suite.run([step], tmp_path, **OPTIONS) == 1
    assert runs(tmp_path) == 1
    gpu_suite.run([step], tmp_path, **{**OPTIONS, "retry": True})
    assert runs(tmp_path) == 2


@pytest.mark.parametrize("key", ["sources", "machine", "driver"])
def test_a_result_of_other_sources_or_another_card_does_not_count(tmp_path: Path, key: str) -> None:
    step = counting(tmp_path)
    gpu_suite.run([step], tmp_path, **OPTIONS)
    result = read(tmp_path, "counted")
    place = result if key == "sources" else result["environment"]
    assert place[key] != "another"
    place[key] = "another"
    (tmp_path / "counted.json").write_text(json.dumps(result))
    gpu_suite.run([step], tmp_path, **OPTIONS)
    assert runs(tmp_path) == 2


def test_a_torn_result_does_not_count(tmp_path: Path) -> None:
    step = counting(tmp_path)
    gpu_suite.run([step], tmp_path, **OPTIONS)
    (tmp_path / "counted.json").write_text('{"status": "pas')
    gpu_suite.run([step], tmp_path, **OPTIONS)
    assert runs(tmp_path) == 2


def test_a_step_past_its_limit_is_ended_with_its_children_and_runs_again(tmp_path: Path) -> None:
    sleep = "[sys.executable, '-c', 'import time; time.sleep(99)']"
    child = f"import subprocess, sys; subprocess.run({sleep})"
    scratch = tmp_path / "work"
    fill = f"import os; os.mkdir(r'{scratch}')"
    step = script("slow", f"{fill}; {child}", limit=1, scratch=scratch)
    start = time.monotonic()
    assert gpu_suite.run([step], tmp_path, **OPTIONS) == 1
    assert time.monotonic() - start < 20
    result = read(tmp_path, "slow")
    assert (result["status"], result["returncode"]) == ("out of time", None)
    assert gpu_suite.complete(step, tmp_path / "slow.json", environment.describe()) is None
    assert not scratch.exists()


def test_nothing_starts_when_the_budget_is_spent(tmp_path: Path) -> None:
    assert gpu_suite.run([counting(tmp_path)], tmp_path, **{**OPTIONS, "budget": 1}) == 1
    assert not (tmp_path / "counted.json").exists()


def test_what_fits_the_budget_runs_after_what_does_not(tmp_path: Path) -> None:
    steps = [script("long", "", limit=90), script("short", "", limit=30)]
    assert gpu_suite.run(steps, tmp_path, **{**OPTIONS, "budget": 60}) == 1
    assert not (tmp_path / "long.json").exists()
    assert read(tmp_path, "short")["status"] == "passed"


def test_a_step_sees_this_checkout_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    code = (
        "import os; print(os.environ['PYTHONPATH']); os.chdir('/'); import benchmarks.common.shapes"
    )
    assert gpu_suite.run([script("path", code)], tmp_path, **OPTIONS) == 0
    assert read(tmp_path, "path")["output_tail"] == f".{os.pathsep}elsewhere\n"


def test_what_tests_the_tuned_table_waits_for_a_change(tmp_path: Path) -> None:
    step = script("tuned", "print('ran')", after_tuning=True)
    sweep = tmp_path / "tuning-sm_90-gram.json"
    sweep.write_text(json.dumps({"written": False}))
    assert gpu_suite.run([step], tmp_path, **OPTIONS) == 0
    assert read(tmp_path, "tuned")["reason"] == "tuning did not change the table"
    sweep.write_text(json.dumps({"written": True}))
    assert gpu_suite.run([step], tmp_path, **OPTIONS) == 0
    assert read(tmp_path, "tuned")["status"] == "passed"


def test_headline_and_one_archive_hold_all_results_after_every_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, archive = tmp_path / "out", tmp_path / "visit.tar.gz"
    measured = {
        "group": "gram 8b",
        "stats": {"median": 0.012, "rounds": 5},
        "extra_info": {
            "op": "gram",
            "shape": "8b",
            "implementation": "cfsp",
            "tokens": 8192,
            "percent_of_matmul": 75.0,
            "gigabytes_per_second": 1.0,
        },
    }
    code = (
        f"import json; json.dump({{'benchmarks': [{measured!r}]}},"
        f" open(r'{out / 'benchmark-gram.json'}', 'w'))"
    )
    look = f"import tarfile; print(tarfile.open(r'{archive}').getnames())"
    steps = [script("bench-gram", code, headline=True), script("then", look), script("bad", "1/0")]
    assert gpu_suite.run(steps, out, archive=archive, **OPTIONS) == 1
    seen = read(out, "then")["output_tail"]
    assert "benchmark-gram.json" in seen
    assert "headline.md" in seen
    headline = (out / "headline.md").read_text()
    assert "| gram | 8b | 8192 | 12 | 75 |" in headline
    assert headline.index("| bench-gram | passed |") < headline.index("| bad | failed |")
    printed = capsys.readouterr().out
    assert printed.index("| gram | 8b |") < printed.index("[2/3] then")
    with tarfile.open(archive) as tar:
        members = {member.name: member for member in tar.getmembers()}
    assert {"bench-gram.json", "then.json", "bad.json", "headline.md"} <= set(members)
    assert {(member.uid, member.uname) for member in members.values()} == {(0, "")}


def test_headline_tells_what_calibration_and_pruning_took(tmp_path: Path) -> None:
    measured = {"benchmarks": [{"group": None, "extra_info": {"overhead": 0.0551}}]}
    (tmp_path / "benchmark-calibration.json").write_text(json.dumps(measured))
    run = {
        "run": True,
        "model": "llama-3-8b",
        "shapes": {"blocks": 8},
        "prune_seconds": 33.33,
        "calibration_tokens": 131072,
        "forward_speedup": 1.234,
    }
    (tmp_path / "result-good.json").write_text(json.dumps(run))
    (tmp_path / "result-bad.json").write_text(json.dumps({**run, "run": False, "model": "lost"}))
    text = gpu_suite.headline(tmp_path)
    assert "Calibration adds 5.5% to a plain forward." in text
    assert "llama-3-8b, 8 blocks, 131072 tokens: pruned in 33.3 s, then 1.23 times as fast." in text
    assert "lost" not in text


def test_a_file_that_a_kill_tore_spoils_no_headline(tmp_path: Path) -> None:
    (tmp_path / "benchmark-gram.json").write_text('{"benchmarks": [')
    assert gpu_suite.run([script("good", "")], tmp_path, **OPTIONS) == 0
    assert "| good | passed |" in (tmp_path / "headline.md").read_text()


def benchmark_command(result: Path, *more: str) -> list[str]:
    return [
        *(
            sys.executable,
            "-m",
            "pytest",
            "benchmarks/ops/test_gather.py",
            "--benchmark-only",
            "-q",
        ),
        *("--benchmark-quiet", "--shapes", "tiny", f"--benchmark-json={result}", "--threads", "1"),
        *("-p", "no:cacheprovider", "-k", "not compile", *more),
    ]


def test_benchmarks_that_are_killed_leave_what_they_measured(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    running = subprocess.Popen(
        benchmark_command(result), cwd=gpu_suite.ROOT, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not (found := gpu_suite.read(result)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert running.poll() is None, "it ended before it could be killed"
    finally:
        running.kill()
        running.wait()
    assert len(found["benchmarks"]) < 12, "all were measured before any was saved"
    assert found["benchmarks"][0]["extra_info"]["implementation"] == "copy"
    assert "sources" in found["machine_info"]


def test_benchmarks_stop_by_themselves_and_say_so(tmp_path: Path) -> None:
    ended = subprocess.run(
        benchmark_command(tmp_path / "result.json", "--seconds", "0"),
        cwd=gpu_suite.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0
    assert "12 skipped" in ended.stdout
    assert "not reached: the seconds of this run are spent" in ended.stdout


def test_a_test_file_that_takes_its_process_along_leaves_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_good.py").write_text("def test_it():\n    pass\n")
    (tmp_path / "test_bad.py").write_text("def test_other():\n    assert 'reason' == 1\n")
    (tmp_path / "test_lost.py").write_text("import os\ndef test_it():\n    os.abort()\n")
    logs = tmp_path / "logs"
    assert device_tests.main(["--folder", str(tmp_path), "--logs", str(logs)]) == 1
    told = capsys.readouterr().out
    assert "test_good: 1 passed" in told
    assert "test_bad.py::test_other" in told
    assert "1 of 3 files passed" in told
    assert "reason" in (logs / "test_bad.log").read_text()
    for name in ("bad", "lost"):
        (tmp_path / f"test_{name}.py").unlink()
    assert device_tests.main(["--folder", str(tmp_path), "--logs", str(logs)]) == 0


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for nvidia-smi")
def test_clocks_are_asked_for_and_never_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    log = tmp_path / "log"
    tool.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\ncase $1 in *event_reasons*) exit 2;; esac\n'
        "echo '1980, 2619, 512.34, 61, 0x0000000000000024'\n"
    )
    tool.chmod(0o755)
    assert environment.clocks() == {
        "sm": 1980.0,
        "memory": 2619.0,
        "watts": 512.34,
        "celsius": 61.0,
        "held": ["power cap", "software thermal"],
    }
    asked = log.read_text().split()
    assert len(asked) == 4, "an old driver knows another name of one field"
    assert all(part.startswith(("--query-gpu=", "--format=")) for part in asked)
    tool.write_text("#!/bin/sh\necho '1980, 2619, [N/A], 61, 0x0'\n")
    assert environment.clocks()["watts"] == "[N/A]"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert environment.clocks() is None
    tool.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.clocks() is None


def test_an_absent_tool_is_a_reason_to_skip(tmp_path: Path) -> None:
    step = script("tool", "raise SystemExit(1)", tool="no-such-sanitizer")
    assert gpu_suite.run([step], tmp_path, **OPTIONS) == 0
    result = read(tmp_path, "tool")
    assert (result["status"], result["reason"]) == ("skipped", "no-such-sanitizer is not installed")
    step = script("package", "raise SystemExit(1)", package="no_such_package")
    assert gpu_suite.run([step], tmp_path, **OPTIONS) == 0
    assert read(tmp_path, "package")["reason"] == "no_such_package is not installed"


def test_results_name_no_folder_of_this_machine(tmp_path: Path) -> None:
    step = script("paths", f"import sys; print(sys.prefix, r'{environment.ROOT}', r'{tmp_path}')")
    gpu_suite.run([step], tmp_path, **OPTIONS)
    assert read(tmp_path, "paths")["output_tail"] == "<python> . OUT\n"


# One step of each kind; the whole rehearsal takes minutes.
REHEARSED = (
    "environment",
    "sanitizer-memcheck",
    "tune-fold-partials",
    "bench-swiglu-statistics",
    "end-to-end-tiny-2-blocks",
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the visit itself is the better test")
def test_rehearsal_runs_each_kind_of_step_under_the_interpreter(tmp_path: Path) -> None:
    arguments = ["--cpu-rehearsal", "--out", str(tmp_path)]
    for name in REHEARSED:
        arguments += ["--step", name]
    table = gpu_suite.TABLE.read_bytes()
    assert gpu_suite.main(arguments) == 0, [
        read(tmp_path, name)["output_tail"] for name in REHEARSED
    ]
    results = {name: read(tmp_path, name) for name in REHEARSED}
    assert all(result["rehearsal"] for result in results.values())
    assert {results[name]["status"] for name in REHEARSED[:-1]} == {"passed"}
    assert results["end-to-end-tiny-2-blocks"]["status"] in ("passed", "skipped")
    benchmarks = json.loads((tmp_path / "benchmark-swiglu-statistics.json").read_text())
    infos = {e["extra_info"]["implementation"]: e["extra_info"] for e in benchmarks["benchmarks"]}
    assert infos["cfsp"]["backend"] == "triton"
    assert infos["cfsp"]["largest_relative_difference"] < 1e-5
    assert infos["fused product only"]["largest_relative_difference"] < 1e-5
    assert infos["cfsp"]["percent_of_copy"] > 0
    sweep = json.loads((tmp_path / "tuning-default-fold_partials.json").read_text())
    assert [trial["error"] for trial in sweep["trials"]] == [None, None]
    assert "| swiglu_statistics | tiny | 64 |" in (tmp_path / "headline.md").read_text()
    assert gpu_suite.TABLE.read_bytes() == table
