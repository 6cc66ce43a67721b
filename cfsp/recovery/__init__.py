"""Training after pruning: importance-guided LoRA or the FFNs whole, merged into the same format."""

from .result import RecoveryReport, RecoveryResult
from .run import recover
from .settings import Distillation, Recovery

__all__ = ["Distillation", "Recovery", "RecoveryReport", "RecoveryResult", "recover"]
