"""``cfsp evaluate --tasks`` with the evaluation harness itself, on a tiny model."""

import re
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import cfsp

from ..conftest import TEXT, make_tiny, make_tokenizer
from .conftest import accuracy_in, run, write_questions

LIMIT = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, PreTrainedModel]:
    """A dense model and the same pruned, by their folders."""
    dense, pruned = (tmp_path_factory.mktemp("tasks") / name for name in ("dense", "pruned"))
    make_tiny(seed=1).save_pretrained(dense)
    make_tokenizer().save_pretrained(dense)
    calibration = cfsp.Calibration(dataset=TEXT, samples=4, seqlen=64)
    recipe = cfsp.Recipe(sparsity=0.3, width_multiple=1, calibration=calibration)
    cfsp.prune(dense, None, recipe, pruned, eval_windows=0, progress=False)
    return {dense: make_tiny(seed=1), pruned: cfsp.load(pruned)}


def test_the_table_says_what_the_models_answer(
    models: dict[Path, PreTrainedModel], evaluating_python: Path, tmp_path: Path
) -> None:
    rows = write_questions(tmp_path)[:LIMIT]
    expected = [accuracy_in(rows, model, make_tokenizer()) for model in models.values()]
    assert expected[0] != expected[1]
    table = run(
        [evaluating_python, "-m", "cfsp", "evaluate", *models, "--windows", 0, "--quiet",
         "--tasks", "cfsp_questions", "--task-path", tmp_path, "--limit", LIMIT]
    )  # fmt: skip
    lines = [re.findall(r"[^\s│┃][^│┃]*[^\s│┃]", line) for line in table.splitlines()]
    assert ["dense", "pruned"] in lines
    assert ["cfsp_questions, acc", *(f"{accuracy:.4f}" for accuracy in expected)] in lines
