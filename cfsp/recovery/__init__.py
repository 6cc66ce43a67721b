"""Training after pruning: importance-guided LoRA or the FFNs whole, merged into the same format."""

from .run import RecoveryReport, RecoveryResult, recover
from .settings import Distillation, Recovery

__all__ = ["Distillation", "Recovery", "RecoveryReport", "RecoveryResult", "recover"]
