"""Structured FFN pruning of large language models after one calibration pass.

Importing this registers the pruned architectures with transformers, so that
``AutoModelForCausalLM.from_pretrained`` loads a pruned folder without a trust flag.
"""

from .api import PruneResult, calibrate, latency_table, plan, prune
from .calibration.statistics import Statistics, load_statistics, save_statistics
from .calibration.windows import Calibration
from .checkpoints.exports import ExportResult, export
from .checkpoints.folder import load
from .costs.dry_run import estimate
from .costs.estimates import Estimate
from .costs.latency import LatencyTable
from .errors import CfspError
from .evaluation.quality import Perplexity, perplexity
from .models.loading import open_model
from .models.registration import register
from .pruning.plan import PruningPlan
from .pruning.plan_file import load_plan, save_plan
from .pruning.ranking import with_ranking
from .pruning.recipe import Recipe, load_recipe
from .recovery import Distillation, Recovery, RecoveryResult, recover

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "CfspError",
    "Distillation",
    "Estimate",
    "ExportResult",
    "LatencyTable",
    "Perplexity",
    "PruneResult",
    "PruningPlan",
    "Recipe",
    "Recovery",
    "RecoveryResult",
    "Statistics",
    "calibrate",
    "estimate",
    "export",
    "latency_table",
    "load",
    "load_plan",
    "load_recipe",
    "load_statistics",
    "open_model",
    "perplexity",
    "plan",
    "prune",
    "recover",
    "register",
    "save_plan",
    "save_statistics",
    "with_ranking",
]

register()
