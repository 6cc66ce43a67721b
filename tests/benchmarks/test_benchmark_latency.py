"""The latency benchmark puts what was asked for, predicted and measured side by side."""

import json
from pathlib import Path

import pytest

from benchmarks.jobs import latency
from cfsp.costs import latency_measurement as latency_measure


def test_every_budget_is_predicted_within_it_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CFSP_CACHE", str(tmp_path))
    monkeypatch.setattr(  # a second more for every wider one: what is measured is not judged here
        latency_measure, "_timed", lambda cases, _: [[1.0 + n for n in range(len(cases))]]
    )
    file = tmp_path / "result.json"
    arguments = ["--shapes", "1x64", "--repeat", "2", "--rounds", "1", "--fractions", "0.1,0.2"]
    assert latency.main([*arguments, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert len(result["runs"]) == 2
    rows = [row for run in result["runs"] for row in run["budgets"].values()]
    for run in result["runs"]:
        for row in run["budgets"].values():
            assert row["predicted"] <= row["wanted"] * run["dense"]["predicted"] * (1 + 1e-9)
            assert row["measured_fraction"] == row["measured"] / run["dense"]["measured"]
    assert result["most_off"] == max(abs(row["off_request"]) for row in rows)
    assert "off the request by" in capsys.readouterr().out
