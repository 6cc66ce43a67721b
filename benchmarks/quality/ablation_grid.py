"""The recipes and budgets of an ablation: the default grid, or those of a file."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cfsp import Calibration, CfspError, Recipe
from cfsp.pruning.recipe import recipe_from_dict

BUDGETS = ("0.2", "0.3", "0.5")
"""Fractions of the FFN channels to remove."""
RECIPES: tuple[dict[str, Any], ...] = (
    {"scorer": "cfsp", "compensation": "none"},
    {"scorer": "flap", "compensation": "bias"},
    {"scorer": "cfsp", "compensation": "least-squares"},
    {"scorer": "cfsp-output", "allocator": "cfsp", "compensation": "least-squares"},
    {"scorer": "cfsp-output", "compensation": "least-squares"},
    {"scorer": "cfsp-output", "compensation": "least-squares", "width_windows": 8},
    {"scorer": "cfsp-output", "compensation": "least-squares", "width_windows": 160},
    {"scorer": "cfsp-output", "compensation": "least-squares", "width_multiple": 128},
    {"scorer": "obs", "allocator": "knapsack", "compensation": "least-squares"},
    {"scorer": "cfsp-output", "compensation": "least-squares", "sequential": True},
    {"scorer": "cfsp-output", "compensation": "blockwise"},
)
"""From the published method to the best one, for SmolLM2-135M; widths are exact but for one."""
SHARED = {"width_multiple": 1}
"""What recipes have unless they say otherwise."""
OF_THE_RUN = ("sparsity", "budget", "dtype", "micro_batch")
"""Keys of a recipe that are the same for a whole ablation, or its other axis."""


def read_recipes(path: Path) -> list[dict[str, Any]]:
    """The mappings of a YAML list, each with the keys of a recipe but :data:`OF_THE_RUN`.

    Raises:
        CfspError: unreadable, no list of mappings, or a key that is not a recipe's to choose.
    """
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CfspError(f"cannot read recipes {path}: {' '.join(str(error).split())}") from None
    if not isinstance(found, list) or not found or not all(isinstance(r, dict) for r in found):
        raise CfspError(f"{path} must be a list of recipes, each a mapping such as {RECIPES[0]}")
    for recipe in found:
        for key in OF_THE_RUN:
            if key in recipe:
                raise CfspError(f"{path}: {key} is an option of the command, not of one recipe")
    return found


def grid(
    recipes: Sequence[Mapping[str, Any]],
    budgets: Sequence[str],
    calibration: Calibration,
    dtype: str,
) -> list[Recipe]:
    """Every recipe at every budget, budget by budget, each once.

    Args:
        recipes: keys of :class:`cfsp.Recipe`; those of its ``calibration`` may be some.
        budgets: fractions of the FFN channels, or such as "params=0.25".
        calibration: of recipes that leave it to the run.
        dtype: that the model is opened in.

    Raises:
        CfspError: an unknown key or name, or a value out of range.
    """
    found = []
    for budget in budgets:
        for own in recipes:
            settings = own.get("calibration") or {}
            if not isinstance(settings, Mapping):
                raise CfspError(f"calibration must be a mapping, got {settings!r}")
            values = {
                **SHARED,
                **own,
                **_budget(budget),
                "dtype": dtype,
                "calibration": {**dataclasses.asdict(calibration), **settings},
            }
            found.append(resolved(recipe_from_dict(values)))
    return list(dict.fromkeys(found))


def _budget(text: str) -> dict[str, Any]:
    if "=" in text:
        return {"budget": text}
    try:
        return {"sparsity": float(text)}
    except ValueError:
        raise CfspError(f"budget must be a fraction or such as params=0.25, got {text!r}") from None


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with the allocator and the compensation that are in force by name."""
    return dataclasses.replace(
        recipe,
        allocator=recipe.resolved_allocator,
        compensation=recipe.resolved_compensation,
        error_scale=recipe.resolved_error_scale,
    )


def public(recipe: Recipe) -> dict[str, Any]:
    """Plain values of a recipe, with a dataset's file by its name alone."""
    values = recipe.to_dict()
    values["calibration"]["dataset"] = Path(recipe.calibration.dataset).name
    return values


def calibration_kind(recipe: Recipe) -> str:
    """Names the first pass that a recipe needs, the same for all recipes that one can serve."""
    windows = f"{recipe.statistics_windows} windows"
    if recipe.cuts_attention:
        windows += ", with attention"
    if not recipe.sums_grams:
        return windows
    return f"{windows}, {recipe.scorer}, {recipe.resolved_compensation}, {recipe.damping:g}"
