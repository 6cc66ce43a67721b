"""What a run will take, before it starts: memory, bytes, FLOPs, seconds. Arithmetic on shapes."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from ..errors import CfspError, printable
from ..io.files import format_bytes
from .footprint import Footprints
from .hardware import Hardware, MemoryBudget
from .workload import CHUNK, Stage

LOWERED_BY = {
    "hidden states": ("`eval_windows` or `seqlen`", "`samples` or `seqlen`"),
    "micro-batch": ("`seqlen`", "`micro_batch` or `seqlen`"),
    "logits": ("`seqlen`", "`seqlen`"),
    CHUNK: ("`samples` or `seqlen`", "`samples` or `seqlen`"),
}
"""Parts of memory that options lower: where no calibration windows pass, and where they do."""
NUMBERS = ("read", "written", "FLOP", "time", "bytes", "before", "after")
"""Columns of tables that are aligned to the right."""


class RunEstimate:
    """What the estimates of all commands share: stages one after another, memory at its peak."""

    stages: tuple[Stage, ...]
    device_parts: dict[str, int]
    host_parts: dict[str, int]
    hardware: Hardware

    @property
    def device_bytes(self) -> int:
        """Peak of each device's memory; on a CPU that of the process."""
        parts = self.host_parts if self.hardware.device == "cpu" else self.device_parts
        return sum(parts.values())

    @property
    def host_bytes(self) -> int:
        """Peak of each process's memory."""
        return sum(self.host_parts.values())

    @property
    def flops(self) -> float:
        """FLOPs of all stages and ranks."""
        return sum(stage.flops for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of all stages, one after another."""
        return sum(stage.seconds for stage in self.stages)

    def check(self, budget: MemoryBudget) -> None:
        """Raise CfspError where the run needs more than it may take, or than a GPU has free; says
        what to lower."""
        held = {"device": self.device_parts, "host": self.host_parts}
        for (kind, parts), given in zip(held.items(), budget.limits(self.hardware), strict=True):
            need = sum(parts.values())
            if given is not None and need > given:
                raise CfspError(
                    f"{self._memory_of(kind)}: about {format_bytes(need)} needed, "
                    f"{format_bytes(given)} to be had; {self._advice(parts, need - given)}"
                )

    def summary(self) -> str:
        """A few lines for a terminal."""
        return "\n".join(f"estimate: {printable(line)}" for line in self._lines())

    def _lines(self) -> Sequence[str]:
        raise NotImplementedError

    def _memory_of(self, kind: str) -> str:
        return f"{kind} memory"

    def _advice(self, parts: Mapping[str, int], over: int) -> str:
        """What can be lowered to save ``over`` bytes of these."""
        raise NotImplementedError

    def _memory(self) -> str:
        shown = {}
        if self.hardware.device != "cpu":
            shown["device"] = self.device_bytes, self.hardware.device_memory
        if self.host_parts:
            shown["host"] = self.host_bytes, self.hardware.host_memory
        return ", ".join(
            f"{kind} memory {format_bytes(need)} of {format_bytes(room)}"
            for kind, (need, room) in shown.items()
        )


@dataclass(frozen=True)
class Estimate(RunEstimate):
    """What a run will take. Nothing here was measured but the figures of ``hardware`` that say so.

    FLOPs count a multiplication and an addition as two. Bytes are of weights.
    """

    model: str
    architecture: str
    """``model_type`` of its config."""
    refusal: str
    """Why the architecture cannot be pruned; "" if it can. If not, its costs are rough."""
    streamed: bool
    """Whether one block at a time is in memory."""
    parameters: int
    parameters_after: int
    sizes: Footprints | None
    """Before and after; None where the layout is not known."""
    blocks: int
    largest_block_bytes: int
    """In the run's dtype."""
    largest_stored_block_bytes: int
    dtype: str
    ranks: int
    windows: int
    fit_windows: int
    """Calibration windows that go through the pass that cuts as well."""
    evaluation_windows: int
    seqlen: int
    micro_batch: int
    """Windows per forward call of calibration."""
    stages: tuple[Stage, ...]
    device_stage: str
    """The stage in which the device holds most."""
    device_parts: dict[str, int]
    """Bytes that each device holds then. On a CPU they are part of ``host_parts``."""
    host_parts: dict[str, int]
    """Bytes that each process holds at most."""
    hardware: Hardware

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = dataclasses.asdict(self)
        sizes, stages, hardware = (values.pop(name) for name in ("sizes", "stages", "hardware"))
        return {
            **values,
            "sizes": sizes,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "stages": list(stages),
            "seconds": self.seconds,
            "hardware": hardware,
        }

    def _lines(self) -> Sequence[str]:
        times = [f"{x.name} {format_seconds(x.seconds)} ({x.bound})" for x in self.stages]
        time = f"{format_seconds(self.seconds)}: {', '.join(times)}"
        assumed = "; ".join(f"{k} {v}" for k, v in self.hardware.assumptions().items())
        return self._title(), self._memory(), time, f"by {assumed}"

    def _title(self) -> str:
        counts = [format_count(count) for count in (self.parameters, self.parameters_after)]
        return (
            f"{self.model}: {' -> '.join(counts)} parameters, {self.blocks} blocks of up to "
            f"{format_bytes(self.largest_block_bytes)} ({self.dtype}), "
            f"{self.windows} windows of {self.seqlen}, {self.micro_batch} a call"
            + (f", then {self.fit_windows}" if self.fit_windows else "")
        )

    def table(self) -> Group:
        """Stages, memory and assumptions as tables for a terminal."""
        read = sum(stage.bytes_read for stage in self.stages)
        written = sum(stage.bytes_written for stage in self.stages)
        total = Stage("total", read, written, self.flops, self.seconds, "")
        stages = []
        for stage in (*self.stages, total):
            moved = map(format_bytes, (stage.bytes_read, stage.bytes_written))
            flops = f"{stage.flops:.2e}" if stage.flops else ""
            stages.append((stage.name, *moved, flops, format_seconds(stage.seconds), stage.bound))
        held = {"host": self.host_parts}
        if self.hardware.device != "cpu":
            held = {f"device, {self.device_stage}": self.device_parts, **held}
        parts = ((at, part, format_bytes(n)) for at, own in held.items() for part, n in own.items())
        titles, assumed = ("figure", "value"), self.hardware.assumptions().items()
        columns = ("stage", "read", "written", "FLOP", "time", "bound by")
        tables = [
            make_table(self._title(), columns, stages),
            make_table(self._memory(), ("memory at its peak", "part", "bytes"), parts),
            make_table("what the seconds rest on", titles, assumed),
        ]
        if self.sizes is not None:
            sizes = make_table("the model", ("", "before", "after"), self.sizes.rows())
            tables.insert(0, sizes)
        return Group(*tables)

    def _advice(self, parts: Mapping[str, int], over: int) -> str:
        if any(stage.name == "search" for stage in self.stages):
            return "allocator 'search' needs the whole model in memory, others do not"
        if not self.streamed:
            return "this model is loaded whole; one stored as safetensors of floats would not be"
        lowered = {part: count for part, count in parts.items() if part in LOWERED_BY}
        if over > sum(lowered.values()):
            fixed = (f"{part} {format_bytes(parts[part])}" for part in parts if part not in lowered)
            return f"no option lowers {', '.join(fixed)}"
        most = max(lowered, key=lambda part: lowered[part])
        calibrating = self.device_stage == "calibrate" or self.fit_windows > 0
        return f"lower {LOWERED_BY[most][calibrating]}"


def make_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=escape(printable(title)))
    for column in columns:
        table.add_column(column, justify="right" if column in NUMBERS else "left")
    for row in rows:
        table.add_row(*row)
    return table


def format_count(count: int) -> str:
    """70553706496 -> "70.55B"."""
    scale, unit = (1e9, "B") if count >= 1e9 else (1e6, "M") if count >= 1e5 else (1, "")
    return f"{count / scale:.2f}{unit}" if unit else str(count)


def format_seconds(seconds: float) -> str:
    """0.05 -> "0.05 s", 90 -> "1.5 min", 7200 -> "2.0 h"."""
    if seconds < 100:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
