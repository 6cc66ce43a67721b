"""Ratios stay within a group, and the report shows what was measured and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.common.harness import add_ratios


def entry(group: str, name: str, median: float, rate: float, **more: Any) -> dict[str, Any]:
    info = {
        "op": group.split()[0],
        "shape": group.split()[1],
        "implementation": name,
        "dtype": "float32",
        "bytes": 1_000_000,
        "gigabytes_per_second": rate,
        "peak_extra_bytes": None,
        **more,
    }
    return {"group": group, "stats": {"median": median, "rounds": 5}, "extra_info": info}


@pytest.fixture
def result() -> dict[str, Any]:
    benchmarks = [
        entry("gram tiny", "cfsp", 1.0, 50.0, backend="torch", peak_extra_bytes=3 << 20),
        entry("gram tiny", "copy", 0.5, 100.0),
        entry("gram tiny", "eager", 4.0, 12.5),
        entry("gather_rows tiny", "cfsp", 3.0, 20.0, backend="triton"),
        entry("gather_rows tiny", "copy", 1.0, 40.0),
        {"group": None, "stats": {"median": 1.0, "rounds": 1}, "extra_info": {}},
    ]
    add_ratios(benchmarks)
    machine = {"machine": "a test", "versions": {"torch": "2.0", "hip": None}, "sources": "abc"}
    return {"benchmarks": benchmarks, "machine_info": machine, "datetime": "2026-01-02T03:04"}


def test_ratios_are_formed_within_a_group(result: dict[str, Any]) -> None:
    gram, rows = result["benchmarks"][0]["extra_info"], result["benchmarks"][3]["extra_info"]
    assert gram["percent_of_copy"] == 50
    assert gram["speedup_over_eager"] == 4
    assert rows["percent_of_copy"] == 50
    assert "speedup_over_eager" not in rows
    assert "speedup_over_torch_compile" not in gram
    assert "speedup_over_eager" not in result["benchmarks"][1]["extra_info"]


def test_table_holds_every_measurement_copy_first(result: dict[str, Any]) -> None:
    text = report.markdown(result)
    tables = text[text.index("### ") :]
    lines = [line for line in tables.splitlines() if line.startswith("| ")]
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines]
    assert [name for name in names if name not in ("implementation", "---")] == [
        "device copy",
        "cfsp (torch)",
        "eager",
        "device copy",
        "cfsp (triton)",
    ]
    assert "| cfsp (torch) | 1000 | 5 | 50 | 50 | 4 |  | 3 |  |" in text
    assert "a test; torch 2.0; 2026-01-02; sources abc" in text
    assert "hip" not in text
    assert "| gram | tiny | 1000 | 50 | 4 |  |  | 3 |" in text


def test_headline_has_the_packages_op_its_roof_and_rivals() -> None:
    bound = {"tokens": 8192, "tera_flops": 300.0}
    benchmarks = [
        entry("gram 8b", "copy", 0.5, 100.0),
        entry("gram 8b", "matmul", 0.5, 1.0, tera_flops=600.0),
        entry("gram 8b", "cfsp", 0.010, 30.0, **bound),
        entry("gram 8b", "torch op", 0.015, 40.0, tera_flops=200.0),
        entry("gram 8b", "torch.compile", 0.02, 40.0, tera_flops=150.0),
        entry("gram 8b", "form tiles", 0.012, 40.0, tera_flops=250.0),
        entry("gram 8b", "form panels", 0.010, 40.0, tera_flops=300.0),
        entry("gather_rows 8b", "copy", 1.0, 40.0),
        entry("gather_rows 8b", "cfsp", 1.0, 20.0, tokens=None),
    ]
    add_ratios(benchmarks)
    assert "speedup_over_torch_op" not in benchmarks[1]["extra_info"]
    text = report.headline([{"benchmarks": benchmarks[:7]}, {"benchmarks": benchmarks[7:]}])
    assert "| gram | 8b | 8192 | 10 | 50 | 2 | 1.5 |" in text
    assert "| gather_rows | 8b |  | 1000 | 50 |  |  |" in text
    assert "gram 8b, fastest first: form panels 10 ms, form tiles 12 ms" in text


def test_command_writes_markdown_and_chart(tmp_path: Path, result: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    source, table, chart = (tmp_path / name for name in ("r.json", "t.md", "c.png"))
    source.write_text(json.dumps(result))
    assert report.main([str(source), "--markdown", str(table), "--chart", str(chart)]) == 0
    assert "### gram tiny" in table.read_text()
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_only_the_marked_part_of_a_document_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.json").write_text(json.dumps(result))
    document = tmp_path / "d.md"
    document.write_text("above\n<!-- results: r.json -->\nstale\n<!-- end of results -->\nbelow\n")
    for _ in range(2):
        assert report.main(["--update", str(document)]) == 0
        text = document.read_text()
        assert text.startswith("above\n<!-- results: r.json -->\n")
        assert text.endswith("\n<!-- end of results -->\nbelow\n")
        assert text.count("### gram tiny") == 1
        assert "stale" not in text


def test_the_documents_tables_are_those_of_the_committed_results() -> None:
    root = Path(report.__file__).parents[1]
    document = (root / "docs" / "benchmarks.md").read_text("utf-8")
    assert report.MARKED.search(document)
    assert report.updated(document, root) == document


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_what_is_no_result_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    source = tmp_path / "r.json"
    source.write_text(text)
    assert report.main([str(source)]) == 2
    assert str(source) in capsys.readouterr().err
