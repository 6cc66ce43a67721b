"""Pictures of errors: of FFN outputs, at every width and with and without least squares; of block
outputs, before and after they were fitted again."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from markupsafe import Markup

from ..pruning.plan import PruningPlan
from ..pruning.refit import BlockRefit
from .figures import HEIGHT
from .svg import PADDING, Axis, band, block_labels, dot, legend, line, mark, plot
from .tables import number_at

CUT = "cut"
REFIT_MARKS = {
    CUT: ("without", "as cut"),
    "sequential": ("importance", "after the closed form"),
    "blockwise": ("with", "after epochs of Adam"),
}
"""Class and text of each way of fitting again."""


def curves_figure(plan: PruningPlan) -> Markup | None:
    """Error of every FFN's output, relative to the output, at each share of its channels, and
    where the plan has put it; None where no curve is known."""
    axis = Axis(0, 1, HEIGHT)
    lines, dots = [], []
    for number, block in enumerate(plan.blocks):
        for ffn, (curve, width) in enumerate(
            zip(block.error_curves, block.ffn_widths, strict=False)
        ):
            dense, channels = float(curve.errors[0]), int(curve.widths[-1])
            if not (dense > 0 and curve.errors.isfinite().all()):
                continue
            shares, errors = 100 * curve.widths.double() / channels, curve.errors / dense
            points = zip(shares.tolist(), errors.tolist(), strict=True)
            lines.append(line([(x, axis.y(y)) for x, y in points], HEIGHT + PADDING, "curve"))
            share, error = 100 * width / channels, float(curve.at(torch.tensor([width]))) / dense
            name = (
                f"block {number}, FFN {ffn}" if len(block.error_curves) > 1 else f"block {number}"
            )
            shown = f"{name}: {share:.0f}% kept, error {error:.3g}"
            dots.append(mark(shown, dot(share, axis.y(error), "importance", 3.5)))
    if not lines:
        return None
    label = f"relative error of the outputs of {len(lines)} FFNs by the percent of channels kept"
    ticks = [(float(percent), f"{percent}%") for percent in (0, 25, 50, 75, 100)]
    return plot(axis, [*lines, *dots], label, ticks) + legend(
        [("quartiles", "an FFN at each width"), ("importance", "the width that it has")]
    )


def fits_figure(fits: Sequence[Mapping[str, Any]], count: int) -> Markup | None:
    """Held-out error of every block's output without and with least squares; None where it is not
    known of any."""
    known = []
    for fit in fits:
        number = number_at(fit, "block")
        errors = number_at(fit, "error_before"), number_at(fit, "error_after")
        if number is not None and errors[0] is not None and errors[1] is not None:
            known.append((int(number), errors[0], errors[1], number_at(fit, "applied") or 0))
    if not known:
        return None
    axis = Axis(0, max(max(before, after) for _, before, after, _ in known), HEIGHT)
    marks = []
    for number, before, after, applied in known:
        left, width = band(number, count)
        used = "fitted" if applied else "left as it was"
        marks.append(
            mark(
                f"block {number}: error {before:.3g} without, {after:.3g} with the fit; {used}",
                dot(left + width / 2, axis.y(before), "without"),
                dot(left + width / 2, axis.y(after), "with" if applied else "importance"),
            )
        )
    fitted = sum(bool(applied) for *_, applied in known)
    label = f"held-out error of {len(known)} blocks without and with least squares; {fitted} fitted"
    entries = [("without", "without"), ("with", "with the fit")]
    if fitted < len(known):
        entries.append(("importance", "with a fit that was not better, and was left out"))
    return plot(axis, marks, label, block_labels(count)) + legend(entries)


def refits_figure(refits: Sequence[BlockRefit], count: int) -> Markup | None:
    """Held-out error of every block's output as it was cut, and after each way of fitting it again
    with the step that was kept; None where it is not known of any."""
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
    for (number, way), error in points.items():
        left, width = band(number, count)
        kind, text = REFIT_MARKS[way]
        shown = f"block {number}: error {error:.3g} {text}"
        marks.append(mark(shown, dot(left + width / 2, axis.y(error), kind)))
    blocks, ways = ({key[part] for key in points} for part in (0, 1))
    label = f"held-out error of the outputs of {len(blocks)} blocks fitted again"
    return plot(axis, marks, label, block_labels(count)) + legend(
        [entry for way, entry in REFIT_MARKS.items() if way in ways]
    )
