"""The tuner knows every entry of the table, changes only what it measured, and leaves no trace."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.shapes import SHAPES
from benchmarks.ops import tune
from cfsp_kernels._configs import config_for, config_table

TABLE = json.loads(tune.TABLE.read_text("utf-8"))


def trial(config: int, seconds: float, error: str | None = None) -> dict[str, Any]:
    return {"config": {"BLOCK": config}, "seconds": {"a": seconds, "b": 2.0}, "error": error}


def test_table_and_sweeps_name_the_same_kernels() -> None:
    assert set(TABLE) == set(tune.SWEEPS)


@pytest.mark.parametrize("entry", tune.SWEEPS)
def test_candidates_start_with_the_one_in_force_and_never_repeat(entry: str) -> None:
    for config in TABLE[entry].values():
        found = tune.candidates(entry, config)
        assert found[0] == config
        assert len({tuple(sorted(candidate.items())) for candidate in found}) == len(found) > 5


def test_a_parameter_that_the_sweep_does_not_know_is_an_error() -> None:
    with pytest.raises(ValueError, match="UNROLLED"):
        tune.candidates("gram", {**TABLE["gram"]["default"], "UNROLLED": 2})


def test_table_is_as_before_after_a_candidate_failed() -> None:
    before = json.dumps(config_table())

    def launch_with_a_candidate() -> None:
        with tune.in_table("gram", "sm_00", {"BLOCK_M": 1}):
            assert config_for("gram", "sm_00") == {"BLOCK_M": 1}
            raise RuntimeError("no such tile")

    with pytest.raises(RuntimeError, match="no such tile"):
        launch_with_a_candidate()
    assert json.dumps(config_table()) == before


def test_warps_alone_on_a_row_are_among_the_candidates() -> None:
    found = tune.candidates("block_influence", TABLE["block_influence"]["default"])
    assert {"BLOCK_D": 256, "num_warps": 1} in found
    assert {"BLOCK_D": 512, "num_warps": 1} in found


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compilers are for Linux")
def test_the_gate_refuses_what_spills_and_what_does_not_compile() -> None:
    pytest.importorskip("triton")
    tile = {"BLOCK_T": 16, "BLOCK_C": 128, "num_warps": 4}
    large, odd = {**tile, "BLOCK_T": 64, "num_warps": 1}, {**tile, "BLOCK_T": 12}
    good, spills, fails = tune.gate("channel_statistics", "sm_90", [tile, large, odd])
    assert good == []
    assert any("spills" in fault for fault in spills)
    assert any("CompilationError" in fault for fault in fails)


def test_a_candidate_that_fails_the_gate_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def pretended_gate(entry: str, target: str, configs: Any, first: bool = False) -> Any:
        return [["spills: 8"], []] if first else [[]]

    def time_it(*arguments: Any) -> tuple[float, torch.Tensor]:
        timed.append(config_for("fold_partials", "sm_00"))
        return 1.0 / len(timed), torch.ones(1)

    monkeypatch.setattr(tune, "_time", time_it)
    monkeypatch.setattr(tune, "gate", pretended_gate)
    shapes = [SHAPES["tiny"]]
    result = tune.sweep_entry("fold_partials", "sm_00", shapes, 1, math.inf, limit=3)
    first, refused, last = result["trials"]
    assert refused["error"] == "compile gate: spills: 8"
    assert timed == [first["config"], last["config"]]
    assert result["chosen"] == last["config"]


def test_the_fastest_that_ran_is_chosen() -> None:
    trials = [trial(1, 1.0), trial(2, 0.1, "RuntimeError: spills"), trial(3, 0.5)]
    result = tune.choose("gram", trials, ["a", "b"])
    assert result["chosen"] == {"BLOCK": 3}
    assert result["relative_time"] == pytest.approx(0.5**0.5)
    assert result["complete"]


def test_the_fastest_that_passes_the_gate_in_every_variant_is_chosen() -> None:
    trials = [trial(1, 1.0), trial(2, 0.2), trial(3, 0.5), trial(4, 0.3)]
    asked = []

    def faults(config: dict[str, int]) -> list[str]:
        asked.append(config["BLOCK"])
        return [] if config["BLOCK"] == 4 else ["spills: 8"]

    result = tune.choose("gram", trials, ["a", "b"], faults)
    assert result["chosen"] == {"BLOCK": 4}
    assert asked == [2, 4]
    assert trials[1]["error"] == "compile gate: spills: 8"
    refused = tune.choose("gram", trials, ["a", "b"], lambda config: ["spills: 8"])
    assert refused["chosen"] == refused["in_force"] == {"BLOCK": 1}


def test_a_gain_below_the_noise_changes_nothing() -> None:
    result = tune.choose("gram", [trial(1, 1.0), trial(2, 0.97)], ["a", "b"])
    assert result["chosen"] == {"BLOCK": 1}
    assert result["relative_time"] == 1


def test_a_sweep_cut_short_says_so() -> None:
    result = tune.choose("gram", [trial(1, 1.0), trial(2, 0.0, tune.OUT_OF_TIME)], ["a", "b"])
    assert not result["complete"]


def test_written_table_keeps_its_form(tmp_path: Path) -> None:
    assert tune.dump_table(TABLE) == tune.TABLE.read_text("utf-8")
    path = tmp_path / "table.json"
    path.write_text(tune.dump_table(TABLE))
    config = {**TABLE["gram"]["default"], "GROUP": 64}
    assert tune.write_entry(path, "gram", "sm_00", config)
    assert not tune.write_entry(path, "gram", "sm_00", config)
    written = json.loads(path.read_text())
    assert written["gram"].pop("sm_00") == config
    assert written == TABLE


def test_the_default_is_not_repeated_for_an_architecture(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(tune.dump_table(TABLE))
    assert not tune.write_entry(path, "row_sums", "sm_00", TABLE["row_sums"]["default"])
    assert path.read_text() == tune.dump_table(TABLE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="refuses only without a GPU")
def test_timings_without_a_gpu_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_a_rehearsal_cannot_write_the_packages_table() -> None:
    with pytest.raises(SystemExit) as stopped:
        tune.main(["--rehearsal"])
    assert stopped.value.code == 2
