"""Budgets of a whole model, in parameters, FLOPs or latency: as text, and in FFN channels."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..apportion import Steps, reachable, total_cost
from ..errors import CfspError, shown

KINDS = ("params", "flops", "latency")
FORM = "params=0.25, params=6B, flops=0.25 or latency=0.25, the last two perhaps with @1x1024"
COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
FORMS = re.compile(
    r"(\w{1,9})=(\d{0,20}\.?\d{1,20})([KMBT]?)(?:@(\d{1,9})x(\d{1,9}))?", re.ASCII | re.IGNORECASE
)
MOST_PARAMETERS = 10**15
BATCH, LENGTH = 1, 1024
"""What FLOPs and latency are of, where nothing else is said."""
TOLERANCES = {"params": 0.005, "flops": 0.005, "latency": 0.05}
"""How far from the request, as a fraction of it, the widths may be."""


@dataclass(frozen=True)
class ModelBudget:
    """What is asked of a whole model."""

    text: str
    kind: str
    fraction: float | None
    """Fraction of all parameters, FLOPs or seconds to remove; None where ``parameters`` says."""
    parameters: int | None
    """Parameters to keep in all."""
    batch: int
    length: int
    """FLOPs and latency are those of a forward call over [batch, length] tokens."""

    def kept(self, total: float) -> float:
        """What may stay of ``total``."""
        if self.parameters is not None:
            return self.parameters
        return (1 - (self.fraction or 0.0)) * total

    def written(self, kept: float, total: float) -> str:
        """What stays of ``total``, in the terms of the request."""
        if self.parameters is not None:
            return f"{kept / 1e6:,.1f}M"
        return f"{1 - kept / total:.4f}"

    def check(self, kept: float, total: float, multiple: int) -> None:
        """Raise CfspError where widths in multiples of ``multiple`` come too far from the request:
        to ``kept``."""
        wanted = self.kept(total)
        off = abs(kept - wanted) / max(wanted, 1)
        if off > TOLERANCES[self.kind]:
            finer = 1 << max(0, int(multiple * TOLERANCES[self.kind] / off).bit_length() - 1)
            hint = f"; take `width_multiple={finer}`" if finer < multiple else ""
            raise CfspError(
                f"{self.text}: widths in multiples of {multiple} come to "
                f"{self.kind}={self.written(kept, total)}{hint}"
            )


def parse_model_budget(text: str) -> ModelBudget:
    """Read "params=0.25", "params=6B", "flops=0.25@8x2048" (batch x length) or "latency=0.25".

    A number below 1 is a fraction to remove, any other the parameters to keep; K, M, B and T are
    thousands to trillions. Anything else raises CfspError.
    """
    wrong = f"budget {shown(text)}:"
    found = FORMS.fullmatch(text.strip())
    if found is None or found[1] not in KINDS:
        raise CfspError(f"{wrong} expected {FORM}")
    kind, number, unit = found[1], float(found[2]), found[3].upper()
    batch, length = int(found[4] or BATCH), int(found[5] or LENGTH)
    absolute = bool(unit) or number >= 1
    if absolute and kind != "params":
        raise CfspError(f"{wrong} {kind} is a fraction to remove, below 1")
    if found[4] and kind == "params":
        raise CfspError(f"{wrong} parameters are the same at any batch and length")
    if min(batch, length) < 1:
        raise CfspError(f"{wrong} batch and length must be 1 or more")
    if number * COUNTS[unit] > MOST_PARAMETERS:
        raise CfspError(f"{wrong} no model has more than {MOST_PARAMETERS} parameters")
    parameters = round(number * COUNTS[unit]) if absolute else None
    return ModelBudget(text.strip(), kind, None if absolute else number, parameters, batch, length)


Widths = tuple[int, ...]
WidthFit = Callable[[Callable[[float], Widths], Sequence[Steps], bool], Widths]
"""The widest widths that a limit allows, see :meth:`cfsp.costs.latency.LatencyLimit.fitted`."""


@dataclass(frozen=True)
class ChannelBudget:
    """What an allocator is given: the fraction to remove of what all channels cost."""

    sparsity: float
    costs: tuple[int, ...]
    """Cost of one unit in every part, in all its experts."""
    fit: WidthFit | None = None
    """Of a latency: ``sparsity`` is then what it would be if channels were all that counted."""

    def widths(
        self, widths_at: Callable[[float], Widths], steps: Sequence[Steps], equal: bool
    ) -> Widths:
        """Widths under the budget, from what an allocator gives for a sparsity."""
        if self.fit is None:
            return widths_at(self.sparsity)
        return self.fit(widths_at, steps, equal)


def channel_budget(
    budget: ModelBudget,
    total: float,
    steps: Sequence[Steps],
    costs: Sequence[int],
    added: float = 0,
) -> ChannelBudget:
    """The fraction of the channels' cost that has to go, so that the whole model meets its budget;
    raises CfspError where no widths do.

    ``total``, of the dense model, and ``costs``, of one unit in all experts of every part, are in
    one unit; ``steps`` are of one expert; ``added`` is what else changes the total: biases that are
    added, experts and blocks that go.
    """
    channels, multiple = total_cost(steps, costs), max(own.multiple for own in steps)
    fixed = total - channels + added
    wanted = budget.kept(total)
    least, most = (kept + fixed for kept in reachable(steps, costs))
    slack = TOLERANCES[budget.kind] * wanted
    if not least - slack <= wanted <= most + slack:
        low, high = (budget.written(kept, total) for kept in (most, least))
        raise CfspError(
            f"{budget.text} is out of reach: the FFNs, in multiples of {multiple}, allow "
            f"{budget.kind}={low} to {high}"
        )
    kept = min(max(wanted, least), most) - fixed
    unit = math.gcd(*costs)
    return ChannelBudget(1 - kept / channels, tuple(cost // unit for cost in costs))
