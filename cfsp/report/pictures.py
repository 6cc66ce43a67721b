"""Pictures of a plan, for model cards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.documents import Result
from ..errors import CfspError
from ..io.outputs import new_file
from ..pruning.plan import PruningPlan
from .figures import score_axis, score_spread
from .svg import STRIP_BINS, kept_shares

KEPT, REMOVED, LINE = "#2f6fb0", "#d9e2ec", "#c2512f"


def write_pictures(
    result: Result, folder: Path, overwrite: bool = False, inputs: Sequence[object] = ()
) -> list[Path]:
    """Write the pictures of a result as PNGs named after its folder, whose paths are returned;
    CfspError where matplotlib is not installed, or they cannot be written. See :func:`new_file`."""
    title = f"{result.name}: {result.plan.removed} removed"
    pictures = {"widths": plot_widths, "kept": plot_kept}
    if score_spread(result.plan):
        pictures["scores"] = plot_scores
    paths = []
    for kind, draw in pictures.items():
        paths.append(folder / f"{result.name}-{kind}.png")
        with new_file(paths[-1], overwrite, inputs) as file:
            draw(result.plan, file, title)
    return paths


@contextmanager
def _picture(path: str | Path, title: str) -> Iterator[tuple[Any, Any]]:
    """A matplotlib figure and its axes, written as a PNG once they are filled."""
    try:
        import matplotlib
    except ImportError:
        raise CfspError("pictures need the package 'matplotlib': pip install matplotlib") from None
    matplotlib.use("Agg")  # needs no display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), dpi=150, layout="constrained")
    axes.set_title(title)
    yield figure, axes
    figure.savefig(path, format="png", metadata={"Software": "cfsp"})
    pyplot.close(figure)


def plot_widths(plan: PruningPlan, path: str | Path, title: str) -> None:
    """Kept width and importance of every block, as a PNG."""
    blocks = range(len(plan.blocks))
    sizes = [block.intermediate_size for block in plan.blocks]
    with _picture(path, title) as (figure, widths):
        widths.bar(blocks, sizes, color=REMOVED, label="removed")
        widths.bar(blocks, plan.widths, color=KEPT, label="kept")
        widths.set(xlabel="block", ylabel="FFN channels", xlim=(-0.7, len(sizes) - 0.3))
        widths.spines[["top", "right"]].set_visible(False)
        importance = widths.twinx()
        values = [block.importance for block in plan.blocks]
        label = f"importance ({plan.recipe.importance})"
        importance.plot(blocks, values, color=LINE, marker="o", markersize=3, label=label)
        importance.set_ylabel("importance", color=LINE)
        importance.set_ylim(bottom=0)
        importance.spines[["top"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)


def plot_kept(plan: PruningPlan, path: str | Path, title: str) -> None:
    """Which channels of every block are kept, as a PNG: a row per block, channels left to right."""
    columns = min(max(block.intermediate_size for block in plan.blocks), STRIP_BINS)
    rows = [kept_shares(block.flat_kept, block.intermediate_size, columns) for block in plan.blocks]
    with _picture(path, title) as (_, axes):
        from matplotlib.colors import LinearSegmentedColormap

        colours = LinearSegmentedColormap.from_list("kept", [REMOVED, KEPT])
        axes.imshow(torch.stack(rows).numpy(), cmap=colours, vmin=0, vmax=1, aspect="auto")
        axes.set(xlabel="channels, first to last; blue where kept", ylabel="block", xticks=[])
        axes.spines[:].set_visible(False)


def plot_scores(plan: PruningPlan, path: str | Path, title: str) -> None:
    """How the scores of every block are spread, as a PNG; the plan must know their quantiles."""
    spread = score_spread(plan)
    blocks = list(spread)
    low, quarter, median, three_quarters, high = zip(*spread.values(), strict=True)
    with _picture(path, title) as (figure, axes):
        axes.fill_between(blocks, low, high, color=REMOVED, label="1/16 to 15/16")
        middle = {"color": KEPT, "alpha": 0.5, "label": "middle half"}
        axes.fill_between(blocks, quarter, three_quarters, **middle)
        axes.plot(blocks, median, color=KEPT, label="median")
        axes.set_yscale("log" if score_axis(spread).log else "linear")
        axes.set(xlabel="block", ylabel=f"score ({plan.recipe.scorer})")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
