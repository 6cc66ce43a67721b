"""Tables and a chart of benchmark results.

``python -m benchmarks.report RESULT.json [...] [--markdown TABLE.md] [--chart CHART.png]``

``--update DOCUMENT`` writes the tables of a document anew, each between the lines
``<!-- results: RESULT.json -->`` and ``<!-- end of results -->``.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    "implementation",
    "median ms",
    "rounds",
    "GB/s",
    "% of copy",
    "x eager",
    "x torch.compile",
    "extra MiB",
    "difference",
)
EXPLANATION = (
    "Median of cold rounds. GB/s counts the fewest bytes that the op can move, for every "
    "implementation; % of copy is against the device copy of the same group and run. "
    "x eager and x torch.compile are how many times faster than those (below 1: slower). Extra "
    "MiB is the peak of one call beyond its inputs, results included. Difference is from the fp64 "
    "or blocked reference, the largest over the largest value."
)


def load(path: Path) -> dict[str, Any]:
    """A result of ``pytest --benchmark-json``.

    Raises:
        ValueError: it is no such file.
    """
    try:
        result = json.loads(path.read_text("utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(result, dict) or "benchmarks" not in result:
        raise ValueError(f"{path}: no pytest-benchmark result (it has no 'benchmarks')")
    return result


def groups(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Entries by op and shape, in the order they ran, fastest first, the copy before all."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for entry in result["benchmarks"]:
        if "implementation" in entry["extra_info"]:
            grouped.setdefault(entry["group"], []).append(entry)
    for entries in grouped.values():
        entries.sort(
            key=lambda e: (e["extra_info"]["implementation"] != "copy", e["stats"]["median"])
        )
    return grouped


def label(info: dict[str, Any]) -> str:
    """The implementation's name, with the backend that the package chose."""
    backend = info.get("backend")
    roofs = {"copy": "device copy", "matmul": "matrix product"}
    name = roofs.get(info["implementation"], info["implementation"])
    return f"{name} ({backend})" if backend else name


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _mebibytes(nbytes: int | None) -> float | None:
    return None if nbytes is None else nbytes / 2**20


def row(entry: dict[str, Any]) -> list[str]:
    """One line of the table."""
    info, stats = entry["extra_info"], entry["stats"]
    return [
        label(info),
        _number(stats["median"] * 1e3, ".4g"),
        str(stats["rounds"]),
        _number(info["gigabytes_per_second"], ".4g"),
        _number(info.get("percent_of_copy"), ".3g"),
        _number(info.get("speedup_over_eager"), ".3g"),
        _number(info.get("speedup_over_torch_compile"), ".3g"),
        _number(_mebibytes(info.get("peak_extra_bytes")), ".0f"),
        _number(info.get("largest_relative_difference"), ".0e"),
    ]


def provenance(result: dict[str, Any]) -> str:
    """Machine and versions in one line."""
    machine = result["machine_info"]
    versions = ", ".join(
        f"{name} {version}" for name, version in machine.get("versions", {}).items() if version
    )
    threads = f", {machine['threads']} thread(s)" if machine.get("device") == "cpu" else ""
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    return (
        f"{machine.get('machine', 'unknown machine')}{threads}{driver}; {versions}; "
        f"{result.get('datetime', '')[:10]}; sources {machine.get('sources', 'unknown')}"
    )


SUMMARY = (
    "op",
    "shape",
    "ms",
    "% of copy",
    "x eager",
    "x torch op",
    "x torch.compile",
    "extra MiB",
)


def summary(result: dict[str, Any]) -> str:
    """The package's own implementation, one line per group."""
    lines = ["| " + " | ".join(SUMMARY) + " |", "| --- | --- |" + " ---: |" * (len(SUMMARY) - 2)]
    for entries in groups(result).values():
        for entry in entries:
            info = entry["extra_info"]
            if info["implementation"] == "cfsp":
                cells = [
                    info["op"],
                    info["shape"],
                    _number(entry["stats"]["median"] * 1e3, ".4g"),
                    _number(info.get("percent_of_copy"), ".3g"),
                    _number(info.get("speedup_over_eager"), ".3g"),
                    _number(info.get("speedup_over_torch_op"), ".3g"),
                    _number(info.get("speedup_over_torch_compile"), ".3g"),
                    _number(_mebibytes(info.get("peak_extra_bytes")), ".0f"),
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


HEADLINE = ("op", "shape", "tokens", "ms", "% of roof", "x torch.compile", "x torch op")


def headline(results: Sequence[dict[str, Any]]) -> str:
    """The package's op at every shape of all results, one line each, and gram's fastest form."""
    lines = ["| " + " | ".join(HEADLINE) + " |", "| --- | --- |" + " ---: |" * (len(HEADLINE) - 2)]
    forms = []
    for group, entries in ((g, e) for result in results for g, e in groups(result).items()):
        for entry in entries:
            info = entry["extra_info"]
            if info["implementation"] == "cfsp":
                roof = info.get("percent_of_matmul", info.get("percent_of_copy"))
                cells = [
                    info["op"],
                    info["shape"],
                    _number(info.get("tokens"), "d"),
                    _number(entry["stats"]["median"] * 1e3, ".4g"),
                    _number(roof, ".3g"),
                    _number(info.get("speedup_over_torch_compile"), ".3g"),
                    _number(info.get("speedup_over_torch_op"), ".3g"),
                ]
                lines.append("| " + " | ".join(cells) + " |")
        measured = {e["extra_info"]["implementation"]: e["stats"]["median"] for e in entries}
        shown = [f"{name} {t * 1e3:.4g} ms" for name, t in measured.items() if "form " in name]
        if shown:
            forms.append(
                f"{group}, fastest first: {', '.join(shown)}; the op as it is "
                f"{measured.get('cfsp', math.nan) * 1e3:.4g} ms."
            )
    note = "% of roof is of the device copy, for gram of the matrix product's rate, same run."
    return "\n".join([*lines, "", note, *forms])


def markdown(result: dict[str, Any]) -> str:
    """A summary of one result, then all its groups, a table each."""
    lines = [provenance(result) + ".", "", EXPLANATION, ""]
    lines += ["The package's implementation beside each rival:", "", summary(result), ""]
    for group, entries in groups(result).items():
        info = entries[-1]["extra_info"]
        lines += [f"### {group}", "", f"{info['dtype']}, {info['bytes'] / 1e9:.4g} GB moved.", ""]
        rates = {
            e["extra_info"]["implementation"]: f"{e['extra_info']['tera_flops']:.4g}"
            for e in entries
            if "tera_flops" in e["extra_info"]
        }
        product = rates.pop("matmul", None)
        if rates:
            told = ", ".join(f"{name} {rate}" for name, rate in rates.items())
            lines[-2] += f" TFLOP/s of the triangle's multiply-adds: {told}."
        if product:
            lines[-2] += f" Of a square matrix product: {product}."
        lines.append("| " + " | ".join(COLUMNS) + " |")
        lines.append("| --- |" + " ---: |" * (len(COLUMNS) - 1))
        lines += ["| " + " | ".join(row(entry)) + " |" for entry in entries]
        lines.append("")
    return "\n".join(lines)


MARKED = re.compile(r"(<!-- results: (?P<path>\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def updated(document: str, root: Path) -> str:
    """``document`` with every marked part written anew from its result, a path below ``root``."""

    def write(marked: re.Match[str]) -> str:
        tables = markdown(load(root / marked["path"]))
        return f"{marked[1]}\n{tables}\n{marked[3]}"

    return MARKED.sub(write, document)


def chart(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of percent of copy bandwidth, one panel per group, written as PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = []
    for result in results:
        machine = result["machine_info"].get("machine", "")
        for group, entries in groups(result).items():
            bars = [
                (label(e["extra_info"]), e["extra_info"]["percent_of_copy"])
                for e in entries
                if e["extra_info"]["implementation"] != "copy"
                and "percent_of_copy" in e["extra_info"]
            ]
            if bars:
                panels.append((f"{group}\n{machine}", bars))
    if not panels:
        raise ValueError("no result holds a percentage of copy bandwidth")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 2.4 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, bars) in zip(axes.flat, panels, strict=False):
        names, values = zip(*bars, strict=True)
        colours = ["#1f6f8b" if name.startswith("cfsp") else "#b8b8b8" for name in names]
        drawn = axis.barh(names, values, color=colours)
        axis.bar_label(drawn, fmt="%.0f", padding=2, fontsize=8)
        axis.axvline(100, color="black", linewidth=0.8, linestyle=":")
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.12)
    figure.supxlabel("percent of device copy bandwidth, same run", fontsize=9)
    figure.savefig(path, dpi=75)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, help="JSON of pytest --benchmark-json")
    parser.add_argument("--markdown", type=Path, help="write the tables here, not to stdout")
    parser.add_argument("--update", type=Path, help="a document whose tables to write anew")
    parser.add_argument("--chart", type=Path, help="write a PNG of percent of copy here")
    options = parser.parse_args(arguments)
    if not options.results and not options.update:
        parser.error("name a result, or a document to --update")
    try:
        if options.update:
            document = updated(options.update.read_text("utf-8"), Path.cwd())
            options.update.write_text(document, "utf-8")
        results = [load(path) for path in options.results]
        text = "\n".join(markdown(result) for result in results)
        if options.chart:
            chart(results, options.chart)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    if options.markdown:
        options.markdown.write_text(text, "utf-8")
    elif text:
        print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
