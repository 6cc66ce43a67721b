"""The model card: front matter that is YAML whatever the model is called."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

import cfsp

from ..conftest import TEXT, make_tiny, make_tokenizer

RECIPE = cfsp.Recipe(
    scorer="cfsp",
    width_multiple=1,
    calibration=cfsp.Calibration(dataset=TEXT, samples=2, seqlen=32),
)


@pytest.mark.parametrize("name", ["plain", "a: b", "- {x}", "# 1", "größe 7", "'", "1.5"])
def test_the_front_matter_names_the_dense_model(
    tiny_folder: Path, tmp_path: Path, name: str
) -> None:
    dense, out = tmp_path / name, tmp_path / "out"
    shutil.copytree(tiny_folder, dense)
    cfsp.prune(dense, recipe=RECIPE, out=out, eval_windows=0, progress=False)
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": name,
        "tags": ["pruned", "cfsp"],
    }
    assert card.text.startswith(f"\n# {name}, ")
    if name in ("plain", "größe 7"):
        assert f"\nbase_model: {name}\n" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("x\nlicense: mit", r"x\\nlicense: mit"),
        ("a\x1b[31mred\x07", r"a\\x1b\[31mred\\x07"),
        ("e\u202egnp", r"e\\u202egnp"),
        ("|x|`y`<b>&[l](u)", r"\|x\|\`y\`&lt;b>&amp;\[l\](u)"),
        ("%s", "%s"),
    ],
)
def test_a_name_is_no_markup(tiny_folder: Path, tmp_path: Path, name: str, title: str) -> None:
    dense, out = tmp_path / name, tmp_path / "out"
    shutil.copytree(tiny_folder, dense)
    text = shutil.copyfile(TEXT, tmp_path / f"{name}.txt")
    recipe = replace(RECIPE, calibration=replace(RECIPE.calibration, dataset=str(text)))
    cfsp.prune(dense, recipe=recipe, out=out, eval_windows=1, progress=False, eval_dataset=TEXT)
    written = (out / "README.md").read_text(encoding="utf-8")
    assert all(letter.isprintable() or letter == "\n" for letter in written)
    card = ModelCard.load(out / "README.md")
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "base_model", "tags"}
    assert card.data.base_model == name
    assert card.text.startswith(f"\n# {title}, ")
    (row,) = (line for line in card.text.splitlines() if line.startswith("| calibration | "))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert row.count("``") == (2 if "`" in name else 0)
    assert yaml.safe_load((out / "recipe.yaml").read_text())["provenance"]["model"] == name


@pytest.mark.parametrize(("units", "gone"), [("channels,groups", False), ("attention", True)])
def test_the_card_says_what_runs_blocks_without_attention(
    tmp_path: Path, units: str, gone: bool
) -> None:
    recipe = replace(RECIPE, units=units, sparsity=0.3, allocator="knapsack", compensation="none")
    options = {"recipe": recipe, "out": tmp_path / "out", "eval_windows": 0, "progress": False}
    result = cfsp.prune(make_tiny(num_hidden_layers=5), make_tokenizer(), **options)
    without = [n for n, block in enumerate(result.plan.blocks) if not len(block.groups[0])]
    assert bool(without) is gone
    numbers = ", ".join(map(str, without))
    says = re.search(
        r"Without an attention: blocks? (.*)\. vLLM runs such a model with cfsp",
        (tmp_path / "out" / "README.md").read_text(),
    )
    assert (says[1] if says else "") == numbers
