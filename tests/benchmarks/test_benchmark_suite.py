"""A visit to a GPU can be cut off anywhere and goes on where it was."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment, gpu_suite
from benchmarks.gpu_suite import Step

OPTIONS: dict[str, Any] = {"force": False, "retry": False, "budget": 1e9, "rehearsal": False}


def script(name: str, code: str, **more: Any) -> Step:
    return Step(name, "a test", (sys.executable, "-c", code), **more)


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


def test_an_absent_tool_is_a_reason_to_skip(tmp_path: Path) -> None:
    step = script("tool", "raise SystemExit(1)", tool="no-such-sanitizer")
    assert gpu_suite.run([step], tmp_path, **OPTIONS) == 0
    result = read(tmp_path, "tool")
    assert (result["status"], result["reason"]) == ("skipped", "no-such-sanitizer is not installed")


def test_results_name_no_folder_of_this_machine(tmp_path: Path) -> None:
    step = script("paths", f"import sys; print(sys.prefix, r'{environment.ROOT}', r'{tmp_path}')")
    gpu_suite.run([step], tmp_path, **OPTIONS)
    assert read(tmp_path, "paths")["output_tail"] == "<python> . OUT\n"


# One step of each kind; the whole rehearsal takes minutes.
REHEARSED = (
    "environment",
    "sanitizer-memcheck",
    "tune-fold-partials",
    "bench-swiglu-statistics-tiny",
    "end-to-end-tiny-2-blocks",
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the visit itself is the better test")
def test_rehearsal_runs_each_kind_of_step_under_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
        monkeypatch.delenv(name)  # the benchmarks that it starts are no part of this test run
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
    benchmarks = json.loads((tmp_path / "benchmark-swiglu-statistics-tiny.json").read_text())
    infos = {e["extra_info"]["implementation"]: e["extra_info"] for e in benchmarks["benchmarks"]}
    assert infos["cfsp"]["backend"] == "triton"
    assert infos["cfsp"]["largest_relative_difference"] < 1e-5
    assert infos["fused product only"]["largest_relative_difference"] < 1e-5
    assert infos["cfsp"]["percent_of_copy"] > 0
    sweep = json.loads((tmp_path / "tuning-default-fold_partials.json").read_text())
    assert [trial["error"] for trial in sweep["trials"]] == [None, None]
    assert gpu_suite.TABLE.read_bytes() == table
