"""The speed benchmark times the model it was given and what it pruned of it."""

import json
from pathlib import Path

import pytest

from benchmarks.jobs import speed


def test_both_models_are_timed_and_nothing_is_left(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny_folder), "--work", str(tmp_path / "work"), "--json",
                 str(tmp_path / "result.json"), "--width-multiple", "8", "--rounds", "1",
                 "--prompt-tokens", "16", "--new-tokens", "2"]  # fmt: skip
    assert speed.main(arguments) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert sum(result["widths"]) == 4 * 48 / 2
    dense, pruned = result["parameters"]
    assert dense - pruned == 4 * 3 * 32 * 24
    assert result["prefill_speedup"] == pytest.approx(
        result["pruned"]["prefill_tokens_per_second"] / result["dense"]["prefill_tokens_per_second"]
    )
    assert result["dense"]["workload"]["prompt_tokens"] == 16
    assert not (tmp_path / "work").exists()


def test_a_folder_with_files_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(SystemExit) as stopped:
        speed.main(["--model", "x", "--work", str(tmp_path), "--json", str(tmp_path / "r")])
    assert stopped.value.code == 2
    assert (tmp_path / "precious").exists()
