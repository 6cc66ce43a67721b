"""``cfsp report``: one self-contained HTML file about one or more pruned folders."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..checkpoints.documents import Result
from ..io.files import format_bytes
from ..io.outputs import new_file
from ..pruning.allocation import ALLOCATORS
from . import figures
from .svg import kept_strip
from .tables import Values, evaluation_table, number_at, perplexities, perplexities_compared, tiles
from .usage import loading_commands


def write_report(
    results: Sequence[Result], path: str | Path, evaluations: Sequence[Values] = ()
) -> None:
    """Write the report, whole or not at all.

    Args:
        results: of :func:`cfsp.checkpoints.documents.read_result`; more than one are also compared.
        path: of the HTML file; a report that is there is replaced.
        evaluations: of :func:`documents.read_evaluation`, of these models and of others.

    Raises:
        CfspError: the file cannot be written, or is there and no report.
    """
    inputs = [result.folder for result in results]
    with new_file(Path(path), overwrite=True, inputs=inputs) as partial:
        partial.write_text(report_html(results, evaluations), encoding="utf-8")


def report_html(results: Sequence[Result], evaluations: Sequence[Values] = ()) -> str:
    """The report as HTML. All names and texts in it are escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = files(__package__) / "templates"
    environment.globals["number_at"] = number_at
    template = environment.from_string((folder / "report.html").read_text("utf-8"))
    names = [result.name for result in results]
    labels = [r.name if names.count(r.name) == 1 else str(r.folder) for r in results]
    pairs = list(zip(labels, results, strict=True))
    return template.render(
        css=(folder / "report.css").read_text("utf-8"),
        title=labels[0] if len(results) == 1 else f"{len(results)} pruned models",
        results=[_result(result, label, evaluations) for label, result in pairs],
        widths_compared=figures.widths_compared([(label, r.plan) for label, r in pairs]),
        perplexities_compared=perplexities_compared(results, labels),
        evaluation=evaluation_table(evaluations, results) if evaluations else None,
    )


def _result(result: Result, label: str, evaluations: Sequence[Values]) -> dict[str, Any]:
    plan, count, perplexity = result.plan, len(result.plan.blocks), perplexities(result)
    fits, refits = result.fits, result.refits
    return {
        "label": label,
        "dense": result.dense_name,
        "plan": plan,
        "removed": plan.removed,
        "parameters": number_at(result.measured, "parameters_after"),
        "bytes": format_bytes(result.nbytes),
        "tiles": tiles(result, perplexity, evaluations),
        "perplexity": perplexity,
        "widths": figures.widths_figure(plan),
        "groups": figures.groups_figure(plan),
        "importance": figures.importance_figure(plan),
        "scores": figures.scores_figure(plan),
        "curves": figures.curves_figure(plan),
        "fits": fits,
        "fits_figure": figures.fits_figure(fits, count),
        "refits": refits,
        "refits_figure": figures.refits_figure(refits, count),
        "recoveries": [_flat(recovery) for recovery in result.recoveries],
        "strips": [kept_strip(block.flat_kept, block.intermediate_size) for block in plan.blocks],
        "recipe": _recipe(result),
        "provenance": _flat(result.provenance),
        "usage": loading_commands(result, label),
    }


def _recipe(result: Result) -> list[tuple[str, str]]:
    """Every choice that was made, those left to the scorer too, but for what had no effect."""
    recipe, calibration = result.plan.recipe, result.plan.recipe.calibration
    choices = recipe.to_dict() | {
        "allocator": recipe.resolved_allocator,
        "compensation": recipe.resolved_compensation,
        "error_scale": recipe.resolved_error_scale,
        "calibration": f"{calibration.samples} windows of {calibration.seqlen} tokens of "
        f"{calibration.dataset}, seed {calibration.seed}, BOS {calibration.bos}",
    }
    unread = set() if recipe.cuts_attention else {"group_multiple"}
    if not recipe.blockwise:
        unread |= {"epochs", "learning_rate"}
    if not recipe.searches:
        unread |= {name for name in choices if name.startswith("search_")}
        if not ALLOCATORS[recipe.resolved_allocator].needs_curves:
            unread |= {"error_scale", "importance_exponent"}
    words = {True: "yes", False: "no"}
    return [
        (name.replace("_", " "), words[value] if isinstance(value, bool) else str(value))
        for name, value in choices.items()
        if value is not None and name not in unread
    ]


def _flat(values: Values, prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as (path, text)."""
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        path = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            found.extend(_flat(value, f"{path} · "))
        elif value is not None:
            found.append((path, str(value)))
    return found
