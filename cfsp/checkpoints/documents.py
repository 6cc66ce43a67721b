"""What a pruned folder says of itself: plan.json, recipe.yaml and README.md, read and written."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CfspError
from ..io.documents import read_json, read_text, read_yaml, to_yaml
from ..models.layouts import PRUNED_PREFIX
from ..pruning.plan import PruningPlan
from ..pruning.plan_file import load_plan, save_plan
from ..pruning.refit import BlockRefit
from ..typed import decode
from .card import Rows, model_card, recovery_section
from .terms import front_matter_terms

PLAN, RECIPE, CARD = "plan.json", "recipe.yaml", "README.md"


@dataclass(frozen=True)
class PrunedFolder:
    """A pruned model to recover; ``record`` is its recipe.yaml, ``card`` its README.md."""

    folder: Path
    plan: PruningPlan
    record: Mapping[str, Any]
    card: str


@dataclass(frozen=True)
class Result:
    """The documents of a pruned folder and what they say, for a report."""

    folder: Path
    plan: PruningPlan
    record: Mapping[str, Any]
    """recipe.yaml: ``recipe``, ``provenance``, ``result``, and ``recovery`` after one."""
    config: Mapping[str, Any]
    nbytes: int  # of the weight files

    @property
    def name(self) -> str:
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
        """What least squares came to, see :func:`card.fits_to_dicts`; [] without them."""
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
    def auto_class(self) -> str:
        """See :func:`auto_class_name`."""
        return auto_class_name(self.config)

    @property
    def stock(self) -> bool:
        """Whether it is an architecture of transformers itself."""
        return self.family == str(self.config.get("model_type", ""))


def auto_class_name(config: Mapping[str, Any]) -> str:
    """The Auto class that loads a model, by its config.json."""
    return "AutoModelForImageTextToText" if "text_config" in config else "AutoModelForCausalLM"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    entries = value if isinstance(value, list) else []
    return [entry for entry in entries if isinstance(entry, Mapping)]


def _refit(entry: Mapping[str, Any]) -> BlockRefit | None:
    """The refit that these are the plain values of; None for anything else."""
    try:
        errors = tuple(float(error) for error in entry["errors"])
        refit = BlockRefit(int(entry["block"]), str(entry["way"]), errors, int(entry["kept"]))
    except (KeyError, TypeError, ValueError):
        return None
    return refit if not errors or refit.kept in range(len(errors)) else None


def read_result(folder: str | Path) -> Result:
    """Read the documents of a folder that ``cfsp prune`` wrote, for a report.

    Raises:
        CfspError: a document is missing or not what it should be.
    """
    folder = Path(folder)
    if not (folder / PLAN).is_file():
        raise CfspError(f"{folder} has no {PLAN}; a report is of a folder that cfsp prune wrote")
    record = _record(folder)
    config = _config(folder)
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Result(folder, load_plan(folder / PLAN), record, config, nbytes)


def read_pruned(folder: Path) -> PrunedFolder:
    """Read what a recovery needs; CfspError where a document is missing or not valid."""
    for name in (PLAN, RECIPE, CARD):
        if not (folder / name).is_file():
            raise CfspError(f"{folder} is not a folder that cfsp prune wrote: no {name}")
    return PrunedFolder(folder, load_plan(folder / PLAN), _record(folder), read_text(folder / CARD))


@dataclass(frozen=True)
class _Record:
    """recipe.yaml."""

    recipe: dict[str, Any]
    provenance: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    recovery: tuple[dict[str, Any], ...] = ()


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json", finite=False)  # transformers writes Infinity
    if not isinstance(config, dict):
        raise CfspError(f"{folder / 'config.json'} must be a mapping")
    return config


def _record(folder: Path) -> dict[str, Any]:
    file = folder / RECIPE
    record = read_yaml(file)
    decode(_Record, record, f"{file} is not a recipe that cfsp wrote", "recipe.yaml")
    return record


def write_documents(
    folder: Path,
    plan: PruningPlan,
    record: Mapping[str, Any],
    sizes: Rows,
    stock: bool,
    source: Path | None,
) -> None:
    """plan.json, recipe.yaml and README.md of a pruned model whose config.json is there, see
    :func:`card.model_card`; ``source``: the folder of the dense one."""
    save_plan(plan, folder / PLAN)
    auto, terms = auto_class_name(_config(folder)), front_matter_terms(source)
    _write(folder, record, model_card(plan, record, sizes, stock, auto, terms))


def add_recovery(pruned: PrunedFolder, folder: Path, entry: Mapping[str, Any]) -> None:
    """The documents again, with one recovery more in recipe.yaml's list and in the card."""
    shutil.copyfile(pruned.folder / PLAN, folder / PLAN)
    record = {**pruned.record, "recovery": [*pruned.record.get("recovery", []), entry]}
    _write(folder, record, pruned.card + recovery_section(entry))


def _write(folder: Path, record: Mapping[str, Any], card: str) -> None:
    (folder / RECIPE).write_text(to_yaml(record), encoding="utf-8")
    (folder / CARD).write_text(card, encoding="utf-8")


def drop_times_(result: dict[str, Any]) -> None:
    """Take out how long measuring took, so that equal runs give equal documents."""
    for measured in (result["perplexity_before"], result["perplexity_after"]):
        if measured is not None:
            del measured["seconds"]


def read_evaluation(path: str | Path) -> list[dict[str, Any]]:
    """The models of a file that holds what ``cfsp evaluate --json`` printed, or CfspError."""
    document = read_json(path, "evaluation ")
    several = isinstance(document, dict) and "models" in document
    models = document["models"] if several else [document]
    wrong = f"{path} is not what cfsp evaluate --json prints"
    for model in decode(tuple[dict[str, Any], ...], models, wrong, "models"):
        decode(str, model.get("model"), wrong, "model")
    return models
