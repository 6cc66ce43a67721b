"""The record of a run, and the two documents made of it: recipe.yaml's and the model card."""

from dataclasses import dataclass
from typing import Any

from ..calibration.statistics import Statistics
from ..costs.footprint import Footprints
from ..costs.latency import LatencyTable
from ..evaluation.quality import Perplexity, perplexities_by_dataset
from ..models.channels import FitRecord
from ..pruning.plan import PruningPlan
from ..pruning.recipe import Calibration
from ..pruning.refit import BlockRefit
from .fits import fits_section, fits_to_dicts, refits_section


@dataclass(frozen=True)
class PruneReport:
    """What a run did and measured."""

    name: str
    """The dense model: hub id, folder or file name."""
    plan: PruningPlan
    statistics: Statistics | None
    fits: tuple[tuple[FitRecord, ...], ...]
    """What compensations that fit came to, in each FFN and expert of each block; () for others."""
    refits: tuple[BlockRefit, ...]
    """What fitting blocks again after the cut came to; () where they were not."""
    sizes: Footprints
    """What the model took and takes."""
    table: LatencyTable | None
    """That seconds are by."""
    perplexity_before: Perplexity | None
    perplexity_after: Perplexity | None
    stock: bool
    """Whether the result is an architecture of transformers itself."""
    versions: dict[str, str]

    @property
    def parameters_before(self) -> int:
        """Of the dense model; tied ones once."""
        return self.sizes.before.parameters

    @property
    def parameters_after(self) -> int:
        """Of the pruned model; tied ones once."""
        return self.sizes.after.parameters

    def to_dict(self) -> dict[str, Any]:
        """The measured part, as plain values."""
        before, after = self.perplexity_before, self.perplexity_after
        return {
            "sparsity": self.plan.sparsity,
            "widths": list(self.plan.widths),
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "sizes": self.sizes.to_dict(),
            "perplexity_before": before.to_dict() if before is not None else None,
            "perplexity_after": after.to_dict() if after is not None else None,
            **({"fits": fits_to_dicts(self.fits)} if any(self.fits) else {}),
            **({"refits": [refit.to_dict() for refit in self.refits]} if self.refits else {}),
        }


def recipe_document(report: PruneReport) -> dict[str, Any]:
    """The recipe with everything that a run depends on, for recipe.yaml.

    What was measured is in it but for times: equal runs give equal documents.
    """
    statistics = report.statistics
    result = report.to_dict()
    for measured in (result["perplexity_before"], result["perplexity_after"]):
        if measured is not None:
            del measured["seconds"]
    return {
        "recipe": report.plan.recipe.to_dict(),
        "provenance": {
            "model": report.name,
            "model_fingerprint": report.plan.model_fingerprint,
            "statistics": statistics.provenance if statistics is not None else None,
            "versions": report.versions,
            "latency_table": report.table.to_dict() if report.table is not None else None,
        },
        "result": result,
    }


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
base_model: {name}
tags:
- pruned
- cfsp
---

# {name}, {sparsity:.1%} of FFN channels removed

Structured pruning with [CFSP](https://arxiv.org/abs/2409.13199): a smaller dense model, with a
width of its own per block.

| | before | after |
|---|---:|---:|
{sizes}
| FFN channels per block | {size_before} | {size_after} |
{perplexity}

| choice | value |
|---|---|
| scorer | `{recipe.scorer}` |
| allocator | `{recipe.resolved_allocator}` |
| compensation | `{recipe.resolved_compensation}` |
| block importance | `{recipe.importance}` |
| width multiple | {recipe.width_multiple} |
| calibration | {calibration.samples} windows of {calibration.seqlen} tokens of \
{datasets}, seed {calibration.seed} |

`recipe.yaml` holds every setting, version and hash, `plan.json` the kept channels.
{fits}
## Use

```python
{usage}
```
"""

TRUSTED = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)"""

REGISTERED = """

# or, with the package cfsp installed, without the trust flag:
import cfsp
model = cfsp.load(FOLDER)"""


def _range(values: tuple[int, ...]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _perplexity_row(report: PruneReport) -> str:
    before, after = report.perplexity_before, report.perplexity_after
    if before is None or after is None:
        return "| perplexity | not measured | not measured |"
    label = f"perplexity, `{before.dataset}`, {before.windows} windows of {before.seqlen} tokens"
    rows = [f"| {label} | {before.perplexity:.2f} | {after.perplexity:.2f} |"]
    for name, was, now in perplexities_by_dataset(before, after):
        rows.append(f"| of these, `{name}` | {was:.2f} | {now:.2f} |")
    return "\n".join(rows)


def _datasets(calibration: Calibration) -> str:
    """`wikitext2`, or `wikitext2` (96) and so on where they are several."""
    counts = calibration.windows_by_dataset
    if len(counts) == 1:
        return f"`{calibration.dataset}`"
    return ", ".join(f"`{name}` ({count})" for name, count in counts.items())


def model_card(report: PruneReport) -> str:
    """README.md of a result, Markdown with the hub's front matter."""
    plan, recipe = report.plan, report.plan.recipe
    usage = (
        TRUSTED.replace(", trust_remote_code=True", "") if report.stock else TRUSTED + REGISTERED
    )
    return CARD.format(
        name=report.name,
        sparsity=plan.sparsity,
        sizes="\n".join(f"| {' | '.join(row)} |" for row in report.sizes.rows()),
        size_before=_range(tuple(block.intermediate_size for block in plan.blocks)),
        size_after=_range(plan.widths),
        perplexity=_perplexity_row(report),
        recipe=recipe,
        calibration=recipe.calibration,
        datasets=_datasets(recipe.calibration),
        fits=fits_section(report.fits) + refits_section(report.refits),
        usage=usage,
    )
