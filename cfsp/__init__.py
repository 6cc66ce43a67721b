"""Structured FFN pruning of large language models.

Importing this registers the pruned architectures with transformers, so that
``AutoModelForCausalLM.from_pretrained`` loads a pruned folder without a trust flag. Neither torch
nor transformers is imported until something needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .auto_classes import know_pruned_models
from .errors import CfspError

if TYPE_CHECKING:
    from .api import calibrate, latency_table, plan, prune
    from .calibration.statistics import Statistics, load_statistics, save_statistics
    from .calibration.windows import Calibration
    from .checkpoints.documents import read_result
    from .checkpoints.exports import ExportResult, export
    from .checkpoints.folder import load
    from .costs.dry_run import estimate
    from .costs.estimates import Estimate
    from .costs.latency import LatencyTable
    from .evaluation.quality import Perplexity, perplexity
    from .evaluation.side_by_side import evaluate
    from .models.opening import open_model
    from .models.registration import register
    from .pruning.plan import PruningPlan
    from .pruning.plan_file import load_plan, save_plan
    from .pruning.recipe import Recipe, load_recipe
    from .recovery import Distillation, Recovery, RecoveryResult, recover
    from .report.page import write_report
    from .run.result import PruneResult

__version__ = "0.1.0"

_MODULES = {
    "api": ("calibrate", "latency_table", "plan", "prune"),
    "calibration.statistics": ("Statistics", "load_statistics", "save_statistics"),
    "calibration.windows": ("Calibration",),
    "checkpoints.documents": ("read_result",),
    "checkpoints.exports": ("ExportResult", "export"),
    "checkpoints.folder": ("load",),
    "costs.dry_run": ("estimate",),
    "costs.estimates": ("Estimate",),
    "costs.latency": ("LatencyTable",),
    "evaluation.quality": ("Perplexity", "perplexity"),
    "evaluation.side_by_side": ("evaluate",),
    "models.opening": ("open_model",),
    "models.registration": ("register",),
    "pruning.plan": ("PruningPlan",),
    "pruning.plan_file": ("load_plan", "save_plan"),
    "pruning.recipe": ("Recipe", "load_recipe"),
    "recovery": ("Distillation", "Recovery", "RecoveryResult", "recover"),
    "report.page": ("write_report",),
    "run.result": ("PruneResult",),
}
"""Where public names lie; a module is imported when one of its names is first used."""

__all__ = sorted(["CfspError", *(name for names in _MODULES.values() for name in names)])


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            found = globals()[name] = getattr(import_module(f".{module}", __name__), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


know_pruned_models()
