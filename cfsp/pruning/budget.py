"""Budgets of a whole model, in parameters, FLOPs, latency or KV bytes: as text, and in units."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..apportion import Steps, reachable, total_cost
from ..errors import CfspError, shown

KINDS = ("params", "flops", "latency", "kv")
FORM = (
    "params=0.25, params=6B, flops=0.25 or latency=0.25, the last two perhaps with @1x1024, or "
    "@8x1+4096 where a cache is full; or kv=0.5, alone or after one of these and a comma"
)
COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
SHAPE = r"(\d{1,9})x(\d{1,9})(?:\+(\d{1,9}))?"
"""Batch x length + context."""
FORMS = re.compile(
    rf"(\w{{1,9}})=(\d{{0,20}}\.?\d{{1,20}})([KMBT]?)(?:@{SHAPE})?", re.ASCII | re.IGNORECASE
)
MOST_PARAMETERS = 10**15
BATCH, LENGTH = 1, 1024
"""What FLOPs and latency are of, where nothing else is said."""
TOLERANCES = {"params": 0.005, "flops": 0.005, "latency": 0.05, "kv": 0.005}
"""How far from the request, as a fraction of it, the widths may be."""


@dataclass(frozen=True)
class ModelBudget:
    """What is asked of a whole model."""

    text: str
    kind: str
    fraction: float | None
    """Fraction of all parameters, FLOPs, seconds or KV bytes to remove; None where ``parameters``
    says."""
    parameters: int | None
    """Parameters to keep in all."""
    batch: int
    length: int
    """FLOPs and latency are those of a forward call over [batch, length] tokens."""
    context: int = 0
    """Tokens that are in the cache before it."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Batch, length and context."""
        return self.batch, self.length, self.context

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

    def check(self, kept: float, total: float, multiple: int, step: float = 0.0) -> None:
        """Raise CfspError where widths in multiples of ``multiple`` come too far from the request:
        to ``kept``; by half of a ``step`` they may in any case."""
        wanted = self.kept(total)
        missed = abs(kept - wanted)
        if missed > max(TOLERANCES[self.kind] * max(wanted, 1), step / 2):
            off = missed / max(wanted, 1)
            finer = 1 << max(0, int(multiple * TOLERANCES[self.kind] / off).bit_length() - 1)
            what, name = "widths", "width_multiple"
            if self.kind == "kv":
                what, name = "numbers of KV groups", "group_multiple"
            hint = f"; take `{name}={finer}`" if finer < multiple else ""
            raise CfspError(
                f"{self.text}: {what} in multiples of {multiple} come to "
                f"{self.kind}={self.written(kept, total)}{hint}"
            )

    def check_beside(self, kv: "ModelBudget", kept: float, total: float) -> None:
        """Raise CfspError where another budget, of KV bytes, already leaves too little."""
        if kept < (1 - TOLERANCES[self.kind]) * self.kept(total):
            most = f"{self.kind}={self.written(kept, total)}"
            raise CfspError(f"{self.text}: beside {kv.text} no plan keeps more than {most}")


def parse_model_budget(text: str) -> ModelBudget:
    """Read "params=0.25", "params=6B", "flops=0.25@8x2048" (batch x length), "kv=0.5", or
    "latency=0.25@8x1+4096" (with so many tokens in the cache).

    A number below 1 is a fraction to remove, any other the parameters to keep; K, M, B and T are
    thousands to trillions. Anything else raises CfspError.
    """
    wrong = f"budget {shown(text)}:"
    found = FORMS.fullmatch(text.strip())
    if found is None or found[1] not in KINDS:
        raise CfspError(f"{wrong} expected {FORM}")
    kind, number, unit = found[1], float(found[2]), found[3].upper()
    batch, length, context = int(found[4] or BATCH), int(found[5] or LENGTH), int(found[6] or 0)
    absolute = bool(unit) or number >= 1
    if absolute and kind != "params":
        raise CfspError(f"{wrong} {kind} is a fraction to remove, below 1")
    if found[4] and kind in ("params", "kv"):
        what = "parameters" if kind == "params" else "KV bytes of a token"
        raise CfspError(f"{wrong} {what} are the same at any batch and length")
    if min(batch, length) < 1:
        raise CfspError(f"{wrong} batch and length must be 1 or more")
    if number * COUNTS[unit] > MOST_PARAMETERS:
        raise CfspError(f"{wrong} no model has more than {MOST_PARAMETERS} parameters")
    parameters = round(number * COUNTS[unit]) if absolute else None
    fraction = None if absolute else number
    return ModelBudget(text.strip(), kind, fraction, parameters, batch, length, context)


def check_budgets(budgets: Sequence[ModelBudget], attention: bool, allocator: str) -> None:
    """Raise CfspError where a recipe's budgets are nothing for its units and its allocator."""
    kinds = {own.kind for own in budgets}
    if "kv" in kinds and not attention:
        raise CfspError(f"{budgets[-1].text}: KV bytes go with `units` groups or attention")
    if len(budgets) > 1 and allocator != "knapsack":
        raise CfspError(f"two budgets are for allocator 'knapsack', got {allocator!r}")
    if allocator == "search" and (given := kinds & {"latency", "kv"}):
        what = {"latency": "seconds", "kv": "KV bytes"}[given.pop()]
        raise CfspError(f"allocator 'search' keeps what channels cost, not {what}: use another")


def parse_model_budgets(text: str) -> tuple[ModelBudget, ...]:
    """One budget, or two with a comma between them; of two, the one of KV bytes comes last."""
    found = sorted(map(parse_model_budget, text.split(",")), key=lambda own: own.kind == "kv")
    if len(found) > 2 or [own.kind == "kv" for own in found] in ([False] * 2, [True] * 2):
        raise CfspError(f"budget {shown(text)}: two at once are one of KV bytes and one other")
    return tuple(found)


Widths = tuple[int, ...]
WidthFit = Callable[[Callable[[float], Widths], Sequence[Steps], bool], Widths]
"""The widest widths that a limit allows, see :meth:`cfsp.costs.latency.LatencyLimit.fitted`."""


@dataclass(frozen=True)
class KVLimit:
    """Beside another budget, what may stay of the KV bytes."""

    costs: tuple[int, ...]
    """Of one unit in every part, 0 of an FFN's."""
    capacity: int
    """What all may cost at most."""


@dataclass(frozen=True)
class ChannelBudget:
    """What an allocator is given: the fraction to remove of what all channels cost."""

    sparsity: float
    costs: tuple[int, ...]
    """Cost of one unit in every part, in all its experts."""
    fit: WidthFit | None = None
    """Of a latency: ``sparsity`` is then what it would be if channels were all that counted."""
    kv: KVLimit | None = None
    """Where there are two budgets."""

    def widths(
        self, widths_at: Callable[[float], Widths], steps: Sequence[Steps], equal: bool
    ) -> Widths:
        """Widths under the budget, from what an allocator gives for a sparsity."""
        if self.fit is None:
            return widths_at(self.sparsity)
        return self.fit(widths_at, steps, equal)


def step_cost(steps: Sequence[Steps], costs: Sequence[int]) -> int:
    """What the dearest step costs of all parts that are cut."""
    pairs = zip(steps, costs, strict=True)
    return max((own.multiple * cost for own, cost in pairs if not own.is_fixed), default=0)


def kv_limit(
    budget: ModelBudget, total: float, steps: Sequence[Steps], costs: Sequence[int]
) -> KVLimit:
    """A budget of KV bytes as what parts may keep, to the nearest step; raises CfspError where no
    numbers of groups meet it. ``total`` and ``costs`` as for :func:`channel_budget`."""
    step, unit = step_cost(steps, costs), math.gcd(*costs)
    if not step:
        raise CfspError(f"{budget.text}: no KV bytes go with what `units` may take")
    fixed = total - total_cost(steps, costs)
    least, most = (kept + fixed for kept in reachable(steps, costs))
    wanted = budget.kept(total)
    if not least - step / 2 <= wanted <= most + step / 2:
        raise _out_of_reach(budget, steps, least, most, total)
    kept = max(wanted - fixed + step / 2, least - fixed)
    return KVLimit(tuple(cost // unit for cost in costs), int(kept // unit))


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
    channels = total_cost(steps, costs)
    fixed = total - channels + added
    wanted = budget.kept(total)
    least, most = (kept + fixed for kept in reachable(steps, costs))
    slack = TOLERANCES[budget.kind] * wanted
    if not least - slack <= wanted <= most + slack:
        raise _out_of_reach(budget, steps, least, most, total)
    kept = min(max(wanted, least), most) - fixed
    unit = math.gcd(*costs)
    return ChannelBudget(1 - kept / channels, tuple(cost // unit for cost in costs))


def _out_of_reach(
    budget: ModelBudget, steps: Sequence[Steps], least: float, most: float, total: float
) -> CfspError:
    multiple = max(own.multiple for own in steps)
    low, high = (budget.written(kept, total) for kept in (most, least))
    parts = (
        "numbers of KV groups" if budget.kind == "kv" else f"the FFNs, in multiples of {multiple},"
    )
    return CfspError(f"{budget.text} is out of reach: {parts} allow {budget.kind}={low} to {high}")
