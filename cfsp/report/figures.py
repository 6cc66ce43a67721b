"""The figures of a report: a plan's widths, importance and scores, and the errors of its fits."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..pruning.plan import BlockPlan, PruningPlan
from ..pruning.refit import BlockRefit
from .svg import (
    PADDING,
    Axis,
    Plot,
    band,
    block_labels,
    centre,
    dot,
    line,
    mark,
    number,
    rect,
    series,
)
from .tables import number_at

HEIGHT = 190
SPREAD = (1, 4, 8, 12, 15)
"""Ranks, in sixteenths of the channels, that tell how the scores of a block are spread."""
CUT = "cut"
REFIT_MARKS = {
    CUT: ("without", "as cut"),
    "sequential": ("importance", "after the closed form"),
    "blockwise": ("with", "after epochs of Adam"),
}
"""Class and text of each way to refit a block."""


def widths_figure(plan: PruningPlan) -> Plot:
    """Channels of every block, kept and removed."""
    sizes = [(block.width, block.intermediate_size) for block in plan.blocks]
    return _kept_figure(sizes, "channels", "FFN channels", HEIGHT)


def groups_figure(plan: PruningPlan) -> Plot | None:
    """KV groups of every block, kept and removed; None where they are no units."""
    known = [block.groups for block in plan.blocks]
    if not any(known):
        return None
    sizes = [(len(own[0]), own[1]) if own else (0, 0) for own in known]
    return _kept_figure(sizes, "KV groups", "KV groups", HEIGHT // 2)


def _kept_figure(sizes: Sequence[tuple[int, int]], units: str, called: str, height: int) -> Plot:
    """Units of every block, (kept, of how many); (0, 0) of one that has none."""
    count, most = len(sizes), max(size for _, size in sizes)
    axis = Axis(0, most, height)
    marks = []
    for position, (kept, size) in enumerate(sizes):
        across = band(position, count)
        shapes = (
            rect(*across, axis.y(size), axis.y(kept), "removed"),
            rect(*across, axis.y(kept), axis.y(0), "kept"),
        )
        share = kept / size if size else 1.0
        marks.append(
            mark(f"block {position}: {kept:,} of {size:,} {units} kept ({share:.1%})", *shapes)
        )
    known = [kept for kept, size in sizes if size]
    ends = f"from {min(known):,} to {max(known):,} of {most:,}"
    label = f"{called} kept in {len(known)} blocks, {ends}"
    entries = [("kept", "kept"), ("removed", "removed")]
    return Plot(axis, marks, label, block_labels(count), entries)


def importance_figure(plan: PruningPlan) -> Plot:
    """Coarse importance of every block."""
    values = [block.importance for block in plan.blocks]
    count = len(values)
    axis = Axis(min(0.0, *values), max(values) or 1.0, HEIGHT // 2)
    stem = min(0.12, 0.004 * count)
    marks = [
        mark(
            f"block {position}: importance {value:.5f}",
            rect(*band(position, count, stem), axis.y(value), axis.y(0), "importance-stem"),
            dot(centre(position, count, stem), axis.y(value), "importance"),
        )
        for position, value in enumerate(values)
    ]
    top = max(range(count), key=values.__getitem__)
    label = f"importance of {count} blocks; the highest is block {top} with {values[top]:.4f}"
    return Plot(axis, marks, label, block_labels(count))


def score_spread(plan: PruningPlan) -> dict[int, tuple[float, ...]]:
    """The scores of every block with an FFN, by its number, at the ranks of SPREAD; {} where one
    does not know them."""
    known = {
        n: block.score_quantiles for n, block in enumerate(plan.blocks) if block.intermediate_size
    }
    if not all(known.values()):
        return {}
    return {
        position: tuple(quantiles[(len(quantiles) - 1) * part // 16] for part in SPREAD)
        for position, quantiles in known.items()
    }


def score_axis(spread: Mapping[int, tuple[float, ...]]) -> Axis:
    """An axis for all scores, logarithmic where they are positive and differ enough."""
    low, high = min(map(min, spread.values())), max(map(max, spread.values()))
    return Axis(low, high, HEIGHT, log=low > 0 and high / low > 8)


def cut_score(block: BlockPlan) -> float:
    """The score at which a block is cut, between two of its quantiles."""
    known = block.score_quantiles
    rank = (1 - block.share) * (len(known) - 1)
    low, share = math.floor(rank), rank - math.floor(rank)
    high = min(low + 1, len(known) - 1)
    return known[low] * (1 - share) + known[high] * share


def scores_figure(plan: PruningPlan) -> Plot | None:
    """How the scores of every block are spread; None where a plan does not know."""
    spread = score_spread(plan)
    if not spread:
        return None
    count = len(plan.blocks)
    axis = score_axis(spread)
    marks = []
    for position, scores in spread.items():
        block = plan.blocks[position]
        low, quarter, median, three_quarters, high = map(axis.y, scores)
        cut = cut_score(block)
        shapes = [
            rect(*band(position, count, 0.28), high, low, "spread"),
            rect(*band(position, count, 0.72), three_quarters, quarter, "quartiles"),
            rect(*band(position, count, 0.72), median - 1, median + 1, "median"),
        ]
        if block.width < block.intermediate_size:
            at = axis.y(cut)
            shapes.append(rect(*band(position, count, 0.9), at - 1.5, at + 1.5, "cut"))
        text = (
            f"block {position}: median {scores[2]:.4g}, middle half {scores[1]:.4g} to "
            f"{scores[3]:.4g}, cut at {number(cut)}"
        )
        marks.append(mark(text, *shapes))
    medians = [scores[2] for scores in spread.values()]
    label = (
        f"spread of the {plan.recipe.scorer} scores in {len(spread)} blocks, "
        f"medians from {min(medians):.3g} to {max(medians):.3g}"
    )
    entries = [
        ("spread", "1/16 to 15/16"),
        ("quartiles", "middle half"),
        ("median", "median"),
        ("cut", "cut: channels below are removed"),
    ]
    return Plot(axis, marks, label, block_labels(count), entries)


def widths_compared(plans: Sequence[tuple[str, PruningPlan]]) -> Plot | None:
    """Share of channels that every block of several results keeps; None where blocks differ."""
    counts = {len(plan.blocks) for _, plan in plans}
    if len(counts) != 1:
        return None
    (count,) = counts
    axis = Axis(0, 100, HEIGHT)
    marks = []
    for position, (name, plan) in enumerate(plans):
        steps = [
            (edge / count * 100, axis.y(100 * block.share))
            for place, block in enumerate(plan.blocks)
            for edge in (place, place + 1)
        ]
        marks.append(mark(name, line(steps, HEIGHT + 2 * PADDING, series(position))))
    label = f"percent of channels kept in {count} blocks by {len(plans)} results"
    entries = [(series(position), name) for position, (name, _) in enumerate(plans)]
    return Plot(axis, marks, label, block_labels(count), entries)


def curves_figure(plan: PruningPlan) -> Plot | None:
    """Relative error of every part's output at each share of its units, and the number that the
    plan gives it; None where no curve is known."""
    axis = Axis(0, 1, HEIGHT)
    lines, dots = [], []
    for position, block in enumerate(plan.blocks):
        curves = zip(block.error_curves, block.kept, strict=False)
        for part, (curve, kept) in enumerate(curves):
            dense, channels, width = float(curve.errors[0]), int(curve.widths[-1]), kept.shape[1]
            if not (dense > 0 and curve.errors.isfinite().all()):
                continue
            shares, errors = 100 * curve.widths.double() / channels, curve.errors / dense
            points = zip(shares.tolist(), map(axis.y, errors.tolist()), strict=True)
            lines.append(line(points, HEIGHT + PADDING, "curve"))
            share, error = 100 * width / channels, float(curve.at(torch.tensor([width]))) / dense
            kind = "FFN" if block.units[part].are_channels else "attention"
            name = f"block {position}" + (f", {kind} {part}" if len(block.error_curves) > 1 else "")
            shown = f"{name}: {share:.0f}% kept, error {error:.3g}"
            dots.append(mark(shown, dot(share, axis.y(error), "importance", 3.5)))
    if not lines:
        return None
    label = f"relative error of the outputs of {len(lines)} parts by the percent of units kept"
    ticks = [(float(percent), f"{percent}%") for percent in (0, 25, 50, 75, 100)]
    entries = [("quartiles", "a part at each size"), ("importance", "the size that it has")]
    return Plot(axis, [*lines, *dots], label, ticks, entries)


def fits_figure(fits: Sequence[Mapping[str, Any]], count: int) -> Plot | None:
    """Held-out error of every block's output without and with least squares; None where no block
    knows it."""
    known = [
        (int(position), before, after, bool(number_at(fit, "applied")))
        for fit in fits
        if (position := number_at(fit, "block")) is not None
        and (before := number_at(fit, "error_before")) is not None
        and (after := number_at(fit, "error_after")) is not None
    ]
    if not known:
        return None
    axis = Axis(0, max(max(before, after) for _, before, after, _ in known), HEIGHT)
    marks = [
        mark(
            f"block {position}: error {before:.3g} without, {after:.3g} with the fit; "
            f"{'fitted' if applied else 'left as it was'}",
            dot(centre(position, count), axis.y(before), "without"),
            dot(centre(position, count), axis.y(after), "with" if applied else "importance"),
        )
        for position, before, after, applied in known
    ]
    fitted = sum(applied for *_, applied in known)
    label = f"held-out error of {len(known)} blocks without and with least squares; {fitted} fitted"
    entries = [("without", "without"), ("with", "with the fit")]
    if fitted < len(known):
        entries.append(("importance", "with a fit that was not better, and was left out"))
    return Plot(axis, marks, label, block_labels(count), entries)


def refits_figure(refits: Sequence[BlockRefit], count: int) -> Plot | None:
    """Held-out error of every block's output as it was cut, and after each way to refit it with
    the step that was kept; None where no block knows it."""
    points: dict[tuple[int, str], float] = {}
    for refit in refits:
        if not refit.errors or refit.way not in REFIT_MARKS:
            continue
        before, after = refit.errors[0], refit.errors[refit.kept]
        if math.isfinite(before) and math.isfinite(after):
            points.setdefault((refit.block, CUT), before)
            points[refit.block, refit.way] = after
    if not points:
        return None
    axis = Axis(0, max(points.values()), HEIGHT)
    marks = []
    for (position, way), error in points.items():
        kind, text = REFIT_MARKS[way]
        shown = f"block {position}: error {error:.3g} {text}"
        marks.append(mark(shown, dot(centre(position, count), axis.y(error), kind)))
    blocks, ways = ({key[part] for key in points} for part in (0, 1))
    label = f"held-out error of the outputs of {len(blocks)} blocks fitted again"
    entries = [entry for way, entry in REFIT_MARKS.items() if way in ways]
    return Plot(axis, marks, label, block_labels(count), entries)
