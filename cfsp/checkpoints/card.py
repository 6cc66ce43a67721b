"""The texts about a pruned model: its card, the section of a recovery, the fits in one line."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ..errors import printable
from ..pruning.compensation import FitRecord
from ..pruning.plan import PruningPlan
from ..pruning.refit import BlockRefit

Rows = Sequence[tuple[str, str, str]]
"""(title, before, after)."""


def model_card(
    plan: PruningPlan,
    record: Mapping[str, Any],
    sizes: Rows,
    stock: bool,
    auto: str,
    terms: Mapping[str, Any],
) -> str:
    """README.md with the hub's front matter. ``record``: recipe.yaml; ``stock``: whether it is an
    architecture of transformers itself; ``auto``: the Auto class that loads it; ``terms``: the
    license, as the front matter says it."""
    name, result = record["provenance"]["model"], record["result"]
    counts = plan.recipe.calibration.windows_by_dataset
    several = ", ".join(f"{_code(dataset)} ({count})" for dataset, count in counts.items())
    return _render(
        "card.md",
        front_matter=_yaml({**terms, "base_model": name}),
        name=name,
        plan=plan,
        sizes=sizes,
        perplexities=_perplexities("perplexity", result),
        datasets=several if len(counts) > 1 else _code(plan.recipe.calibration.dataset),
        fits=result.get("fits"),
        refits=result.get("refits"),
        stock=stock,
        no_attention=[
            n for n, own in enumerate(plan.blocks) if own.groups and not len(own.groups[0])
        ],
        auto=auto,
        task="text-generation" if auto == "AutoModelForCausalLM" else "image-text-to-text",
    )


def _without_attention(plan: PruningPlan) -> list[int]:
    """The blocks whose attention goes whole."""
    groups = [block.groups for block in plan.blocks]
    return [n for n, own in enumerate(groups) if own is not None and not len(own[0])]


def recovery_section(entry: Mapping[str, Any]) -> str:
    """What a recovery adds to README.md. ``entry``: what it adds to recipe.yaml."""
    result = entry["result"]
    perplexities = _perplexities("perplexity before and after", result)
    values = {**result, "settings": entry["settings"], "perplexities": perplexities}
    return _render("recovery.md", **values)


def _render(template: str, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(error=_error, range=_range, code=_code, plain=_plain)
    return environment.get_template(template).render(values)


def _yaml(values: Mapping[str, Any]) -> str:
    """Lines of front matter; names outside ASCII as they are if they can be shown."""
    lines = (
        yaml.safe_dump({key: value}, allow_unicode=str(value).isprintable(), width=math.inf)
        for key, value in values.items()
    )
    return "".join(lines).rstrip("\n")


def _plain(text: str) -> str:
    """Text in which Markdown and HTML find no markup."""
    return (
        re.sub(r"([\\`*\[\]|~])", r"\\\1", printable(text))
        .replace("&", "&amp;")
        .replace("<", "&lt;")
    )


def _code(text: str) -> str:
    """Text as inline code, in a table too."""
    shown = printable(text).replace("|", r"\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence} {shown} {fence}" if "`" in shown else f"{fence}{shown}{fence}"


def _perplexities(title: str, result: Mapping[str, Any]) -> Rows:
    """Of all windows, then of each of several datasets."""
    before, after = result["perplexity_before"], result["perplexity_after"]
    if before is None or after is None:
        return []
    windows = f"{before['windows']} windows of {before['seqlen']} tokens"
    label = f"{title}, {_code(before['dataset'])}, {windows}"
    rows = [(label, before["perplexity"], after["perplexity"])]
    for name, value in before.get("by_dataset", {}).items():
        rows.append((f"of these, {_code(name)}", value, after["by_dataset"][name]))
    return [(label, f"{was:.2f}", f"{now:.2f}") for label, was, now in rows]


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _error(value: float | None) -> str:
    return f"{value:.4g}" if value is not None else "not known"


def fits_to_dicts(fits: Sequence[Sequence[FitRecord]]) -> list[dict[str, Any]]:
    """Plain values of each block, means over its FFNs or experts; ``applied`` of ``ffns`` have the
    fit, the others keep the columns that they had."""
    return [
        {
            "block": number,
            "ffns": len(records),
            "applied": sum(record.applied for record in records),
            "error_before": _mean([record.error_before for record in records]),
            "error_after": _mean([record.error_after for record in records]),
            "damping": max(record.damping for record in records),
        }
        for number, records in enumerate(fits)
        if records
    ]


def fits_summary(fits: Sequence[Sequence[FitRecord]]) -> str:
    """One line for a terminal; ``fits``: [block][FFN or expert]."""
    records = [record for block in fits for record in block]
    judged = [
        (fit.error_before, fit.error_after if fit.applied else fit.error_before)
        for fit in records
        if fit.error_before is not None and fit.error_after is not None
    ]
    line = f"{sum(fit.applied for fit in records)} of {len(records)} FFNs fitted"
    return line + _change("their output", judged)


def refits_summary(refits: Sequence[BlockRefit]) -> str:
    judged = [(refit.errors[0], min(refit.errors)) for refit in refits if refit.errors]
    line = f"{sum(refit.kept > 0 for refit in refits)} of {len(refits)} fits kept"
    return line + _change("the blocks", judged)


def _change(of: str, errors: Sequence[tuple[float, float]]) -> str:
    """The rest of a summary: errors (before, after), on average."""
    if not errors:
        return "; nothing was held out to judge by"
    before, after = (_error(_mean(column)) for column in zip(*errors, strict=True))
    return f"; held-out error of {of} {before} -> {after} on average"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None
