"""Training after pruning: importance-guided LoRA or the FFNs whole, merged into the same format."""

from .report import RecoveryReport
from .run import RecoveryResult, recover
from .settings import Distillation, Recovery

__all__ = ["Distillation", "Recovery", "RecoveryReport", "RecoveryResult", "recover"]
