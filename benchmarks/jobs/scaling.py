"""Prints the tables of docs/scaling.md: arithmetic of ``cfsp.estimate``, nothing is measured.

python -m benchmarks.jobs.scaling
"""

import math
from dataclasses import replace
from pathlib import Path

import cfsp
from cfsp.costs.estimates import format_count, format_seconds
from cfsp.costs.hardware import H100, RTX_4090, Hardware

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MODELS = (
    "Llama-3-8B",
    "Llama-3-70B",
    "Llama-3.1-405B",
    "Qwen3-235B-A22B",
    "DeepSeek-V3",
    "Kimi-K2",
)
WARM = replace(H100, disk_read=9e9, sources={**H100.sources, "disk_read": "page cache"})
PUBLISHED, DEFAULT = cfsp.Recipe(scorer="cfsp"), cfsp.Recipe()
SETUPS: tuple[tuple[str, Hardware, int, int, cfsp.Recipe], ...] = (
    ("default, 1 GPU", H100, 1, 1, DEFAULT),
    ("default, 1 GPU, page cache", WARM, 1, 1, DEFAULT),
    ("default, 1 RTX 4090", RTX_4090, 1, 1, DEFAULT),
    ("default, 8 GPUs", H100, 8, 1, DEFAULT),
    ("published, 1 GPU", H100, 1, 1, PUBLISHED),
    ("published, 8 GPUs", H100, 8, 1, PUBLISHED),
    ("published, 32 GPUs, 4 nodes", H100, 32, 4, PUBLISHED),
)
RECIPES = {
    "published CFSP (`--scorer cfsp`)": PUBLISHED,
    "default (cfsp-output, least squares)": DEFAULT,
    "default, `--sequential`": cfsp.Recipe(sequential=True),
    "`--compensation blockwise`": cfsp.Recipe(compensation="blockwise"),
    "`--scorer obs` (knapsack, least squares)": cfsp.Recipe(scorer="obs"),
}
EVALUATED = "16*1024 * (2*136902082560 - 2*3*8192*688128 + 2*2684354560 + 4*8192*128256)"
FITTED = "80 * (2*8192*8602*20070 + 20070**3/3 + 2*8192*20070**2)"
STEPS = (
    ("parameters of the attention, a block", "2*8192*8192 + 2*8192*1024", ""),
    ("parameters of the FFN, a block", "3*8192*28672", ""),
    ("bytes of a block (with two norms)", "2 * (150994944 + 704643072 + 2*8192)", "B"),
    ("bytes of all blocks", "80 * 1711308800", "B"),
    ("bytes of embedding, norm and head", "2 * (2*128256*8192 + 8192)", "B"),
    ("FLOP of a token, products with weights", "2 * 80 * (150994944 + 704643072)", "FLOP"),
    ("FLOP of a token, scores and values", "80 * 2 * 1024 * 64 * (128+128)", "FLOP"),
    ("sustained speed, bf16", "0.6 * 989e12", "FLOP/s"),
    ("sustained speed, fp32", "0.6 * 67e12", "FLOP/s"),
    ("first pass, 16 windows", "16*1024 * (136902082560 + 2684354560)", "FLOP"),
    ("first pass, computing", "2286984185774080 / 593.4e12", "s"),
    ("first pass, reading", "136904704000 / 6e9", "s"),
    ("second pass, 128 windows", "128*1024 * (136902082560 + 2684354560)", "FLOP"),
    ("their Gram matrices, but for 4 windows", "124*1024 * 80 * 28672**2", "FLOP"),
    ("the fits judged on those 4, 3 products", "80 * 3 * 2 * 4096 * 8192 * 28672", "FLOP"),
    ("16 windows of evaluation, dense and pruned", EVALUATED, "FLOP"),
    ("least squares, 20070 channels kept, fp32", FITTED, "FLOP"),
    (
        "second pass, computing",
        "(1.82959e16 + 8.35065e15 + 4.61794e14 + 4.08867e15) / 593.4e12 + 9.69831e14 / 40.2e12",
        "s",
    ),
    ("bytes of the output, 30 % of channels fewer", "141107412992 - 33822867456", "B"),
    ("second pass, writing", "107284545536 / 4e9", "s"),
    ("verification, reading", "107284545536 / 6e9", "s"),
    ("in all", "4202708992 / 6e9 + 22.82 + 76.70 + 17.88", "s"),
    ("hidden states of 128 windows, twice of 16", "(128 + 2*16)*1024 * 8192 * 2", "B"),
    ("Gram matrix, fp32", "4 * 28672**2", "B"),
    ("held-out activations", "4096 * 28672 * 2", "B"),
    ("a fit: matrix, factor, sides, 1024 rows", "2*4*28672 * (28672 + 8192 + 1024)", "B"),
    (
        "device memory",
        "1.05 * (3*1711308800 + 2684354560 + 3288334336 + 234881024 + 8690597888) + 2**28",
        "B",
    ),
    (
        "floor of the second pass: half of the scores, 80 % of both speeds",
        "(3.1197e16 - 2.2e14) / (0.8*989e12) + 9.69831e14 / (0.8*67e12)",
        "s",
    ),
)
"""(what, formula, unit) for Llama-3-70B by the default recipe on one H100, as
:mod:`cfsp.costs.workload` and :mod:`cfsp.costs.fit_costs` have them."""


def estimate(
    model: str,
    hardware: Hardware = H100,
    ranks: int = 1,
    nodes: int = 1,
    recipe: cfsp.Recipe = DEFAULT,
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
        "model", "parameters", "after", "largest block, GiB",
        "device, GiB", "a call", "device, published method, GiB", "host, GiB",
    )  # fmt: skip
    for model in MODELS:
        found, published = estimate(model), estimate(model, recipe=PUBLISHED)
        host = found.host_bytes - found.host_parts["process"]
        device = (
            gib(x.device_bytes)
            + ("" if x.device_bytes <= H100.device_memory else " (more than an H100 has)")
            for x in (found, published)
        )
        lines.append(
            row(
                model,
                format_count(found.parameters),
                format_count(found.parameters_after),
                gib(found.largest_block_bytes),
                next(device),
                found.micro_batch,
                next(device),
                gib(host),
            )
        )
    return lines


def seconds() -> list[str]:
    """Stage by stage, on one GPU to several nodes, where a model fits."""
    names = ("calibrate", "prune", "verify")
    lines = head("model", "recipe, on", *names, "in all")
    for model in MODELS:
        for setup, hardware, ranks, nodes, recipe in SETUPS:
            found = estimate(model, hardware, ranks, nodes, recipe)
            if found.device_bytes > hardware.device_memory:
                continue
            stages = {stage.name: stage for stage in found.stages}
            cells = (f"{format_seconds(stages[n].seconds)}, {stages[n].bound}" for n in names)
            lines.append(row(model, setup, *cells, format_seconds(found.seconds)))
    return lines


def traffic() -> list[str]:
    """Bytes and FLOPs of the whole job, whatever it runs on."""
    lines = head("model", "read, GB", "written, GB", "FLOP, first pass", "FLOP, second pass")
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
    """What recipes take beside the published one, on one GPU."""
    names = ("calibrate", "prune")
    titles = (f"{name}: FLOP, time" for name in names)
    lines = head("model", "recipe", "device, GiB", *titles, "in all", "of the published method's")
    for model in ("Llama-3-8B", "Llama-3-70B"):
        published = estimate(model, recipe=PUBLISHED).seconds
        for name, recipe in RECIPES.items():
            found = estimate(model, recipe=recipe)
            stages = {stage.name: stage for stage in found.stages}
            cells = (f"{stages[n].flops:.2e}, {format_seconds(stages[n].seconds)}" for n in names)
            lines.append(
                row(
                    model,
                    name,
                    gib(found.device_bytes),
                    *cells,
                    format_seconds(found.seconds),
                    f"{found.seconds / published:.1f} times",
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
    first, second = stages["calibrate"], stages["prune"]
    assert value["bytes of a block (with two norms)"] == found.largest_block_bytes
    assert value["bytes of all blocks"] == first.bytes_read == second.bytes_read
    assert value["bytes of embedding, norm and head"] == stages["open"].bytes_read
    assert value["first pass, 16 windows"] == first.flops
    assert math.isclose(value["first pass, reading"], first.seconds)
    passed, sums, judged = "second pass, 128 windows", "their Gram matrices", "the fits judged"
    parts = (passed, sums, judged, "16 windows of evaluation", "least squares")
    flops = sum(x for what, x in value.items() if what.startswith(parts))
    assert math.isclose(flops, second.flops, rel_tol=1e-9)
    assert math.isclose(value["second pass, computing"], second.seconds, rel_tol=1e-4)
    assert math.isclose(value["in all"], found.seconds, rel_tol=1e-4)
    assert math.isclose(value["device memory"], found.device_bytes, rel_tol=1e-9)
    written = value["bytes of the output, 30 % of channels fewer"]
    assert math.isclose(written, second.bytes_written, rel_tol=1e-6)  # a header more


def main() -> None:
    check_steps()
    for name, lines in sections().items():
        print(f"## {name}", "", *lines, "", sep="\n")


if __name__ == "__main__":
    main()
