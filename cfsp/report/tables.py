"""What was measured, as the figures, tables and bars of a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.documents import Result
from ..io.files import format_bytes
from . import figures

Values = Mapping[str, Any]

SPEEDS = {
    "prefill, tokens/s": ("speed", "prefill_tokens_per_second"),
    "decode, tokens/s": ("speed", "decode_tokens_per_second"),
}
MEMORY = ("speed", "peak_memory_bytes")


def number_at(values: Any, *path: str) -> float | None:
    """The number at a path of nested mappings, None where there is none."""
    for name in path:
        values = values.get(name) if isinstance(values, Mapping) else None
    found = isinstance(values, int | float) and not isinstance(values, bool)
    return values if found else None


def series(position: int) -> str:
    """The class that gives a result its colour."""
    return f"series-{position % figures.SERIES}"


def bars(rows: Sequence[tuple[str, float, str, str]]) -> list[dict[str, str]]:
    """Bars from zero, of (label, value, text, class), in percent of the longest."""
    longest = max(value for _, value, _, _ in rows) or 1
    return [
        {"label": label, "text": text, "kind": kind, "percent": f"{100 * value / longest:.2f}"}
        for label, value, text, kind in rows
    ]


def perplexities(result: Result) -> dict[str, Any] | None:
    """Of the dense model, the pruned one, and after each recovery that was measured on the same
    text; on what, and bars. None where it was not measured."""
    steps = [
        ("dense", result.measured.get("perplexity_before")),
        ("pruned", result.measured.get("perplexity_after")),
    ]
    for recovery in result.recoveries:
        found = recovery.get("result")
        steps.append(
            ("recovered", found.get("perplexity_after") if isinstance(found, Mapping) else None)
        )
    on = _text_of(steps[0][1])
    rows = []
    for label, measured in steps:
        value = number_at(measured, "perplexity")
        if value is not None and _text_of(measured) == on:
            rows.append((label, value, f"{value:,.2f}", "other" if label == "dense" else "kept"))
    if [label for label, *_ in rows[:2]] != ["dense", "pruned"]:
        return None
    return {"before": rows[0][1], "after": rows[-1][1], "on": on, "bars": bars(rows)}


def _text_of(measured: Any) -> str:
    """What a perplexity was measured on."""
    if not isinstance(measured, Mapping):
        return ""
    dataset, windows, seqlen = (measured.get(key) for key in ("dataset", "windows", "seqlen"))
    return f"{dataset}, {windows} windows of {seqlen} tokens"


def tiles(result: Result, evaluations: Sequence[Values]) -> list[dict[str, str]]:
    """The figures that matter most, each with what it was before."""
    plan = result.plan
    found = []
    before = number_at(result.measured, "parameters_before")
    after = number_at(result.measured, "parameters_after")
    if before and after:
        found.append(_tile("parameters", before, after, "{:,.0f}"))
    channels = sum(block.intermediate_size for block in plan.blocks)
    found.append(_tile("FFN channels", channels, sum(plan.widths), "{:,.0f}"))
    pair = perplexities(result)
    if pair is not None:
        found.append(_tile("perplexity", pair["before"], pair["after"], "{:,.2f}"))
    dense, own = (_entry(evaluations, name) for name in (result.dense_name, result.name))
    for title, path in SPEEDS.items():
        slow, fast = number_at(dense, *path), number_at(own, *path)
        if slow and fast:
            found.append(_tile(title, slow, fast, "{:,.1f}"))
    found.append({"title": "weight files", "after": format_bytes(result.nbytes)})
    return found


def _tile(title: str, before: float, after: float, form: str) -> dict[str, str]:
    change = f"{after / before - 1:+.1%}".replace("-", "−")
    return {
        "title": title,
        "before": form.format(before),
        "after": form.format(after),
        "change": change,
    }


def _entry(evaluations: Sequence[Values], name: str) -> Values | None:
    """The first evaluation of a model of that name, wherever it lay."""
    wanted = Path(name).name
    return next((e for e in evaluations if _last_part(e) == wanted), None)


def _last_part(evaluation: Values) -> str:
    """The name of a folder or of a hub id."""
    return Path(str(evaluation["model"])).resolve().name


def compared(results: Sequence[Result], labels: Sequence[str]) -> dict[str, Any]:
    """Several results beside each other: a table, widths, and perplexity on the same text."""
    rows = []
    for result, label in zip(results, labels, strict=True):
        recipe, pair = result.plan.recipe, perplexities(result)
        after = number_at(result.measured, "parameters_after")
        rows.append(
            {
                "label": label,
                "scorer": recipe.scorer,
                "allocator": recipe.resolved_allocator,
                "compensation": recipe.resolved_compensation,
                "sparsity": f"{result.plan.sparsity:.1%}",
                "parameters": "–" if after is None else f"{after:,}",
                "before": f"{pair['before']:,.2f}" if pair else "–",
                "after": f"{pair['after']:,.2f}" if pair else "–",
                "bytes": format_bytes(result.nbytes),
            }
        )
    return {
        "rows": rows,
        "widths": figures.widths_compared(
            [(label, result.plan) for label, result in zip(labels, results, strict=True)]
        ),
        "perplexity": _perplexities_compared(results, labels),
    }


def _perplexities_compared(
    results: Sequence[Result], labels: Sequence[str]
) -> dict[str, Any] | None:
    """On what, and bars of the results that were measured, after the dense model's where all are of
    the same; None for fewer than two, or where texts differ."""
    measured = [
        (pair, result.dense_name, (label, pair["after"], f"{pair['after']:,.2f}", series(position)))
        for position, (result, label) in enumerate(zip(results, labels, strict=True))
        if (pair := perplexities(result)) is not None
    ]
    if len(measured) < 2 or len({pair["on"] for pair, _, _ in measured}) > 1:
        return None
    first = measured[0][0]
    dense = {(name, f"{pair['before']:,.2f}") for pair, name, _ in measured}
    rows = [("dense", first["before"], text, "other") for _, text in dense if len(dense) == 1]
    return {"on": first["on"], "bars": bars([*rows, *(bar for _, _, bar in measured)])}


def evaluation_table(evaluations: Sequence[Values], results: Sequence[Result]) -> dict[str, Any]:
    """What ``cfsp evaluate`` measured: a table, and bars of each measure that all models have.

    Speeds are told with their ratio to the first model's.
    """
    names = [str(model["model"]) for model in evaluations]
    short = [_last_part(model) for model in evaluations]
    labels = short if len(set(short)) == len(short) else names
    folders = [result.name for result in results]
    kinds = [series(folders.index(name)) if name in folders else "other" for name in short]
    measures = []
    for title, form, path in _measures(evaluations):
        values = [number_at(model, *path) for model in evaluations]
        texts = ["–" if value is None else form(value) for value in values]
        if path in SPEEDS.values():
            texts[1:] = [_with_ratio(*pair, values[0]) for pair in zip(texts, values, strict=True)][
                1:
            ]
        known = [value for value in values if value is not None]
        whole = len(known) == len(labels) > 1
        rows = list(zip(labels, known, texts, kinds, strict=True)) if whole else []
        measures.append({"title": title, "texts": texts, "bars": bars(rows) if rows else None})
    return {"labels": labels, "measures": measures}


def _with_ratio(text: str, value: float | None, reference: float | None) -> str:
    return f"{text} ({value / reference:.2f}x)" if value and reference else text


def _measures(evaluations: Sequence[Values]) -> list[tuple[str, Any, tuple[str, ...]]]:
    """(title, format, path) of everything that some model has."""
    every: list[tuple[str, Any, tuple[str, ...]]] = [
        ("parameters", "{:,}".format, ("parameters",)),
        ("perplexity", "{:,.2f}".format, ("perplexity",)),
        *((title, "{:,.1f}".format, path) for title, path in SPEEDS.items()),
        ("peak memory", format_bytes, MEMORY),
    ]
    for model in evaluations:
        tasks = model.get("tasks")
        for task, metrics in tasks.items() if isinstance(tasks, Mapping) else ():
            for metric in metrics if isinstance(metrics, Mapping) else ():
                entry = (f"{task}, {metric}", "{:.4f}".format, ("tasks", task, metric))
                if entry[2] not in [path for _, _, path in every] and "stderr" not in metric:
                    every.append(entry)
    return [
        (title, form, path)
        for title, form, path in every
        if any(number_at(model, *path) is not None for model in evaluations)
    ]
