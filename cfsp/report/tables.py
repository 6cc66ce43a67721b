"""What was measured, as the tiles, tables and bars of a report."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.documents import Result
from ..io.files import format_bytes
from ..typed import is_finite
from .svg import series

Values = Mapping[str, Any]
Bar = tuple[str, float, str, str]
"""(label, value, text, class): a bar from zero."""
Measures = dict[tuple[str, ...], tuple[str, Callable[[float], str]]]
"""(title, format) of what lies at a path."""

SPEEDS = {
    "prefill, tokens/s": ("speed", "prefill_tokens_per_second"),
    "decode, tokens/s": ("speed", "decode_tokens_per_second"),
}


def value_at(values: Any, *path: str) -> Any:
    """What lies at a path of nested mappings, None where there is nothing."""
    for name in path:
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def number_at(values: Any, *path: str) -> float | None:
    """The finite number at a path of nested mappings, None where there is none."""
    found = value_at(values, *path)
    return found if is_finite(found) else None


def perplexities(result: Result) -> dict[str, Any] | None:
    """Of the dense model, the pruned one, and after each recovery that was measured on the same
    text: the first, the last, the text, and bars of all. None where pruning was not measured."""
    steps = [
        ("dense", result.measured.get("perplexity_before")),
        ("pruned", result.measured.get("perplexity_after")),
        *(("recovered", value_at(r, "result", "perplexity_after")) for r in result.recoveries),
    ]
    text = _text_of(steps[0][1])
    known = [
        (label, value)
        for label, measured in steps
        if (value := number_at(measured, "perplexity")) is not None and _text_of(measured) == text
    ]
    if [label for label, _ in known[:2]] != ["dense", "pruned"]:
        return None
    bars: list[Bar] = [
        (label, value, f"{value:,.2f}", "other" if label == "dense" else "kept")
        for label, value in known
    ]
    return {"before": known[0][1], "after": known[-1][1], "on": text, "bars": bars}


def _text_of(measured: Any) -> str:
    """What a perplexity was measured on."""
    dataset, windows, seqlen = (value_at(measured, n) for n in ("dataset", "windows", "seqlen"))
    return f"{dataset}, {windows} windows of {seqlen} tokens"


def tiles(
    result: Result, perplexity: Values | None, evaluations: Sequence[Values]
) -> list[dict[str, str]]:
    """The figures that matter most, each with what it was before."""
    blocks, depth, pair = result.plan.blocks, result.plan.depth, perplexity or {}
    evaluated = {_last_part(e): e for e in reversed(evaluations)}  # wherever they lay; first wins
    dense, own = (evaluated.get(Path(name).name) for name in (result.dense_name, result.name))
    was, now = (number_at(result.measured, f"parameters_{when}") for when in ("before", "after"))
    channels = sum(block.intermediate_size for block in blocks)
    measures: list[tuple[str, str, float | None, float | None]] = [
        ("parameters", "{:,.0f}", was, now),
        ("blocks", "{:,.0f}", depth.total if depth else None, len(blocks)),
        ("FFN channels", "{:,.0f}", channels, sum(result.plan.widths)),
        ("KV groups", "{:,.0f}", *(result.plan.groups or (None, None))[::-1]),
        ("experts", "{:,.0f}", *(result.plan.experts or (None, None))[::-1]),
        ("perplexity", "{:,.2f}", pair.get("before"), pair.get("after")),
        *((t, "{:,.1f}", number_at(dense, *at), number_at(own, *at)) for t, at in SPEEDS.items()),
    ]
    found = [
        {
            "title": title,
            "change": f"{after / before - 1:+.1%}".replace("-", "−"),
            "before": form.format(before),
            "after": form.format(after),
        }
        for title, form, before, after in measures
        if before and after
    ]
    return [*found, {"title": "weight files", "after": format_bytes(result.nbytes)}]


def _last_part(evaluation: Values) -> str:
    """The name of a folder or of a hub id."""
    return Path(str(evaluation["model"])).resolve().name


def perplexities_compared(
    results: Sequence[Result], labels: Sequence[str]
) -> dict[str, Any] | None:
    """The text, and bars of the results that were measured, after the dense model's where all are
    of the same; None for fewer than two, or where texts differ."""
    pairs = {n: pair for n, result in enumerate(results) if (pair := perplexities(result))}
    if len(pairs) < 2 or len({pair["on"] for pair in pairs.values()}) > 1:
        return None
    bars: list[Bar] = [
        (labels[n], pair["after"], f"{pair['after']:,.2f}", series(n)) for n, pair in pairs.items()
    ]
    first = next(iter(pairs.values()))
    dense = {(results[n].dense_name, f"{pair['before']:,.2f}") for n, pair in pairs.items()}
    if len(dense) == 1:
        bars.insert(0, ("dense", first["before"], f"{first['before']:,.2f}", "other"))
    return {"on": first["on"], "bars": bars}


def evaluation_table(evaluations: Sequence[Values], results: Sequence[Result]) -> dict[str, Any]:
    """What ``cfsp evaluate`` measured: a table, and bars of each measure that all models have.

    A speed is followed by its ratio to the first model's.
    """
    short = [_last_part(model) for model in evaluations]
    unique = len(set(short)) == len(short)
    labels = short if unique else [str(model["model"]) for model in evaluations]
    folders = [result.name for result in results]
    kinds = [series(folders.index(name)) if name in folders else "other" for name in short]
    measures = []
    for path, (title, form) in _measures(evaluations).items():
        values = [number_at(model, *path) for model in evaluations]
        texts = ["–" if value is None else form(value) for value in values]
        first = values[0]
        if path in SPEEDS.values() and first:
            for place, value in enumerate(values[1:], start=1):
                texts[place] += f" ({value / first:.2f}x)" if value else ""
        whole = None not in values and len(values) > 1
        bars = list(zip(labels, values, texts, kinds, strict=True)) if whole else []
        measures.append({"title": title, "texts": texts, "bars": bars})
    return {"labels": labels, "measures": measures}


def _measures(evaluations: Sequence[Values]) -> Measures:
    """Everything that some model has."""
    every: Measures = {
        ("parameters",): ("parameters", "{:,}".format),
        ("perplexity",): ("perplexity", "{:,.2f}".format),
        **{path: (title, "{:,.1f}".format) for title, path in SPEEDS.items()},
        ("speed", "peak_memory_bytes"): ("peak memory", format_bytes),
    }
    for model in evaluations:
        tasks = value_at(model, "tasks")
        for task, metrics in tasks.items() if isinstance(tasks, Mapping) else ():
            for metric in metrics if isinstance(metrics, Mapping) else ():
                if "stderr" not in metric:
                    shown = (f"{task}, {metric}", "{:.4f}".format)
                    every.setdefault(("tasks", task, metric), shown)
    return {
        path: measure
        for path, measure in every.items()
        if any(number_at(model, *path) is not None for model in evaluations)
    }
