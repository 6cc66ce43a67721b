"""The record of a recovery, and what it adds to recipe.yaml and to the model card."""

from dataclasses import dataclass
from typing import Any

from ..evaluation.quality import Perplexity, perplexities_by_dataset
from .settings import Recovery


@dataclass(frozen=True)
class RecoveryReport:
    """What was trained, how, and what it gained."""

    name: str
    """The pruned model."""
    settings: Recovery
    """Resolved."""
    ranks: tuple[int, ...]
    """Of every block, 0 without adapters; () where there are none."""
    trained_parameters: int
    uniform_parameters: int
    """What adapters of the uniform rank would have; the trained ones without adapters."""
    losses: tuple[float, ...]
    """Training loss of every step."""
    perplexity_before: Perplexity | None
    perplexity_after: Perplexity | None
    versions: dict[str, str]

    @property
    def tokens(self) -> int:
        """Trained on."""
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
    for measured in (result["perplexity_before"], result["perplexity_after"]):
        if measured is not None:
            del measured["seconds"]
    return {
        "settings": report.settings.to_dict(),
        "provenance": {"model": report.name, "versions": report.versions},
        "result": result,
    }


CARD = """
## Recovery

Trained after pruning: {how}.

| choice | value |
|---|---|
| text | `{settings.dataset}`, {tokens:,} tokens: {settings.steps} steps of {settings.batch_size} \
windows of {settings.seqlen}, seed {settings.seed} |
| peak learning rate | {settings.learning_rate:g} |
| parameters trained | {trained:,} |
| teacher | {teacher} |
{perplexity}
"""


def card_section(report: RecoveryReport) -> str:
    """What a recovery adds to README.md."""
    settings, distillation = report.settings, report.settings.distillation
    before, after = report.perplexity_before, report.perplexity_after
    perplexity = "| perplexity | not measured |"
    if before is not None and after is not None:
        perplexity = (
            f"| perplexity before and after, `{after.dataset}`, {after.windows} windows of "
            f"{after.seqlen} tokens | {before.perplexity:.2f} -> {after.perplexity:.2f} |"
        )
        for name, was, now in perplexities_by_dataset(before, after):
            perplexity += f"\n| of these, `{name}` | {was:.2f} -> {now:.2f} |"
    how = "all parameters of the FFNs"
    if settings.method == "lora":
        how = (
            f"low-rank adapters on the projections ({settings.targets}), merged; ranks by "
            f"{settings.allocation}, {min(filter(None, report.ranks))} to {max(report.ranks)}"
        )
    return CARD.format(
        how=how,
        settings=settings,
        tokens=report.tokens,
        trained=report.trained_parameters,
        teacher=f"`{distillation.teacher}`" if distillation is not None else "none",
        perplexity=perplexity,
    )
