"""The picture of a plan."""

from pathlib import Path

from .errors import CfspError
from .plan import PruningPlan

KEPT, REMOVED, LINE = "#2f6fb0", "#d9e2ec", "#c2512f"


def plot_plan(plan: PruningPlan, path: str | Path, title: str) -> None:
    """Kept width and importance of every block, as a PNG.

    Raises:
        CfspError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise CfspError("the picture needs the package 'matplotlib'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

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
