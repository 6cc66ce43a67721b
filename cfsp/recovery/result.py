"""What a recovery did and measured: the caller's result, and its entry in recipe.yaml."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..checkpoints.documents import drop_times_
from ..evaluation.quality import Perplexity
from .settings import Recovery


@dataclass(frozen=True)
class RecoveryReport:
    """What was trained, how, and what it gained."""

    name: str
    """The pruned model's name."""
    settings: Recovery
    """The settings, all resolved."""
    ranks: tuple[int, ...]
    """The rank of each block's adapters, 0 for a block without; () where no block has any."""
    trained_parameters: int
    uniform_parameters: int
    """Parameters that adapters of the uniform rank would have; without adapters, those trained."""
    losses: tuple[float, ...]
    """Training loss of every step."""
    perplexity_before: Perplexity | None
    perplexity_after: Perplexity | None
    versions: dict[str, str]

    @property
    def tokens(self) -> int:
        """Tokens that it was trained on."""
        text = self.settings.text
        return text.samples * text.seqlen

    def to_dict(self) -> dict[str, Any]:
        """The result, as plain values."""
        before, after = self.perplexity_before, self.perplexity_after
        return {
            "ranks": list(self.ranks),
            "trained_parameters": self.trained_parameters,
            "uniform_parameters": self.uniform_parameters,
            "tokens": self.tokens,
            "losses": list(self.losses),
            "perplexity_before": before.to_dict() if before is not None else None,
            "perplexity_after": after.to_dict() if after is not None else None,
        }


def recovery_document(report: RecoveryReport) -> dict[str, Any]:
    """One entry of ``recovery`` in recipe.yaml: equal runs give equal documents."""
    result = report.to_dict()
    drop_times_(result)
    return {
        "settings": report.settings.to_dict(),
        "provenance": {"model": report.name, "versions": report.versions},
        "result": result,
    }


@dataclass(frozen=True)
class RecoveryResult:
    """What came of a recovery."""

    model: PreTrainedModel
    """Reloaded from ``out``, in eval mode on its device."""
    tokenizer: Any
    report: RecoveryReport
    out: Path
