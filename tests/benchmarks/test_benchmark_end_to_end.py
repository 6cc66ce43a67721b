"""The end-to-end run measures a real run of the package, and leaves nothing behind."""

import json
from pathlib import Path

import pytest

from benchmarks.jobs import end_to_end


def arguments(folder: Path) -> list[str]:
    return ["--work", str(folder / "work"), "--json", str(folder / "result.json")]


def test_seconds_sizes_and_widths_are_those_of_the_run(tmp_path: Path) -> None:
    assert end_to_end.main(arguments(tmp_path)) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["run"]
    assert result["kept_fraction"] == pytest.approx(0.7, abs=0.01)
    assert result["dense_ffn_parameters"] == 2 * 3 * 64 * 256
    assert 0 < result["pruned_bytes"] < result["dense_bytes"]
    for name in ("write_seconds", "prune_seconds", "dense_forward_seconds", "forward_speedup"):
        assert result[name] > 0
    assert not (tmp_path / "work").exists()


def test_a_width_that_was_not_asked_for_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end_to_end, "ffn_parameters", lambda network: 1)
    with pytest.raises(ValueError, match=r"kept 1\.000"):
        end_to_end.main(arguments(tmp_path))
    assert not json.loads((tmp_path / "result.json").read_text())["run"]
    assert not (tmp_path / "work").exists()


def test_a_folder_with_files_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "precious").write_text("x")
    with pytest.raises(SystemExit) as stopped:
        end_to_end.main(arguments(tmp_path))
    assert stopped.value.code == 2
    assert (tmp_path / "work" / "precious").exists()
