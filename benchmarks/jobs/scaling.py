"""Prints the tables of docs/scaling.md: arithmetic of ``cfsp.estimate``, nothing is measured.

python -m benchmarks.jobs.scaling
"""

import math
from dataclasses import replace
from pathlib import Path

import cfsp
from cfsp.costs.estimates import format_count, format_seconds
from cfsp.costs.hardware import H100, Hardware

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MODELS = ("Llama-3-8B", "Llama-3-70B", "Llama-3.1-405B", "Qwen3-235B-A22B", "Kimi-K2")
WARM = replace(H100, disk_read=9e9, sources={**H100.sources, "disk_read": "page cache"})
SETUPS: tuple[tuple[str, Hardware, int, int], ...] = (
    ("1 GPU, disk", H100, 1, 1),
    ("1 GPU, page cache", WARM, 1, 1),
    ("8 GPUs, 1 node", H100, 8, 1),
    ("16 GPUs, 2 nodes", H100, 16, 2),
    ("32 GPUs, 4 nodes", H100, 32, 4),
)
STEPS = (
    ("parameters of the attention, a block", "2*8192*8192 + 2*8192*1024", ""),
    ("parameters of the FFN, a block", "3*8192*28672", ""),
    ("bytes of a block (with two norms)", "2 * (150994944 + 704643072 + 2*8192)", "B"),
    ("bytes of all blocks", "80 * 1711308800", "B"),
    ("bytes of embedding, norm and head", "2 * (2*128256*8192 + 8192)", "B"),
    ("FLOP of a token, products with weights", "2 * 80 * (150994944 + 704643072)", "FLOP"),
    ("FLOP of a token, scores and values", "80 * 2 * 1024 * 64 * (128+128)", "FLOP"),
    ("FLOP of the calibration", "128*1024 * (136902082560 + 2684354560)", "FLOP"),
    ("sustained speed", "0.6 * 989e12", "FLOP/s"),
    ("calibration, computing", "18295873486192640 / 593.4e12", "s"),
    ("calibration, reading", "136904704000 / 6e9", "s"),
    ("hidden states", "128*1024 * 8192 * 2", "B"),
    ("a call of 8 windows: 3 states, gate, up, product", "8*1024 * 2 * (3*8192 + 3*28672)", "B"),
    (
        "device memory in the calibration",
        "1.05 * (4202708992 + 2*1711308800 + 2147483648 + 1811939328) + 2**28",
        "B",
    ),
    ("bytes of the output, 30 % of channels fewer", "141107412992 - 33822867456", "B"),
    ("second pass, writing", "107284545536 / 4e9", "s"),
    ("verification, reading", "107284545536 / 6e9", "s"),
    ("floor: half of the scores, 80 % of 989e12", "(1.8296e16 - 1.76e14) / (0.8*989e12)", "s"),
)
"""(what, formula, unit) for Llama-3-70B on one H100, as :mod:`cfsp.costs.workload` has them."""


PUBLISHED = cfsp.Recipe(scorer="cfsp")
RECIPES = {
    "published CFSP (`--scorer cfsp`)": PUBLISHED,
    "default (cfsp-residual, least squares)": cfsp.Recipe(),
    "default, `--sequential`": cfsp.Recipe(sequential=True),
    "`--compensation blockwise`": cfsp.Recipe(compensation="blockwise"),
    "`--scorer obs` (knapsack, least squares)": cfsp.Recipe(scorer="obs"),
}


def estimate(
    model: str,
    hardware: Hardware = H100,
    ranks: int = 1,
    nodes: int = 1,
    recipe: cfsp.Recipe = PUBLISHED,
) -> cfsp.Estimate:
    """128 windows of 1024 tokens, 16 windows of evaluation, 30 %."""
    return cfsp.estimate(
        CONFIGS / f"{model}.json", recipe, hardware=hardware, ranks=ranks, nodes=nodes
    )


def row(*cells: object) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def head(*titles: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return [row(*titles), row(*("---" for _ in titles))]


def assumptions() -> list[str]:
    """Every figure that the seconds rest on."""
    lines = head("figure", "value")
    lines += [row(figure, value) for figure, value in H100.assumptions().items()]
    return [*lines, row("disk read, page cache", f"{WARM.disk_read:.3g} (assumed, one thread)")]


def steps() -> list[str]:
    """The formulas for Llama-3-70B with their values."""
    lines = head("what", "formula", "value")
    for what, formula, unit in STEPS:
        value = eval(formula)
        shown = f"{value:,}" if isinstance(value, int) and value < 1e12 else f"{value:.4g}"
        lines.append(row(what, f"`{formula}`", f"{shown} {unit}".strip()))
    return lines


def gib(count: float) -> str:
    """Bytes in GiB."""
    return f"{count / 2**30:.1f}"


def memory() -> list[str]:
    """What every model needs, on one GPU."""
    lines = head(
        "model", "parameters", "after", "largest block, GiB", "device, GiB", "host, GiB", "a call"
    )
    for model in MODELS:
        found = estimate(model)
        host = found.host_bytes - found.host_parts["process"]
        fits = found.device_bytes <= H100.device_memory
        lines.append(
            row(
                model,
                format_count(found.parameters),
                format_count(found.parameters_after),
                gib(found.largest_block_bytes),
                gib(found.device_bytes) + ("" if fits else " (more than an H100 has)"),
                gib(host),
                found.micro_batch,
            )
        )
    return lines


def seconds() -> list[str]:
    """Stage by stage, on one GPU to several nodes."""
    names = ("calibrate", "prune", "verify")
    lines = head("model", "on", *names, "in all")
    for model in MODELS:
        for setup, hardware, ranks, nodes in SETUPS:
            found = estimate(model, hardware, ranks, nodes)
            stages = {stage.name: stage for stage in found.stages}
            cells = (f"{format_seconds(stages[n].seconds)}, {stages[n].bound}" for n in names)
            lines.append(row(model, setup, *cells, format_seconds(found.seconds)))
    return lines


def traffic() -> list[str]:
    """Bytes and FLOPs of the whole job, whatever it runs on."""
    lines = head("model", "read, GB", "written, GB", "FLOP, calibration", "FLOP, evaluation")
    for model in MODELS:
        stages = {stage.name: stage for stage in estimate(model).stages}
        lines.append(
            row(
                model,
                round(sum(stage.bytes_read for stage in stages.values()) / 1e9),
                round(stages["prune"].bytes_written / 1e9),
                f"{stages['calibrate'].flops:.3g}",
                f"{stages['prune'].flops:.3g}",
            )
        )
    return lines


def recipes() -> list[str]:
    """What the recipes ask for that go beyond the published one, on one GPU."""
    names = ("calibrate", "score", "prune")
    lines = head(
        "model", "recipe", "device, GiB", "Gram matrices on disk, GB",
        *(f"{name}: FLOP, time" for name in names), "in all",
    )  # fmt: skip
    for model in ("Llama-3-8B", "Llama-3-70B"):
        for name, recipe in RECIPES.items():
            found = estimate(model, recipe=recipe)
            stages = {stage.name: stage for stage in found.stages}
            cells = (
                f"{stages[n].flops:.2e}, {format_seconds(stages[n].seconds)}"
                if n in stages
                else "-"
                for n in names
            )
            disk = round(found.gram_bytes / 1e9)
            lines.append(
                row(
                    model,
                    name,
                    gib(found.device_bytes),
                    disk,
                    *cells,
                    format_seconds(found.seconds),
                )
            )
    return lines


def sections() -> dict[str, list[str]]:
    """Name -> lines of every table."""
    return {
        "assumptions": assumptions(),
        "steps": steps(),
        "memory": memory(),
        "traffic": traffic(),
        "seconds": seconds(),
        "recipes": recipes(),
    }


def check_steps() -> None:
    """The formulas are those of the estimate."""
    found = estimate("Llama-3-70B")
    value = {what: eval(formula) for what, formula, _ in STEPS}
    stages = {stage.name: stage for stage in found.stages}
    assert value["bytes of a block (with two norms)"] == found.largest_block_bytes
    assert value["bytes of all blocks"] == stages["calibrate"].bytes_read
    assert value["bytes of embedding, norm and head"] == stages["open"].bytes_read
    assert value["FLOP of the calibration"] == stages["calibrate"].flops
    assert math.isclose(value["calibration, computing"], stages["calibrate"].seconds)
    assert math.isclose(value["device memory in the calibration"], found.device_bytes, rel_tol=1e-9)
    written = value["bytes of the output, 30 % of channels fewer"]
    assert math.isclose(written, stages["prune"].bytes_written, rel_tol=1e-6)  # a header more


def main() -> None:
    check_steps()
    for name, lines in sections().items():
        print(f"## {name}", "", *lines, "", sep="\n")


if __name__ == "__main__":
    main()
