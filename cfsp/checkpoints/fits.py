"""What compensations that fit came to, block by block, for reports."""

import math
from collections.abc import Sequence
from typing import Any

from ..pruning.compensation import FitRecord
from ..pruning.refit import BlockRefit

Fits = Sequence[Sequence[FitRecord]]
"""[block][FFN or expert]."""


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def fits_to_dicts(fits: Fits) -> list[dict[str, Any]]:
    """Plain values of each block, means where it has several FFNs or experts.

    ``applied`` of ``ffns`` have the fit, the others keep the columns that they had.
    """
    return [
        {
            "block": number,
            "ffns": len(records),
            "applied": sum(record.applied for record in records),
            "error_before": _mean([record.error_before for record in records]),
            "error_after": _mean([record.error_after for record in records]),
            "damping": max(record.damping for record in records),
        }
        for number, records in enumerate(fits)
        if records
    ]


def _error(value: float | None) -> str:
    return f"{value:.4g}" if value is not None else "not known"


def fits_summary(fits: Fits) -> str:
    """One line for a terminal."""
    records = [record for block in fits for record in block]
    judged = [r for r in records if r.error_before is not None and r.error_after is not None]
    line = f"{sum(record.applied for record in records)} of {len(records)} FFNs fitted"
    if not judged:
        return f"{line}; nothing was held out to judge by"
    kept = _mean([r.error_after if r.applied else r.error_before for r in judged])
    before = _mean([r.error_before for r in judged])
    return f"{line}; held-out error of their output {_error(before)} -> {_error(kept)} on average"


def fits_section(fits: Fits) -> str:
    """A section of the model card; empty without fits."""
    blocks = fits_to_dicts(fits)
    if not blocks:
        return ""
    rows = "\n".join(
        f"| {b['block']} | {_error(b['error_before'])} | {_error(b['error_after'])} | "
        f"{b['applied']} of {b['ffns']} | {b['damping']:g} |"
        for b in blocks
    )
    return f"""
## Least squares

The kept columns of down were fitted to the dense output, unless that did not lower the relative
error of the output on held-out calibration windows.

| block | error without | error with the fit | FFNs fitted | damping |
|---:|---:|---:|---:|---:|
{rows}
"""


def refits_summary(refits: Sequence[BlockRefit]) -> str:
    """One line for a terminal."""
    changed = sum(refit.kept > 0 for refit in refits)
    line = f"{changed} of {len(refits)} fits kept"
    judged = [refit.errors for refit in refits if refit.errors]
    if not judged:
        return f"{line}; nothing was held out to judge by"
    before, after = _mean([e[0] for e in judged]), _mean([min(e) for e in judged])
    return f"{line}; held-out error of the blocks {_error(before)} -> {_error(after)} on average"


def refits_section(refits: Sequence[BlockRefit]) -> str:
    """A section of the model card; empty where no block was fitted again."""
    if not refits:
        return ""
    rows = "\n".join(
        f"| {r.block} | {r.way} | {', '.join(map(_error, r.errors)) or 'not known'} | {r.kept} |"
        for r in refits
    )
    return f"""
## Blocks fitted again

After the cut each block was fitted to the dense block's output, on what the pruned blocks before it
give. The error is that of the block's output on held-out calibration windows, relative to what the
dense block adds to its input: first as cut, then after each step. The step with the least was kept.

| block | way | errors | kept |
|---:|---|---|---:|
{rows}
"""
