"""The pictures of a report: what a plan says about every block."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from ..pruning.plan import BlockPlan, PruningPlan
from .svg import (
    Axis,
    band,
    block_labels,
    dot,
    kept_strip,
    legend,
    line,
    mark,
    number,
    plot,
    rect,
)

HEIGHT = 190
SERIES = 6
"""Colours of lines; more results than that repeat them."""


def widths_figure(plan: PruningPlan) -> Markup:
    """Channels of every block, kept and removed."""
    count, widest = len(plan.blocks), max(block.intermediate_size for block in plan.blocks)
    axis = Axis(0, widest, HEIGHT)
    marks = []
    for position, block in enumerate(plan.blocks):
        x, bottom = band(position, count), axis.y(0)
        marks.append(
            mark(
                f"block {position}: {block.width:,} of {block.intermediate_size:,} channels kept "
                f"({block.width / block.intermediate_size:.1%})",
                rect(*x, axis.y(block.intermediate_size), axis.y(block.width), "removed"),
                rect(*x, axis.y(block.width), bottom, "kept"),
            )
        )
    label = (
        f"FFN channels kept in {count} blocks, from {min(plan.widths):,} to {max(plan.widths):,} "
        f"of {widest:,}"
    )
    return plot(axis, marks, label, block_labels(count)) + legend(
        [("kept", "kept"), ("removed", "removed")]
    )


def importance_figure(plan: PruningPlan) -> Markup:
    """Coarse importance of every block."""
    values = [block.importance for block in plan.blocks]
    count = len(values)
    axis = Axis(min(0.0, *values, 0.0), max(values) or 1.0, HEIGHT // 2)
    marks = []
    for position, value in enumerate(values):
        left, width = band(position, count, min(0.12, 0.004 * count))
        stem = rect(left, width, axis.y(value), axis.y(0), "importance-stem")
        head = dot(left + width / 2, axis.y(value), "importance")
        marks.append(mark(f"block {position}: importance {value:.5f}", stem, head))
    top = max(range(count), key=values.__getitem__)
    label = f"importance of {count} blocks; the highest is block {top} with {values[top]:.4f}"
    return plot(axis, marks, label, block_labels(count))


def cut_score(block: BlockPlan) -> float | None:
    """The score at which a block is cut, between two of its quantiles; None where none is known."""
    known = block.score_quantiles
    if not known:
        return None
    rank = (1 - block.width / block.intermediate_size) * (len(known) - 1)
    low, share = math.floor(rank), rank - math.floor(rank)
    high = min(low + 1, len(known) - 1)
    return known[low] * (1 - share) + known[high] * share


def scores_figure(plan: PruningPlan) -> Markup | None:
    """How the scores of every block are spread; None where a plan does not know."""
    blocks = plan.blocks
    if not all(block.score_quantiles for block in blocks):
        return None
    last = len(blocks[0].score_quantiles) - 1
    spread = [
        [block.score_quantiles[last * part // 16] for part in (1, 4, 8, 12, 15)] for block in blocks
    ]
    flat = [value for values in spread for value in values]
    positive = [value for value in flat if value > 0]
    log = len(positive) == len(flat) and max(flat) / min(flat) > 8
    axis = Axis(min(flat), max(flat), HEIGHT, log)
    marks = []
    for position, (block, values) in enumerate(zip(blocks, spread, strict=True)):
        low, quarter, median, three_quarters, high = (axis.y(value) for value in values)
        cut = cut_score(block)
        shapes = [
            rect(*band(position, len(blocks), 0.28), high, low, "spread"),
            rect(*band(position, len(blocks), 0.72), three_quarters, quarter, "quartiles"),
            rect(*band(position, len(blocks), 0.72), median - 1, median + 1, "median"),
        ]
        if cut is not None and block.width < block.intermediate_size:
            at = axis.y(cut)
            shapes.append(rect(*band(position, len(blocks), 0.9), at - 1.5, at + 1.5, "cut"))
        marks.append(
            mark(
                f"block {position}: median {values[2]:.4g}, middle half {values[1]:.4g} to "
                f"{values[3]:.4g}, cut at {number(cut or 0)}",
                *shapes,
            )
        )
    label = (
        f"spread of the {plan.recipe.scorer} scores in {len(blocks)} blocks, "
        f"medians from {min(v[2] for v in spread):.3g} to {max(v[2] for v in spread):.3g}"
    )
    return plot(axis, marks, label, block_labels(len(blocks))) + legend(
        [
            ("spread", "1/16 to 15/16"),
            ("quartiles", "middle half"),
            ("median", "median"),
            ("cut", "cut: channels below are removed"),
        ]
    )


def strips(plan: PruningPlan) -> list[dict[str, object]]:
    """Of every block a strip that shows which channels are kept, and what it says."""
    return [
        {
            "block": position,
            "image": kept_strip(block.flat_kept, block.intermediate_size),
            "kept": f"{block.width / block.intermediate_size:.0%}",
            "label": f"block {position}: {block.width:,} of {block.intermediate_size:,} kept",
        }
        for position, block in enumerate(plan.blocks)
    ]


def widths_compared(plans: Sequence[tuple[str, PruningPlan]]) -> Markup | None:
    """Share of channels that every block of several results keeps; None where blocks differ."""
    counts = {len(plan.blocks) for _, plan in plans}
    if len(counts) != 1:
        return None
    (count,) = counts
    axis = Axis(0, 100, HEIGHT)
    height = axis.height + 2 * 8
    marks = []
    for position, (name, plan) in enumerate(plans):
        shares = [100 * b.width / b.intermediate_size for b in plan.blocks]
        steps = [
            (edge / count * 100, axis.y(share))
            for block, share in enumerate(shares)
            for edge in (block, block + 1)
        ]
        marks.append(mark(name, line(steps, height, f"series-{position % SERIES}")))
    label = f"percent of channels kept in {count} blocks by {len(plans)} results"
    return plot(axis, marks, label, block_labels(count)) + legend(
        [(f"series-{position % SERIES}", name) for position, (name, _) in enumerate(plans)]
    )
