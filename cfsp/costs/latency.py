"""Seconds of a model by the units of its parts, by a measured table; numbers that meet them."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from operator import lt
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from ..apportion import Steps, reachable, total_cost
from ..errors import CfspError
from ..io.documents import read_as
from ..io.files import json_text, saved_file
from ..pruning.budget import KVLimit, Widths
from ..typed import Bound, Count, Natural, NotNegative, decode

FORMAT = "cfsp-latency-2"
HALVINGS = 14
CLOSE = 1e-3
"""Share of the seconds asked for: nearer than this, widths are filled up channel by channel."""


@dataclass(frozen=True)
class WidthCurve:
    """Seconds of a block for widths of one of its FFNs, or numbers of the KV groups of its
    attention, its other parts being dense."""

    widths: Annotated[
        tuple[Natural, ...], Bound("ascending", lambda w: w and all(map(lt, w, w[1:])))
    ]
    """The last one is the dense part's; 0 is that of a block without it."""
    seconds: tuple[NotNegative, ...]
    groups: bool = False
    """Whether it is of KV groups."""

    def at(self, widths: np.ndarray) -> np.ndarray:
        """Seconds less the dense part's, linear in between; below the least width its own."""
        return np.interp(widths, self.widths, self.seconds) - self.seconds[-1]


Curves = Annotated[tuple[WidthCurve, ...], Bound("of 1 or more parts", len)]
Kinds = Annotated[tuple[Natural, ...], Bound("of 1 or more blocks", len)]


@dataclass(frozen=True)
class LatencyTable:
    """What was measured of a model on a device, for a forward call over [batch, length] tokens,
    perhaps with others in a cache."""

    identity: dict[str, Any]
    """What it was measured of and on: device, dtype, batch, length, context, versions, model."""
    outer_seconds: NotNegative
    """Of embeddings, norm and head."""
    kinds: tuple[Curves, ...]
    """A curve for every part of every kind of block, in their order; of one without any, 0 alone.
    """
    blocks: Kinds
    """The kind of every block."""

    @property
    def batch(self) -> int:
        """Windows of the forward call."""
        return int(self.identity["batch"])

    @property
    def length(self) -> int:
        """Tokens of each."""
        return int(self.identity["length"])

    @property
    def context(self) -> int:
        """Tokens of each in the cache before it."""
        return int(self.identity["context"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Batch, length and context."""
        return self.batch, self.length, self.context

    @property
    def knows_groups(self) -> bool:
        """Whether it has curves of KV groups."""
        return any(curve.groups for curves in self.kinds for curve in curves)

    def of_channels(self) -> "LatencyTable":
        """The table without what it says of KV groups."""
        kinds = []
        for curves in self.kinds:
            ffns = tuple(curve for curve in curves if not curve.groups)
            kinds.append(ffns or (WidthCurve((0,), curves[0].seconds[-1:]),))
        return replace(self, kinds=tuple(kinds))

    @cached_property
    def curves(self) -> tuple[WidthCurve, ...]:
        """Of every part of every block, in order."""
        own = (curve for kind in self.blocks for curve in self.kinds[kind])
        return tuple(curve for curve in own if curve.widths[-1])

    @property
    def dense_seconds(self) -> float:
        """Of the dense model."""
        return self.outer_seconds + sum(self.kinds[kind][0].seconds[-1] for kind in self.blocks)

    def predicted(self, widths: Sequence[int]) -> float:
        """Seconds of the model with these numbers of units, one per part of every block."""
        pairs = zip(self.curves, widths, strict=True)
        return self.dense_seconds + sum(float(curve.at(np.array(width))) for curve, width in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "format": FORMAT,
            "identity": self.identity,
            "outer_seconds": self.outer_seconds,
            "kinds": [
                [
                    {
                        "widths": list(c.widths),
                        "seconds": list(c.seconds),
                        **({"groups": True} if c.groups else {}),
                    }
                    for c in kind
                ]
                for kind in self.kinds
            ],
            "blocks": list(self.blocks),
        }

    def fingerprint(self) -> str:
        """SHA-256 of everything in it."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def load_table(path: str | Path) -> LatencyTable:
    """Read what :func:`save_table` wrote; CfspError for anything else."""
    wrong = f"{path} is not a valid latency table"
    table: LatencyTable = read_as(LatencyTable, path, "latency table", FORMAT)
    for name in ("batch", "length"):
        decode(Count, table.identity.get(name), wrong, f"identity.{name}")
    decode(Natural, table.identity.get("context"), wrong, "identity.context")
    for kind, curves in enumerate(table.kinds):
        if any(len(curve.widths) != len(curve.seconds) for curve in curves):
            raise CfspError(f"{wrong}: kinds[{kind}] has more or fewer seconds than widths")
    if max(table.blocks) >= len(table.kinds):
        raise CfspError(f"{wrong}: blocks must be below {len(table.kinds)}, the number of kinds")
    if not 0 < table.dense_seconds < math.inf:
        raise CfspError(f"{wrong}: the dense model takes {table.dense_seconds} seconds")
    return table


def save_table(table: LatencyTable, path: Path) -> None:
    with saved_file(path, "latency table") as partial:
        partial.write_text(json_text(table.to_dict()), encoding="utf-8")


@dataclass(frozen=True)
class LatencyLimit:
    """Seconds that a pruned model may take, by a table."""

    table: LatencyTable
    seconds: float
    text: str
    """The request, for errors."""
    kv: KVLimit | None = None
    """Parts with KV bytes stay as the allocator has them."""

    def costs(self, sizes: Sequence[int]) -> Widths:
        """About what one unit costs in every part, to a hundredth of the dearest one, or of what a
        part costs where they have unequal numbers of units."""
        slopes = [
            max(0.0, -float(curve.at(np.array(curve.widths[0]))) / (size - curve.widths[0] or 1))
            for curve, size in zip(self.table.curves, sizes, strict=True)
        ]
        dearest, fineness = max(slopes) or 1.0, 100 * max(sizes) // min(sizes)
        found = [max(1, round(fineness * slope / dearest)) for slope in slopes]
        return tuple(cost // math.gcd(*found) for cost in found)

    def fitted(
        self,
        widths_at: Callable[[float], Widths],
        allowed: Sequence[Steps],
        equal: bool = False,
    ) -> Widths:
        """The widest widths that the limit allows, by halving what ``widths_at`` is to remove.

        A width gives way to a larger one that is no slower. The seconds that remain are filled up,
        first where the allocator would add channels next; ``equal`` widths stay as they are.
        """
        still = [bool(cost) for cost in self.kv.costs] if self.kv else [equal] * len(allowed)
        steps = _Seconds(self.table, allowed, still)
        costs = self.costs([own.size for own in allowed])
        total = total_cost(allowed, costs)
        high, low = (1 - kept / total for kept in reachable(allowed, costs))
        widest, best = (steps.snapped(widths_at(sparsity)) for sparsity in (low, high))
        if steps.seconds(best) > self.seconds:
            multiple = max(own.multiple for own in allowed)
            ends = (1 - steps.seconds(widths) / steps.dense for widths in (widest, best))
            shown = [f"{max(0.0, end):.4f}" for end in ends]
            raise CfspError(
                f"{self.text} is out of reach: by the table the FFNs, in multiples of {multiple}, "
                f"allow latency={shown[0]} to {shown[1]}"
            )
        if steps.seconds(widest) <= self.seconds:
            return widest
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            widths = steps.snapped(widths_at(middle))
            if steps.seconds(widths) <= self.seconds:
                high, best = middle, widths
            else:
                low, widest = middle, widths
            if self.seconds - steps.seconds(best) < CLOSE * self.seconds:
                break
        return best if equal else steps.filled(best, widest, self.seconds)


class _Seconds:
    """Seconds of every part at every number of units that it may keep."""

    def __init__(
        self, table: LatencyTable, allowed: Sequence[Steps], still: Sequence[bool]
    ) -> None:
        self.allowed, self.still, self.dense = allowed, still, table.dense_seconds

        @cache
        def steps(curve: WidthCurve, own: Steps, still: bool) -> tuple[np.ndarray, np.ndarray]:
            saved = curve.at(np.arange(own.least, own.size + 1, own.multiple))
            return saved, np.arange(len(saved)) if still else _no_slower(saved)

        found = [steps(*part) for part in zip(table.curves, allowed, still, strict=True)]
        self.saved = [saved for saved, _ in found]
        """By part and position, the number of steps from the least: seconds against the dense one.
        """
        self.next = [no_slower for _, no_slower in found]
        """By the same: the last position that is no slower."""

    def _positions(self, widths: Sequence[int]) -> list[int]:
        pairs = zip(widths, self.allowed, strict=True)
        return [(width - own.least) // own.multiple for width, own in pairs]

    def _widths(self, positions: Sequence[int]) -> Widths:
        pairs = zip(positions, self.allowed, strict=True)
        return tuple(own.least + int(position) * own.multiple for position, own in pairs)

    def seconds(self, widths: Sequence[int]) -> float:
        pairs = zip(self.saved, self._positions(widths), strict=True)
        return self.dense + sum(float(saved[at]) for saved, at in pairs)

    def snapped(self, widths: Sequence[int]) -> Widths:
        pairs = zip(self.next, self._positions(widths), strict=True)
        return self._widths([wider[at] for wider, at in pairs])

    def filled(self, widths: Widths, wider: Widths, limit: float) -> Widths:
        """``widths`` widened as far as the limit goes, first where ``wider`` adds most."""
        at, spent = self._positions(widths), self.seconds(widths)
        lacks = [(b - a) / x.size for a, b, x in zip(widths, wider, self.allowed, strict=True)]
        moving = (part for part, still in enumerate(self.still) if not still)
        order = sorted(moving, key=lambda part: (-lacks[part], part))
        changed = True
        while changed:
            changed = False
            for part in order:
                saved = self.saved[part]
                if at[part] + 1 < len(saved):
                    then = int(self.next[part][at[part] + 1])
                    more = float(saved[then] - saved[at[part]])
                    if spent + more <= limit:
                        at[part], spent, changed = then, spent + more, True
        return self._widths(at)


def _no_slower(seconds: np.ndarray) -> np.ndarray:
    """For every position the last fastest one from there on."""
    found, best = np.empty(len(seconds), dtype=np.int64), len(seconds) - 1
    for at in range(len(seconds) - 1, -1, -1):
        if seconds[at] < seconds[best]:
            best = at
        found[at] = best
    return found
