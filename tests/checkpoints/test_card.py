"""The model card: front matter that is YAML whatever the model is called."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import cfsp

from ..conftest import TEXT

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
