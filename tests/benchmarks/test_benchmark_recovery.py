"""The recovery benchmark runs every way once, keeps what is done, and judges what it measured."""

import json
from pathlib import Path
from typing import Any

import pytest

import cfsp
from benchmarks.quality import recovery


def test_ways_are_run_once_and_side_by_side(
    tmp_path: Path, tiny: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tmp_path / "dense"
    tiny(intermediate_size=384).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    text = tmp_path / "text.txt"
    text.write_text("a text of its own, said again " * 200)
    arguments = ["--checkpoint", str(dense), "--work", str(tmp_path / "work"), "--json",
                 str(tmp_path / "result.json"), "--markdown", str(tmp_path / "result.md"),
                 "--dataset", str(text), "--eval-dataset", "builtin", "--samples", "4", "--seqlen",
                 "32", "--steps", "2", "--batch-size", "2", "--rank", "2", "--seeds", "1",
                 "--eval-windows", "2", "--distilled", "1"]  # fmt: skip
    assert recovery.main(arguments) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert [(run["way"], run["seed"]) for run in result["runs"]] == [
        ("importance", 0),
        ("uniform", 0),
        ("distilled", 0),
    ]
    assert len({run["in_domain"] for run in result["runs"]}) == 3
    for run in result["runs"]:
        assert len(run["losses"]) == 2
        assert result["summary"][run["way"]]["in_domain"]["mean"] == run["in_domain"]
    assert str(tmp_path) not in (tmp_path / "result.json").read_text()
    table = (tmp_path / "result.md").read_text()
    assert all(f"| {way} | 1 | " in table for way in ("importance", "uniform", "distilled"))
    assert not any("±" in line for line in table.splitlines() if line.startswith("|"))
    assert not (tmp_path / "work" / "importance-0").exists()

    monkeypatch.setattr(cfsp, "recover", None)  # nothing is left to do
    assert recovery.main(arguments) == 0
    assert json.loads((tmp_path / "result.json").read_text())["runs"] == result["runs"]
    with pytest.raises(SystemExit, match="answers another question"):
        recovery.main([*arguments, "--steps", "3"])


def test_claims_follow_from_the_numbers() -> None:
    def runs(importance: list[float], uniform: list[float]) -> list[dict[str, object]]:
        return [
            {"way": way, "seed": seed, "in_domain": value, "other_domain": 5.0}
            for way, values in (("importance", importance), ("uniform", uniform))
            for seed, value in enumerate(values)
        ]

    base = {"pruned": {"in_domain": 10.0, "other_domain": 5.0}}
    found = recovery.summary(base, runs([8.0, 9.0], [8.5, 9.5]))
    assert found["importance"]["in_domain"]["mean"] == 8.5
    assert found["importance"]["in_domain"]["deviation"] == pytest.approx(0.5**0.5)
    assert found["importance"]["in_domain"]["change"] == pytest.approx(-0.15)
    assert found["importance_minus_uniform"]["in_domain"] == [-0.5, -0.5]
    assert found["falls_by_a_tenth"]
    assert found["importance_beats_uniform_with_every_seed"]
    found = recovery.summary(base, runs([9.0, 9.2], [8.9, 9.4]))
    assert not found["falls_by_a_tenth"]
    assert not found["importance_beats_uniform_with_every_seed"]
