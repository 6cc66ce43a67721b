"""The record of a run, and the two documents made of it: recipe.yaml's and the model card."""

from typing import Any

from ..calibration.windows import Calibration
from ..evaluation.quality import perplexities_by_dataset
from .fits import fits_section, refits_section

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


def _perplexity_row(report: Any) -> str:
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


def model_card(report: Any) -> str:
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
