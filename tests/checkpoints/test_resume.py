"""A run that was interrupted goes on to the same bytes, or is refused; nothing else is touched."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import cfsp
from cfsp.checkpoints import folder as checkpoint
from cfsp.checkpoints.resume import check_resume
from cfsp.cli.main import main
from cfsp.errors import CfspError, Stopped
from cfsp.io import shard_writer
from cfsp.pruning import compaction
from cfsp.pruning import compaction_streamed as second_pass
from cfsp.run import job

from ..conftest import TEXT
from ..models.test_streaming import RECIPE, assert_same_files, prune, saved


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (checkpoint, second_pass):
        monkeypatch.setattr(module, "MAX_SHARD_BYTES", 30_000)


def after(calls: int) -> Callable[[], bool]:
    """Says stop from this call on."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


def finished(partial: Path) -> dict[str, int]:
    """Shard -> when it was written."""
    folder = partial / "result" if partial.suffix == ".partial" else partial
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}


def stopped(folder: Path, out: Path, calls: int, recipe: cfsp.Recipe = RECIPE) -> Path:
    with pytest.raises(Stopped):
        prune(folder, out, recipe, stop=after(calls))
    assert not out.exists()
    return out.with_name(f"{out.name}.partial")


def test_a_run_stopped_in_the_second_pass_keeps_shards_and_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "m")
    prune(folder, tmp_path / "reference")
    partial = stopped(folder, tmp_path / "out", 5)  # four blocks of pass 1, one of pass 2
    done = finished(partial)
    assert 0 < len(done) < len(finished(tmp_path / "reference"))
    assert not list(partial.rglob(".*.tmp"))

    def again(*_: object, **__: object) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(job, "collect_statistics", again)
    prune(folder, tmp_path / "out", resume=True)
    assert_same_files(tmp_path / "out", tmp_path / "reference")
    assert done.items() <= finished(tmp_path / "out").items()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out", "reference"]


def test_a_run_stopped_in_the_first_pass_starts_it_again(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    prune(folder, tmp_path / "reference")
    assert not finished(stopped(folder, tmp_path / "out", 2))
    prune(folder, tmp_path / "out", resume=True)
    assert_same_files(tmp_path / "out", tmp_path / "reference")


def test_resume_without_an_interrupted_run_is_an_ordinary_run(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    prune(folder, tmp_path / "a")
    prune(folder, tmp_path / "b", resume=True)
    assert_same_files(tmp_path / "a", tmp_path / "b")


def test_it_is_thrown_away_only_where_overwrite_says_so(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    partial = stopped(folder, tmp_path / "out", 5)
    before = finished(partial)
    recipe = replace(RECIPE, sparsity=0.5)
    with pytest.raises(
        CfspError, match=r"out\.partial is an interrupted run: `resume=True` continues"
    ):
        prune(folder, tmp_path / "out", recipe)
    opened = cfsp.open_model(folder)
    with pytest.raises(CfspError, match=r"out\.partial is an interrupted run"):
        cfsp.prune(opened.model, opened.tokenizer, recipe, tmp_path / "out", progress=False)
    assert len(set(opened.layout.intermediate_sizes(opened.model))) == 1  # nothing was cut
    with pytest.raises(CfspError, match=r"out\.partial is an interrupted run"):
        cfsp.export(folder, "padded", tmp_path / "out", progress=False)
    assert finished(partial) == before
    prune(folder, tmp_path / "out", recipe, overwrite=True)
    prune(folder, tmp_path / "reference", recipe)
    assert_same_files(tmp_path / "out", tmp_path / "reference")


def test_a_run_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    partial = stopped(folder, tmp_path / "out", 5)
    before = finished(partial)
    other = saved(tmp_path / "other" / "m", seed=1)
    statistics = cfsp.calibrate(folder, recipe=RECIPE, progress=False)
    seed = replace(RECIPE, calibration=replace(RECIPE.calibration, seed=1))
    for model, recipe, options, what in (
        (other, RECIPE, {}, "model, state of the model's files"),
        (folder, replace(RECIPE, sparsity=0.5), {}, "recipe"),
        (folder, seed, {}, "calibration text, recipe"),
        (folder, RECIPE, {"statistics": statistics}, "calibration text, statistics"),
        (folder, RECIPE, {"eval_windows": 1}, "evaluation text"),
    ):
        with pytest.raises(CfspError, match=f"it was begun with another {what};"):
            prune(model, tmp_path / "out", recipe, resume=True, **options)
    for manifest in (
        "{",
        "[" * 100_000,
        '{"format": "cfsp-run-1"}',
        '{"format": "cfsp-run-1", "identity": []}',
        '{"format": "cfsp-run-1", "identity": {"a": 1, "a": 2}}',
    ):
        (partial / ".cfsp-run" / "manifest.json").write_text(manifest)
        with pytest.raises(CfspError, match=r"cannot resume: .*manifest\.json"):
            prune(folder, tmp_path / "out", resume=True)
    assert finished(partial) == before
    for change in ({"": None}, {"plan": None}, {"more": None}):
        known = {"model": "a"}
        (partial / ".cfsp-run" / "manifest.json").write_text(
            json.dumps({"format": "cfsp-run-1", "identity": {**known, **change}})
        )
        with pytest.raises(CfspError, match="it was begun with another"):
            check_resume(partial, known)
        check_resume(partial, {**known, **change})


def test_a_folder_without_a_manifest_is_begun_anew(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    prune(folder, tmp_path / "reference")
    partial = stopped(folder, tmp_path / "out", 5, replace(RECIPE, sparsity=0.5))
    (partial / ".cfsp-run" / "manifest.json").unlink()
    prune(folder, tmp_path / "out", resume=True)
    assert_same_files(tmp_path / "out", tmp_path / "reference")


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_finished_result_that_has_the_name_is_refused_and_left_alone(
    options: dict[str, bool], tmp_path: Path
) -> None:
    folder = saved(tmp_path / "m")
    prune(folder, tmp_path / "reference")
    shutil.copytree(tmp_path / "reference", tmp_path / "out.partial")
    with pytest.raises(CfspError, match=r"out\.partial is in the way"):
        prune(folder, tmp_path / "out", **options)
    assert_same_files(tmp_path / "out.partial", tmp_path / "reference")
    assert not (tmp_path / "out").exists()


def test_a_finished_shard_of_another_layout_is_written_again(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    prune(folder, tmp_path / "reference")
    partial = stopped(folder, tmp_path / "out", 5)
    shard = min(partial.glob("result/*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[20] ^= 1
    shard.write_bytes(content)
    prune(folder, tmp_path / "out", resume=True)
    assert_same_files(tmp_path / "out", tmp_path / "reference")


def test_a_shard_of_the_right_size_and_header_that_was_touched_is_written_again(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path / "m")
    prune(folder, tmp_path / "reference")
    partial = stopped(folder, tmp_path / "out", 5)
    forged, copied, *_ = sorted(partial.glob("result/*.safetensors"))
    times = forged.stat()
    with forged.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\1\2\3\4")
    os.utime(forged, ns=(times.st_atime_ns, times.st_mtime_ns))
    content = bytearray(copied.read_bytes())
    content[-1] ^= 1
    copied.unlink()
    copied.write_bytes(content)
    prune(folder, tmp_path / "out", resume=True)
    assert_same_files(tmp_path / "out", tmp_path / "reference")


def test_what_a_resumed_run_did_not_write_is_no_part_of_its_result(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    prune(folder, tmp_path / "reference")
    partial = stopped(folder, tmp_path / "out", 5)
    secret = tmp_path / "secret"
    secret.write_text("s")
    place = partial / "result"
    (place / "notes.txt").write_text("x")
    (place / "model-00099-of-00100.safetensors").write_text("x")
    (place / "generation_config.json").symlink_to(secret)
    (place / "deep" / "er").mkdir(parents=True)
    (place / "deep" / "er" / "tokenizer.json").write_text("{}")
    for stray in (partial / "notes.txt", partial / "generation_config.json"):
        stray.symlink_to(secret)
        with pytest.raises(CfspError, match=r"out\.partial is in the way"):
            prune(folder, tmp_path / "out", resume=True)
        stray.unlink()
    prune(folder, tmp_path / "out", resume=True)
    assert_same_files(tmp_path / "out", tmp_path / "reference")
    assert secret.read_text() == "s"


def test_nothing_is_left_to_resume_of_a_complete_result(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    prune(folder, tmp_path / "out")
    before = finished(tmp_path / "out")
    with pytest.raises(CfspError, match="out is complete: there is nothing left to resume") as told:
        prune(folder, tmp_path / "out", resume=True)
    assert "overwrite" not in str(told.value)
    assert finished(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]


def test_a_full_disk_keeps_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "m")
    prune(folder, tmp_path / "reference")
    room = iter(range(3))

    def fill(*arguments: int) -> None:
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.os, "posix_fallocate", fill)
        with pytest.raises(CfspError, match=r"No space left .*; `resume=True` continues this run"):
            prune(folder, tmp_path / "out")
    assert len(finished(tmp_path / "out.partial")) == 3
    assert not (tmp_path / "out").exists()
    prune(folder, tmp_path / "out", resume=True)
    assert_same_files(tmp_path / "out", tmp_path / "reference")


def test_overwrite_and_resume_replace_the_old_result_at_the_end(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    old = prune(folder, tmp_path / "out", replace(RECIPE, sparsity=0.5)).plan.widths
    with pytest.raises(Stopped):
        prune(folder, tmp_path / "out", stop=after(5), overwrite=True)
    assert cfsp.load_plan(tmp_path / "out" / "plan.json").widths == old
    prune(folder, tmp_path / "out", resume=True, overwrite=True)
    prune(folder, tmp_path / "reference")
    assert_same_files(tmp_path / "out", tmp_path / "reference")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out", "reference"]


def test_sigterm_ends_the_command_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "m")
    arguments = [
        "prune", str(folder), "--out", str(tmp_path / "out"), "--dataset", TEXT, "--samples",
        "4", "--seqlen", "32", "--width-multiple", "1", "--scorer", "cfsp", "--eval-windows", "0",
        "--quiet",
    ]  # fmt: skip
    before = signal.getsignal(signal.SIGTERM)
    signals = iter([signal.SIGTERM])

    def terminated(*given: object) -> None:
        for number in signals:
            os.kill(os.getpid(), number)
        cut(*given)

    cut = compaction.prune_block_
    with monkeypatch.context() as patch:
        patch.setattr(compaction, "prune_block_", terminated)
        capsys.readouterr()
        assert main(arguments) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == ("cfsp: stopped; the same command with --resume continues\n")
    assert finished(tmp_path / "out.partial")
    assert main([*arguments, "--resume"]) == 0
    prune(folder, tmp_path / "reference")
    assert_same_files(tmp_path / "out", tmp_path / "reference")


KILLED = """
import os, random, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from cfsp.checkpoints import folder as checkpoint
from cfsp.pruning import compaction_streamed as second_pass
from tests.models.test_streaming import assert_same_files, prune
checkpoint.MAX_SHARD_BYTES = second_pass.MAX_SHARD_BYTES = 30_000
here = Path(sys.argv[1])
CALLS = ("preadv", "pwrite", "replace", "fsync", "posix_fallocate")

def run(out, moment, resume):
    # A process of its own that dies at its nth call of these; nothing of torch runs in the parent.
    pid = os.fork()
    if pid == 0:
        calls = 0
        def counted(function):
            def call(*arguments):
                nonlocal calls
                calls += 1
                if calls == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)
            return call
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        prune(here / "m", here / out, resume=resume)
        (here / "calls").write_text(str(calls))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

if run("reference", 0, False) != 0:
    sys.exit("the reference failed")
total = int((here / "calls").read_text())
moments = sorted(random.Random(0).sample(range(1, total), {count}))
for moment in moments:
    if run("out", moment, False) != -signal.SIGKILL or (here / "out").exists():
        sys.exit(f"not killed at {{moment}} of {{total}}")
    if run("out", 0, True) != 0:
        sys.exit(f"resume failed after {{moment}} of {{total}}")
    assert_same_files(here / "out", here / "reference")
    if (here / "out.partial").exists():
        sys.exit("leftovers")
    shutil.rmtree(here / "out")
print(total)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_moment_it_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    root = str(Path(__file__).resolve().parents[2])
    run = subprocess.run(
        [sys.executable, "-c", KILLED.format(root=root, count=20), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout) > 100
