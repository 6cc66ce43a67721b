"""What a pruning run did and measured: the caller's result, and the record in recipe.yaml."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration.statistics import Statistics
from ..checkpoints.card import fits_to_dicts
from ..checkpoints.documents import drop_times_
from ..checkpoints.folder import load
from ..costs.footprint import Footprints
from ..costs.latency import LatencyTable
from ..evaluation.quality import Perplexity
from ..models.loading import quiet_loading
from ..pruning.compensation import FitRecord
from ..pruning.plan import PruningPlan
from ..pruning.plan_file import depth_to_dict
from ..pruning.refit import BlockRefit


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """What a run did and measured."""

    name: str
    """The dense model: hub id, folder or file name."""
    plan: PruningPlan
    statistics: Statistics | None
    fitted_sha256: str | None
    """Of the calibration tokens that went through the dense blocks as they were cut; None: none
    did."""
    fits: tuple[tuple[FitRecord, ...], ...]
    """Least-squares fits of every FFN and expert of every block; () for other compensations."""
    refits: tuple[BlockRefit, ...]
    """Blocks that were fitted again after the cut; () where none were."""
    sizes: Footprints
    table: LatencyTable | None
    """The latency table that the seconds of ``sizes`` come from."""
    perplexity_before: Perplexity | None
    perplexity_after: Perplexity | None
    stock: bool
    """Whether the result is an architecture of transformers itself."""
    versions: dict[str, str]

    @property
    def parameters_before(self) -> int:
        """Parameters of the dense model; tied ones once."""
        return self.sizes.before.parameters

    @property
    def parameters_after(self) -> int:
        """Parameters of the pruned model; tied ones once."""
        return self.sizes.after.parameters

    def to_dict(self) -> dict[str, Any]:
        """The measured part, as plain values."""
        before, after = self.perplexity_before, self.perplexity_after
        return {
            "sparsity": self.plan.sparsity,
            **({"depth": depth_to_dict(depth)} if (depth := self.plan.depth) is not None else {}),
            "widths": list(self.plan.widths),
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "sizes": self.sizes.to_dict(),
            "perplexity_before": before.to_dict() if before is not None else None,
            "perplexity_after": after.to_dict() if after is not None else None,
            **({"fits": fits_to_dicts(self.fits)} if any(self.fits) else {}),
            **({"refits": list(map(asdict, self.refits))} if self.refits else {}),
        }


def recipe_document(report: PruneReport) -> dict[str, Any]:
    """The content of recipe.yaml; times are left out, so that equal runs give equal documents."""
    statistics, result = report.statistics, report.to_dict()
    drop_times_(result)
    return {
        "recipe": report.plan.recipe.to_dict(),
        "provenance": {
            "model": report.name,
            "model_fingerprint": report.plan.model_fingerprint,
            "statistics": statistics.provenance if statistics is not None else None,
            "fitted_tokens_sha256": report.fitted_sha256,
            "versions": report.versions,
            "latency_table": report.table.to_dict() if report.table is not None else None,
        },
        "result": result,
    }


@dataclass(frozen=True)
class PruneResult:
    """The pruned model and the record of the run."""

    tokenizer: Any
    report: PruneReport
    out: Path | None
    live: PreTrainedModel | None
    """The pruned model where it is in memory: one that was given live, or that has no ``out``."""
    device: torch.device

    @cached_property
    def model(self) -> PreTrainedModel:
        """The pruned model in eval mode on its device; one pruned from disk to disk is read from
        ``out`` when first asked for."""
        if self.live is not None:
            return self.live
        if self.out is None:
            raise ValueError("a result without a folder has a live model")
        with quiet_loading():
            return load(self.out, device=str(self.device))

    @property
    def plan(self) -> PruningPlan:
        """What every block kept."""
        return self.report.plan

    @property
    def statistics(self) -> Statistics | None:
        """The calibration; None where a plan was applied without any."""
        return self.report.statistics
