"""Pictures of the errors of FFN outputs: at every width, and before and after least squares."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from .charts import PADDING, Axis, band, block_labels, dot, legend, line, mark, plot
from .figures import HEIGHT
from .measurements import number_at
from .plan import PruningPlan


def _numbers(values: Any) -> list[float]:
    """A list of numbers; [] for anything else."""
    if not isinstance(values, list):
        return []
    return [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]


def curves_figure(curves: Sequence[Mapping[str, Any]], plan: PruningPlan) -> Markup | None:
    """Error of every block's output, relative to the output, at each share of its channels, and
    where the plan has put it; None where no curve is known."""
    axis = Axis(0, 1, HEIGHT)
    lines, dots = [], []
    for curve in curves:
        number, widths, errors = (curve.get(key) for key in ("block", "widths", "errors"))
        widths, errors = _numbers(widths), _numbers(errors)
        if number not in range(len(plan.blocks)) or len(widths) != len(errors) or len(widths) < 2:
            continue
        if not (widths[-1] > 0 and errors[0] > 0 and widths == sorted(widths)):
            continue
        points = [
            (100 * w / widths[-1], e / errors[0]) for w, e in zip(widths, errors, strict=True)
        ]
        block = plan.blocks[int(str(number))]
        share = 100 * block.width / block.intermediate_size
        error = _between(points, share)
        lines.append(line([(x, axis.y(y)) for x, y in points], HEIGHT + PADDING, "curve"))
        shown = f"block {number}: {share:.0f}% kept, error {error:.3g}"
        dots.append(mark(shown, dot(share, axis.y(error), "importance", 3.5)))
    if not lines:
        return None
    label = f"relative error of the outputs of {len(lines)} blocks by the percent of channels kept"
    ticks = [(float(percent), f"{percent}%") for percent in (0, 25, 50, 75, 100)]
    return plot(axis, [*lines, *dots], label, ticks) + legend(
        [("quartiles", "a block at each width"), ("importance", "the width that it has")]
    )


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """The height of a line through points at ``x``."""
    for (left, low), (right, high) in pairwise(points):
        if left <= x <= right:
            return low + (high - low) * (x - left) / ((right - left) or 1)
    return points[-1][1]


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
