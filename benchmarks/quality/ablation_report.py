"""Tables and a picture of an ablation.

``python -m benchmarks.quality.ablation_report RESULT.json [--markdown TABLE.md]
[--picture PICTURE.png]``

``--write DOCUMENT`` writes the tables, and the picture where there is one, into a document between
the lines ``<!-- results: NAME -->`` and ``<!-- end of results -->``.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfsp import CfspError, Recipe
from cfsp.pruning.recipe import recipe_from_dict

from ..report import MARKED, provenance
from .ablation_grid import OF_THE_RUN, SHARED, calibration_kind

DOMAINS = {"in_domain": "in-domain", "out_of_domain": "out-of-domain"}
COLUMNS = (
    *("scorer", "allocator", "compensation", "also"),
    *("in-domain", "gap closed", "out-of-domain", "gap closed"),
    *("calibration, s", "plan, s", "cut, s", "x CFSP"),
)
EXPLANATION = (
    "Gap closed: the share of the way from plain CFSP back to the dense model, in perplexity; "
    "below zero where a recipe is worse than plain CFSP. Calibration: the first pass for the "
    "recipe. Cut: the second pass, with compensation and fitting again. x CFSP: calibration, plan "
    "and cut over those of plain CFSP, where both are of one machine and version. Bold: the lowest "
    "perplexity."
)
WIDE = 8
"""Ratio of perplexities from which an axis has ticks by decades."""
PLAIN = ("cfsp", "cfsp", "none")
"""Scorer, allocator and compensation of the published method."""


def load(path: Path) -> dict[str, Any]:
    """The JSON of an ablation.

    Raises:
        CfspError: it is no such file.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CfspError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict) or not {"asked", "dense", "cells"} <= values.keys():
        raise CfspError(f"{path} is no result of benchmarks.quality.ablation")
    return values


def budget_of(cell: Mapping[str, Any]) -> str:
    """What was to go, in words."""
    recipe = cell["recipe"]
    return recipe["budget"] or f"{recipe['sparsity']:.0%} of the FFN channels"


def by_budget(values: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Cells by budget, the smallest fraction of channels first, then as they were asked for."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in sorted(values["cells"], key=lambda c: (c["recipe"]["budget"] or "", _sparsity(c))):
        found.setdefault(budget_of(cell), []).append(cell)
    return found


def _sparsity(cell: Mapping[str, Any]) -> float:
    return float(cell["recipe"]["sparsity"])


def names(cell: Mapping[str, Any]) -> tuple[str, str, str]:
    """Scorer, allocator, compensation."""
    recipe = cell["recipe"]
    return recipe["scorer"], recipe["allocator"], recipe["compensation"]


def also(cell: Mapping[str, Any], calibration: Mapping[str, Any]) -> str:
    """What else is not the default of recipes, or not the ``calibration`` of the others."""
    scale = Recipe().resolved_error_scale
    usual = {**Recipe().to_dict(), **SHARED, "error_scale": scale, "calibration": calibration}
    apart = {"scorer", "allocator", "compensation", "calibration", *OF_THE_RUN}
    own = {key: value for key, value in cell["recipe"].items() if key not in apart}
    pairs = [(key, value) for key, value in own.items() if value != usual.get(key)]
    pairs += [
        (key, value)
        for key, value in cell["recipe"]["calibration"].items()
        if value != calibration[key]
    ]
    return ", ".join(key if value is True else f"{key} {value}" for key, value in pairs)


def label(cell: Mapping[str, Any], calibration: Mapping[str, Any]) -> str:
    """A recipe in words."""
    more = also(cell, calibration)
    return " ".join(names(cell)) + (f", {more}" if more else "")


def usual_calibration(values: Mapping[str, Any]) -> dict[str, Any]:
    """The calibration of the first cell, which stands for all that do not say otherwise."""
    return dict(values["cells"][0]["recipe"]["calibration"])


def plain_cell(cells: Sequence[Mapping[str, Any]], cell: Mapping[str, Any]) -> Any:
    """Plain CFSP among the cells of a budget: of the cell's calibration and with all defaults where
    there is such a one; None without any."""

    def apart(plain: Mapping[str, Any]) -> tuple[bool, int]:
        other = plain["calibration"] != cell["calibration"]
        return other, len(also(plain, plain["recipe"]["calibration"]))

    plain = [c for c in cells if names(c) == PLAIN and not c["recipe"]["sequential"]]
    return min((c for c in plain if "error" not in c), key=apart, default=None)


def gap_closed(cell: Mapping[str, Any], plain: Any, dense: Any, domain: str) -> float | None:
    """(plain - cell) / (plain - dense) in perplexity; None where there is no gap."""
    if plain is None or not plain[domain] > dense[domain]:
        return None
    return float((plain[domain] - cell[domain]) / (plain[domain] - dense[domain]))


def seconds_of(cell: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[float, float, float]:
    """Of the first pass for the recipe, of the plan and of the second pass with the cut."""
    kind = calibration_kind(recipe_from_dict(cell["recipe"]))
    calibration = values["calibrations"][cell["calibration"]]["seconds"][kind]
    return calibration, cell["plan_seconds"], cell["cut_seconds"]


def line(cell: Mapping[str, Any]) -> str:
    """A cell that was just measured, for a terminal."""
    told = f"{budget_of(cell)}: {label(cell, cell['recipe']['calibration'])}: "
    if "error" in cell:
        return told + cell["error"]
    found = ", ".join(f"{title} {cell[domain]:.2f}" for domain, title in DOMAINS.items())
    return f"{told}{found}; plan {cell['plan_seconds']:.1f} s, cut {cell['cut_seconds']:.1f} s"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:+.0%}"


def row(cell: Mapping[str, Any], cells: Sequence[Any], values: Mapping[str, Any]) -> list[str]:
    """One line of the table of a budget."""
    plain = plain_cell(cells, cell)
    found = [*names(cell), also(cell, usual_calibration(values))]
    for domain in DOMAINS:
        lowest = cell[domain] == min(c[domain] for c in cells)
        found.append(f"**{cell[domain]:.2f}**" if lowest else f"{cell[domain]:.2f}")
        found.append(_share(gap_closed(cell, plain, values["dense"], domain)))
    seconds = seconds_of(cell, values)
    found += [f"{value:.1f}" for value in seconds]
    comparable = plain and plain["environment"] == cell["environment"]
    found.append(f"{sum(seconds) / sum(seconds_of(plain, values)):.2f}" if comparable else "")
    return found


def preamble(values: Mapping[str, Any]) -> list[str]:
    """What was measured on what, in sentences."""
    asked, dense = values["asked"], values["dense"]
    texts = ", ".join(
        f"{title} {asked[domain]['windows']} windows of {asked[domain]['seqlen']} tokens of "
        f"`{asked[domain]['text']}` (dense {dense[domain]:.2f})"
        for domain, title in DOMAINS.items()
    )
    usual = usual_calibration(values)
    lines = [
        f"{asked['model']} in {asked['dtype']}; perplexity: {texts}.",
        f"Calibration: {usual['samples']} windows of {usual['seqlen']} tokens of "
        f"`{usual['dataset']}`, seed {usual['seed']}.",
    ]
    for key, environment in values["environments"].items():
        dates = [c["date"] for c in values["cells"] if c["environment"] == key]
        if dates:
            measured = {"machine_info": environment, "datetime": min(dates)}
            lines.append(f"{len(dates)} recipes on {provenance(measured)}.")
    return [*lines, "", EXPLANATION, ""]


def markdown(values: Mapping[str, Any]) -> str:
    """A table for each budget.

    Raises:
        CfspError: there is no cell yet.
    """
    if not values["cells"]:
        raise CfspError("the ablation has no cell yet")
    lines = preamble(values)
    for budget, cells in by_budget(values).items():
        done = [cell for cell in cells if "error" not in cell]
        lines += [f"### {budget} removed", ""]
        if done:
            lines.append("| " + " | ".join(COLUMNS) + " |")
            lines.append("|---|---|---|---|" + "---:|" * (len(COLUMNS) - 4))
            lines += ["| " + " | ".join(row(cell, done, values)) + " |" for cell in done]
            lines.append("")
        lines += [f"{line(cell)}\n" for cell in cells if "error" in cell]
    return "\n".join(lines)


def picture(values: Mapping[str, Any], path: Path) -> None:
    """In-domain against out-of-domain perplexity, a panel for each budget, written as PNG.

    Raises:
        CfspError: matplotlib is not installed, or no cell was measured.
    """
    try:
        import matplotlib
    except ImportError:
        raise CfspError("pictures need the package 'matplotlib': pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        budget: [cell for cell in cells if "error" not in cell]
        for budget, cells in by_budget(values).items()
    }
    panels = {budget: cells for budget, cells in panels.items() if cells}
    if not panels:
        raise CfspError("no cell was measured: there is nothing to draw")
    usual = usual_calibration(values)
    recipes = dict.fromkeys(label(cell, usual) for cells in panels.values() for cell in cells)
    colours = pyplot.get_cmap("tab10").colors
    styles = {
        name: {"color": colours[number % 10], "marker": "osD^vPX<>h"[(number + number // 10) % 10]}
        for number, name in enumerate(recipes)
    }
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels) + 1, 5.2), squeeze=False, layout="constrained"
    )
    for axis, (budget, cells) in zip(axes.flat, panels.items(), strict=True):
        _draw(axis, cells, values, styles)
        axis.set_title(f"{budget} removed", fontsize=10)
    handles = {
        name: handle
        for axis in axes.flat
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    place = {"loc": "outside lower center", "ncols": 3, "frameon": False, "fontsize": 8}
    figure.legend(handles.values(), handles.keys(), **place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw(
    axis: Any, cells: Sequence[Any], values: Mapping[str, Any], styles: Mapping[str, Any]
) -> None:
    """A budget's recipes; left of and below the dashed lines is better than plain CFSP on both."""
    dense, usual = values["dense"], usual_calibration(values)
    plain = plain_cell(cells, cells[0])
    axis.scatter(*(dense[d] for d in DOMAINS), color="black", marker="*", s=110, label="dense")
    if plain is not None:
        axis.axvline(plain["in_domain"], color="grey", linewidth=0.8, linestyle="--")
        axis.axhline(
            plain["out_of_domain"], color="grey", linewidth=0.8, linestyle="--", label="plain CFSP"
        )
    for cell in cells:
        name = label(cell, usual)
        axis.scatter(*(cell[d] for d in DOMAINS), label=name, s=42, alpha=0.85, **styles[name])
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axis.set_xscale("log")
    axis.set_yscale("log")
    for side, domain in ((axis.xaxis, "in_domain"), (axis.yaxis, "out_of_domain")):
        low, high = side.get_view_interval()
        wide = high > WIDE * low
        side.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(6))
        side.set_minor_locator(NullLocator())
        side.set_major_formatter("{x:g}")
        text = values["asked"][domain]["text"]
        side.set_label_text(f"{DOMAINS[domain]} perplexity, {text}", fontsize=9)
    axis.tick_params(which="both", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def written(document: str, text: str) -> str:
    """A document with what it marks replaced.

    Raises:
        CfspError: it marks no part, or several.
    """
    changed, count = MARKED.subn(lambda marked: f"{marked[1]}\n{text}\n{marked[3]}", document)
    if count != 1:
        raise CfspError(f"the document marks {count} parts for results, expected 1")
    return changed


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """The options that say where tables and picture go."""
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--picture", type=Path, help="write a PNG here")
    parser.add_argument("--write", type=Path, help="a document whose marked part to write anew")


def write(values: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Write what the options ask for; the tables to stdout where they ask for none.

    Raises:
        CfspError: nothing to show, or a file that cannot be written.
    """
    text = markdown(values)
    try:
        if options.picture:
            picture(values, options.picture)
        if options.markdown:
            options.markdown.write_text(text, "utf-8")
        if options.write:
            shown = text
            if options.picture:
                link = os.path.relpath(options.picture, options.write.parent)
                shown = f"![In-domain and out-of-domain perplexity]({link})\n\n{text}"
            document = written(options.write.read_text("utf-8"), shown)
            options.write.write_text(document, "utf-8")
    except OSError as error:
        raise CfspError(f"cannot write the report: {error}") from None
    if not (options.markdown or options.write or options.picture):
        print(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.ablation_report",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("result", type=Path, help="JSON of benchmarks.quality.ablation")
    add_outputs(parser)
    options = parser.parse_args(arguments)
    try:
        write(load(options.result), options)
    except CfspError as error:
        print(f"ablation_report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
