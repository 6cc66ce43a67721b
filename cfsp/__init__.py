"""Structured FFN pruning of large language models after one calibration pass.

Importing this registers the pruned architectures with transformers, so that
``AutoModelForCausalLM.from_pretrained`` loads a pruned folder without a trust flag.
"""

from .checkpoint import load
from .dry_run import estimate
from .errors import CfspError
from .estimate import Estimate
from .evaluation import Perplexity, perplexity
from .exports import ExportResult, export
from .latency import LatencyTable
from .models import open_model
from .pipeline import PruneResult, calibrate, latency_table, plan, prune
from .plan import PruningPlan, load_plan, save_plan
from .ranking import with_ranking
from .recipe import Calibration, Recipe, load_recipe
from .recovery import Distillation, Recovery, RecoveryResult, recover
from .registration import register
from .statistics import Statistics, load_statistics, save_statistics

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
