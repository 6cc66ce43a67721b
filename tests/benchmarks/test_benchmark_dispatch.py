"""The dispatch benchmark times every public call of this tree and of a commit, without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ops import dispatch
from cfsp_kernels._triton import triton_installed

pytestmark = [
    pytest.mark.skipif(not triton_installed(), reason="triton is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's compilers are for Linux"),
]
NEWER = {"channel_statistics(totals=)", "swiglu_statistics(totals=)", "block_influence(out=)"}


def test_every_call_of_this_tree_and_of_a_commit_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = ["git", "-C", str(dispatch.environment.ROOT), "rev-parse", "--verify", "HEAD"]
    if subprocess.run(known, capture_output=True, check=False).returncode:
        pytest.skip("no git repository to take a commit from")
    file = tmp_path / "result.json"
    assert dispatch.main(["--rounds", "1", "--against", "HEAD", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    now, then = result["microseconds"], result["against"]["microseconds"]
    assert set(now) >= NEWER
    assert set(now) - NEWER == set(then) - NEWER
    for times in (now, then):  # a kernel's launch costs more than a bare op: it was not left out
        assert all(0.5 < value < 1e5 for value in times.values())
        assert times["channel_statistics"] > times[dispatch.BARE]
    assert "ratio" in capsys.readouterr().out


def test_each_version_has_its_least_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter([{"a": 3.0}, {"a": 8.0, "b": 1.0}, {"a": 2.0}, {"a": 9.0, "b": 2.0}])
    monkeypatch.setattr(dispatch, "measure_in", lambda folder: next(rounds))
    now, then = dispatch.measure_in_turns([Path("now"), Path("then")], rounds=2)
    assert now == {"a": 2.0}
    assert then == {"a": 8.0, "b": 1.0}
    table = dispatch.table(now, {"a": 8.0}, "v1")
    assert table.splitlines()[1].split() == ["a", "2.0", "8.0", "0.25"]


def test_what_a_version_raises_is_shown(tmp_path: Path) -> None:
    (tmp_path / "cfsp_kernels").mkdir()
    (tmp_path / "cfsp_kernels" / "__init__.py").write_text("raise ImportError('no such version')")
    with pytest.raises(RuntimeError, match="no such version"):
        dispatch.measure_in(tmp_path)
