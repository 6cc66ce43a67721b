"""The folder of a pruned model that is to be recovered: what it says of its pruning."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import CfspError
from ..models.loading import OpenModel
from ..pruning.plan import PruningPlan
from ..pruning.plan_file import load_plan

PLAN, RECIPE, CARD = "plan.json", "recipe.yaml", "README.md"


@dataclass(frozen=True)
class PrunedFolder:
    """What ``cfsp prune`` or ``cfsp recover`` wrote beside the weights."""

    path: Path
    plan: PruningPlan
    recipe: dict[str, Any]
    card: str


def read_pruned(path: Path) -> PrunedFolder:
    """Read the documents of a pruned folder.

    Raises:
        CfspError: not such a folder, or one of its documents is missing or not valid.
    """
    for name in (PLAN, RECIPE, CARD):
        if not (path / name).is_file():
            raise CfspError(f"{path} is not a folder that cfsp prune wrote: no {name}")
    try:
        recipe = yaml.safe_load((path / RECIPE).read_text())
        card = (path / CARD).read_text()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CfspError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(recipe, dict) or not isinstance(recipe.get("recovery", []), list):
        raise CfspError(f"{path / RECIPE} is not a recipe that cfsp wrote")
    return PrunedFolder(path, load_plan(path / PLAN), recipe, card)


def check_opened(pruned: PrunedFolder, opened: OpenModel) -> None:
    """Raise CfspError where the model is not what the plan beside it left."""
    widths = opened.layout.intermediate_sizes(opened.model)
    if widths != pruned.plan.widths:
        raise CfspError(f"{pruned.path / PLAN} is of another model: its widths are not those here")


def write_documents(
    pruned: PrunedFolder, folder: Path, recovery: dict[str, Any], section: str
) -> None:
    """The documents again, with one recovery more in recipe.yaml's list and in the card."""
    shutil.copyfile(pruned.path / PLAN, folder / PLAN)
    document = {**pruned.recipe, "recovery": [*pruned.recipe.get("recovery", []), recovery]}
    (folder / RECIPE).write_text(yaml.safe_dump(document, sort_keys=False))
    (folder / CARD).write_text(pruned.card + section)
