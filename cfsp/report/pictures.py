"""Pictures of a plan, for model cards."""

from pathlib import Path
from typing import Any

import torch

from ..checkpoints.documents import Result
from ..errors import CfspError
from ..pruning.plan import PruningPlan

KEPT, REMOVED, LINE = "#2f6fb0", "#d9e2ec", "#c2512f"


def write_pictures(result: Result, folder: Path) -> list[Path]:
    """Write the pictures of a result as PNGs named after its folder; returns their paths.

    Raises:
        CfspError: matplotlib is not installed, or they cannot be written.
    """
    title = f"{result.name}: {result.plan.sparsity:.0%} of FFN channels removed"
    pictures = {"widths": plot_plan, "kept": plot_kept}
    if all(block.score_quantiles for block in result.plan.blocks):
        pictures["scores"] = plot_scores
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kind, draw in pictures.items():
            paths.append(folder / f"{result.name}-{kind}.png")
            draw(result.plan, paths[-1], title)
    except OSError as error:
        raise CfspError(f"cannot write pictures into {folder}: {error}") from None
    return paths


def _pyplot() -> Any:
    """matplotlib's pyplot, without a display."""
    try:
        import matplotlib
    except ImportError:
        raise CfspError("pictures need the package 'matplotlib': pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_kept(plan: PruningPlan, path: str | Path, title: str) -> None:
    """Which channels of every block are kept, as a PNG: a row per block, channels left to right."""
    pyplot = _pyplot()
    from matplotlib.colors import LinearSegmentedColormap

    columns = min(max(block.intermediate_size for block in plan.blocks), 512)
    rows = []
    for block in plan.blocks:
        size = block.intermediate_size
        bins = torch.arange(size) * columns // size
        kept = torch.bincount(bins[block.flat_kept], minlength=columns)
        rows.append(kept / torch.bincount(bins, minlength=columns).clamp_min(1))
    figure, axes = pyplot.subplots(figsize=(9, 4), dpi=150, layout="constrained")
    colours = LinearSegmentedColormap.from_list("kept", [REMOVED, KEPT])
    axes.imshow(torch.stack(rows).numpy(), cmap=colours, vmin=0, vmax=1, aspect="auto")
    axes.set(
        xlabel="channels, first to last; blue where kept", ylabel="block", title=title, xticks=[]
    )
    axes.spines[:].set_visible(False)
    figure.savefig(path)
    pyplot.close(figure)


def plot_scores(plan: PruningPlan, path: str | Path, title: str) -> None:
    """How the scores of every block are spread, as a PNG; the plan must know its quantiles."""
    pyplot = _pyplot()
    last = len(plan.blocks[0].score_quantiles) - 1
    parts = {
        part: [block.score_quantiles[last * part // 16] for block in plan.blocks]
        for part in (1, 4, 8, 12, 15)
    }
    blocks = range(len(plan.blocks))
    figure, axes = pyplot.subplots(figsize=(9, 4), dpi=150, layout="constrained")
    axes.fill_between(blocks, parts[1], parts[15], color=REMOVED, label="1/16 to 15/16")
    axes.fill_between(blocks, parts[4], parts[12], color=KEPT, alpha=0.5, label="middle half")
    axes.plot(blocks, parts[8], color=KEPT, label="median")
    if min(parts[1]) > 0 and max(parts[15]) / min(parts[1]) > 8:
        axes.set_yscale("log")
    axes.set(xlabel="block", ylabel=f"score ({plan.recipe.scorer})", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def plot_plan(plan: PruningPlan, path: str | Path, title: str) -> None:
    """Kept width and importance of every block, as a PNG.

    Raises:
        CfspError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    blocks = range(len(plan.blocks))
    sizes = [block.intermediate_size for block in plan.blocks]
    figure, widths = pyplot.subplots(figsize=(9, 4), dpi=150, layout="constrained")
    widths.bar(blocks, sizes, color=REMOVED, label="removed")
    widths.bar(blocks, plan.widths, color=KEPT, label="kept")
    widths.set(xlabel="block", ylabel="FFN channels", title=title, xlim=(-0.7, len(sizes) - 0.3))
    widths.spines[["top", "right"]].set_visible(False)
    importance = widths.twinx()
    importance.plot(
        blocks,
        [block.importance for block in plan.blocks],
        color=LINE,
        marker="o",
        markersize=3,
        label=f"importance ({plan.recipe.importance})",
    )
    importance.set_ylabel("importance", color=LINE)
    importance.set_ylim(bottom=0)
    importance.spines[["top"]].set_visible(False)
    handles, labels = widths.get_legend_handles_labels()
    line_handles, line_labels = importance.get_legend_handles_labels()
    figure.legend(
        handles + line_handles,
        labels + line_labels,
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    figure.savefig(path)
    pyplot.close(figure)
