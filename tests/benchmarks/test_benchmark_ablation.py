"""An ablation measures what a user's own run gives, goes on where it was left, and shows it."""

import copy
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import cfsp
from benchmarks.quality import ablation, ablation_grid, ablation_report
from cfsp.evaluation.quality import evaluation_windows
from cfsp.run.job import Run
from tests.conftest import TEXT, make_tiny, make_tokenizer

GRID: list[dict[str, Any]] = [
    {"scorer": "cfsp", "compensation": "none"},
    {"scorer": "cfsp", "compensation": "least-squares", "damping": 0.1, "width_windows": 3},
]
REFUSED = {"scorer": "cfsp", "compensation": "none", "width_multiple": 128}


def command(root: Path, recipes: Sequence[dict[str, Any]], *more: str) -> list[str]:
    """Two windows of each text; results and statistics in ``root``."""
    (root / "recipes.yaml").write_text(yaml.safe_dump(list(recipes)))
    options = {
        "calibration": TEXT,
        "in-domain": TEXT,
        "out-of-domain": root / "other.txt",
        "recipes": root / "recipes.yaml",
        "json": root / "result.json",
        "samples": 6,
        "seqlen": 32,
        "in-domain-windows": 3,
        "out-of-domain-windows": 2,
        "budgets": 0.25,
    }
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [str(root / "model"), *given, "--device", "cpu", *more]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, another text, and the result of the grid."""
    root = tmp_path_factory.mktemp("ablation")
    make_tiny(num_hidden_layers=2).save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    (root / "other.txt").write_text("def f(x):\n    return x + 1\n" * 9)
    outputs = ("--markdown", str(root / "table.md"), "--picture", str(root / "picture.png"))
    assert ablation.main(command(root, [*GRID, REFUSED], *outputs)) == 0
    return root


@pytest.fixture(scope="module")
def result(root: Path) -> dict[str, Any]:
    return ablation_report.load(root / "result.json")


def test_a_cell_is_what_prune_and_perplexity_give(root: Path, result: dict[str, Any]) -> None:
    calibration = cfsp.Calibration(dataset=TEXT, samples=6, seqlen=32)
    recipe = cfsp.Recipe(
        sparsity=0.25,
        scorer="cfsp",
        width_multiple=1,
        compensation="least-squares",
        damping=0.1,
        width_windows=3,
        calibration=calibration,
    )
    pruned = cfsp.prune(root / "model", recipe=recipe, device="cpu", progress=False)
    cell = result["cells"][1]
    assert cell["widths"] == list(pruned.plan.widths)
    assert sum(cell["widths"]) == 72
    for domain, text, count in (("in_domain", TEXT, 3), ("out_of_domain", root / "other.txt", 2)):
        windows = evaluation_windows(pruned.tokenizer, str(text), 32, count, "auto")
        own = cfsp.perplexity(pruned.model, windows, progress=False).perplexity
        assert cell[domain] == pytest.approx(own, rel=1e-9)
        assert result["dense"][domain] not in (cell[domain], result["cells"][0][domain])


def test_a_recipe_that_cannot_be_followed_is_kept_with_its_message(
    root: Path, result: dict[str, Any]
) -> None:
    failed = result["cells"][2]
    assert failed["recipe"]["width_multiple"] == 128
    assert "in_domain" not in failed
    assert failed["error"] in (root / "table.md").read_text()


def test_a_rerun_measures_what_is_missing_and_no_more(
    root: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "calibrated", lambda *_: pytest.fail("calibrated again"))
    measured = []

    def measure(opened: Any, recipe: cfsp.Recipe, *_: Any) -> dict[str, Any]:
        measured.append(recipe.scorer)
        raise cfsp.CfspError("not today")

    monkeypatch.setattr(ablation, "measured", measure)
    results = root / "again.json"
    results.write_text(json.dumps(result))
    new = {"scorer": "obs"}
    arguments = command(root, [new, *GRID, REFUSED], "--json", str(results))
    for expected in (["obs"], []):
        measured.clear()
        assert ablation.main(arguments) == 0
        assert measured == expected
    cells = ablation_report.load(results)["cells"]
    assert cells[:3] == result["cells"]
    assert [cell.get("error") for cell in cells[3:]] == ["not today"]
    assert ablation.main([*arguments, "--retry"]) == 0
    assert measured == ["obs", "cfsp"]
    assert len(ablation_report.load(results)["cells"]) == 4


def test_results_of_another_text_are_refused(
    root: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablation.main(command(root, GRID, "--out-of-domain-windows", "1")) == 2
    assert "results of another out_of_domain" in capsys.readouterr().err
    assert ablation_report.load(root / "result.json") == result


def test_another_default_is_another_cell(root: Path, result: dict[str, Any]) -> None:
    kept = ablation.Results(root / "result.json", result["asked"])
    values = {**GRID[0], "sparsity": 0.25, "width_multiple": 1}
    calibration = {"dataset": TEXT, "samples": 6, "seqlen": 32}
    recipe = ablation_grid.resolved(
        cfsp.pruning.recipe.recipe_from_dict({**values, "calibration": calibration})
    )
    tokens = result["cells"][0]["calibration"]
    assert kept.cell(recipe, tokens) == result["cells"][0]
    assert kept.cell(recipe, "other tokens") is None
    kept.values["cells"][0]["recipe"]["damping"] = 0.7
    assert kept.cell(recipe, tokens) is None
    kept.values["cells"][0]["recipe"]["forgotten"] = 1
    assert kept.cell(recipe, tokens) is None


def test_the_table_tells_shares_of_the_gap_and_seconds(result: dict[str, Any]) -> None:
    values = copy.deepcopy(result)
    values["dense"] = {"in_domain": 10.0, "out_of_domain": 30.0}
    plain, fitted, _ = values["cells"]
    plain.update(in_domain=20.0, out_of_domain=50.0, plan_seconds=1.0, cut_seconds=2.0)
    fitted.update(in_domain=14.0, out_of_domain=52.0, plan_seconds=3.0, cut_seconds=4.0)
    (calibration,) = values["calibrations"].values()
    calibration["seconds"] = {"6 windows": 7.0, "3 windows": 8.0}
    rows = [line for line in ablation_report.markdown(values).split("\n") if line[:6] == "| cfsp"]
    assert rows == [
        "| cfsp | cfsp | none |  | 20.00 | +0% | **50.00** | +0% | 7.0 | 1.0 | 2.0 | 1.00 |",
        "| cfsp | cfsp | least-squares | damping 0.1, width_windows 3 "
        "| **14.00** | +60% | 52.00 | -10% | 8.0 | 3.0 | 4.0 | 1.50 |",
    ]
    fitted["recipe"]["calibration"]["samples"] = 3
    fitted["recipe"]["sequential"] = True
    usual = ablation_report.usual_calibration(values)
    assert (
        ablation_report.also(fitted, usual) == "damping 0.1, sequential, width_windows 3, samples 3"
    )


def test_the_report_names_no_folder_and_fills_a_document(
    root: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    table = (root / "table.md").read_text()
    for text in (json.dumps(result), table):
        assert str(root) not in text
        assert TEXT not in text
    assert "6 windows of 32 tokens of `LICENSE`" in table
    assert (root / "picture.png").read_bytes().startswith(b"\x89PNG")
    page = root / "page.md"
    page.write_text(
        "Before.\n<!-- results: ablation -->\nto be replaced\n<!-- end of results -->\nAfter.\n"
    )
    arguments = [str(root / "result.json"), "--write", str(page)]
    assert ablation_report.main([*arguments, "--picture", str(root / "images" / "p.png")]) == 0
    text = page.read_text()
    assert "to be replaced" not in text
    assert text.startswith("Before.\n<!-- results: ablation -->\n\n![")
    assert "](images/p.png)" in text
    assert text.endswith(f"{table}\n<!-- end of results -->\nAfter.\n")
    page.write_text("no marks")
    assert ablation_report.main(arguments) == 2
    assert "marks 0 parts" in capsys.readouterr().err
    assert page.read_text() == "no marks"


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ({"scorer": "cfsp"}, "must be a list of recipes"),
        ([{"scorer": "cfsp", "sparsity": 0.1}], "sparsity is an option of the command"),
        ([{"scorer": "best"}], "unknown scorer 'best'"),
        ([{"calibration": 3}], "calibration must be a mapping"),
    ],
)
def test_a_bad_recipe_file_ends_in_one_line(
    root: Path, recipes: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(root, GRID)
    (root / "recipes.yaml").write_text(yaml.safe_dump(recipes))
    assert ablation.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("ablation: ")
    assert message in said
    assert said.count("\n") == 1


def test_the_default_grid_is_every_recipe_at_every_budget() -> None:
    calibration = cfsp.Calibration(samples=160)
    recipes = ablation_grid.grid(
        ablation_grid.RECIPES, [*ablation_grid.BUDGETS, "params=0.25"], calibration, "auto"
    )
    assert len(recipes) == len(set(recipes)) == 11 * 4
    assert {r.sparsity for r in recipes if r.budget is None} == {0.2, 0.3, 0.5}
    first, *_, sequential, blockwise = recipes[:11]
    assert (first.scorer, first.allocator, first.compensation) == ("cfsp", "cfsp", "none")
    assert (sequential.sequential, blockwise.compensation) == (True, "blockwise")
    assert [r.width_multiple for r in recipes[:11]].count(128) == 1


def test_the_topics_are_all_that_python_ships() -> None:
    from pydoc_data.topics import topics

    text = ablation.read_text("builtin-topics")
    assert text.startswith(topics[min(topics)] + "\n\n")
    assert text.endswith("\n\n" + topics[max(topics)])
    assert len(text) == sum(map(len, topics.values())) + 2 * (len(topics) - 1)


def test_the_page_shows_valid_commands_and_recipes(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "ablation.md").read_text()
    (command,) = re.findall(r"^python -m benchmarks.quality.ablation (.*?)\n```", page, re.M | re.S)
    options = ablation.build_parser().parse_args(shlex.split(command.replace("\\\n", " ")))
    assert (options.model, options.out_of_domain) == ("MODEL", "builtin-topics")
    (recipes,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "recipes.yaml").write_text(recipes)
    found = ablation_grid.grid(
        ablation_grid.read_recipes(tmp_path / "recipes.yaml"),
        ["0.3", "params=0.25"],
        cfsp.Calibration(samples=160),
        "auto",
    )
    assert [recipe.calibration.samples for recipe in found] == [160, 160, 48] * 2
    assert len(ablation_report.MARKED.findall(page)) == 1
