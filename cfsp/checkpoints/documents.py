"""What a pruned folder says of itself, and what ``cfsp evaluate --json`` measured."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import CfspError
from ..models.layouts import PRUNED_PREFIX
from ..pruning.plan import PruningPlan
from ..pruning.plan_file import load_plan
from ..pruning.refit import BlockRefit


@dataclass(frozen=True)
class Result:
    """The documents of one pruned folder."""

    folder: Path
    plan: PruningPlan
    record: Mapping[str, Any]
    """recipe.yaml: ``recipe``, ``provenance``, ``result``."""
    config: Mapping[str, Any]
    """config.json."""
    nbytes: int
    """Of the weight files."""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def dense_name(self) -> str:
        """What the dense model was called: hub id, folder or file name."""
        return str(self.provenance.get("model", "unknown model"))

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Model, fingerprint, calibration and versions."""
        return _mapping(self.record.get("provenance"))

    @property
    def measured(self) -> Mapping[str, Any]:
        """Parameters and perplexity, before and after."""
        return _mapping(self.record.get("result"))

    @property
    def fits(self) -> list[Mapping[str, Any]]:
        """What least squares came to, see :func:`fits.fits_to_dicts`; [] without them."""
        return _mappings(self.measured.get("fits"))

    @property
    def refits(self) -> list[BlockRefit]:
        """What fitting blocks again came to; [] where they were not."""
        found = map(_refit, _mappings(self.measured.get("refits")))
        return [refit for refit in found if refit is not None]

    @property
    def recoveries(self) -> list[Mapping[str, Any]]:
        """``settings`` and ``result`` of each ``cfsp recover`` since it was pruned."""
        return _mappings(self.record.get("recovery"))

    @property
    def family(self) -> str:
        """``model_type`` of the architecture that it was before it was pruned."""
        return str(self.config.get("model_type", "")).removeprefix(PRUNED_PREFIX)

    @property
    def stock(self) -> bool:
        """Whether it is an architecture of transformers itself."""
        return not str(self.config.get("model_type", "")).startswith(PRUNED_PREFIX)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return (
        [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []
    )


def _refit(entry: Mapping[str, Any]) -> BlockRefit | None:
    """What :meth:`cfsp.pruning.refit.BlockRefit.to_dict` takes apart; None for anything else."""
    try:
        errors = tuple(float(error) for error in entry["errors"])
        refit = BlockRefit(int(entry["block"]), str(entry["way"]), errors, int(entry["kept"]))
    except (KeyError, TypeError, ValueError):
        return None
    return refit if not errors or refit.kept in range(len(errors)) else None


def read_result(folder: str | Path) -> Result:
    """Read the documents of a folder that ``cfsp prune`` wrote.

    Raises:
        CfspError: a document is missing or not what it should be.
    """
    folder = Path(folder)
    if not (folder / "plan.json").is_file():
        raise CfspError(f"{folder} has no plan.json; a report is of a folder that cfsp prune wrote")
    try:
        record = yaml.safe_load((folder / "recipe.yaml").read_text())
        config = json.loads((folder / "config.json").read_text())
        nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CfspError(f"cannot read {folder}: {' '.join(str(error).split())}") from None
    for name, document in (("recipe.yaml", record), ("config.json", config)):
        if not isinstance(document, dict):
            raise CfspError(f"{folder / name} must be a mapping")
    return Result(folder, load_plan(folder / "plan.json"), record, config, nbytes)


def read_evaluation(path: str | Path) -> list[dict[str, Any]]:
    """The models of a file that holds what ``cfsp evaluate --json`` printed.

    Raises:
        CfspError: unreadable, or something else.
    """
    try:
        document = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise CfspError(f"cannot read evaluation {path}: {error}") from None
    models = document.get("models", [document]) if isinstance(document, dict) else None
    if not isinstance(models, list) or not all(
        isinstance(model, dict) and isinstance(model.get("model"), str) for model in models
    ):
        raise CfspError(f"{path} is not what cfsp evaluate --json prints")
    return models
