"""What a run will take, before it starts: memory, bytes, FLOPs, seconds. Arithmetic on shapes."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table

from ..errors import CfspError
from ..io.files import format_bytes
from ..io.memory import MemoryBudget
from .footprint import Footprints
from .hardware import Hardware
from .workload import Stage

LOWERED_BY = {
    "hidden states": ("--eval-windows or --seqlen", "--samples or --seqlen"),
    "micro-batch": ("--seqlen", "--micro-batch or --seqlen"),
    "logits": ("--seqlen", "--seqlen"),
}
"""Parts of memory that options lower: after the calibration, and in it."""


@dataclass(frozen=True)
class Estimate:
    """What a run will take. Nothing here was measured but the figures of ``hardware`` that say so.

    FLOPs count a multiplication and an addition as two. Bytes are of weights and Gram matrices.
    """

    model: str
    architecture: str
    """``model_type`` of its config."""
    supported: bool
    """Whether the architecture can be pruned; otherwise only its costs are known, roughly."""
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
    gram_bytes: int = 0
    """Of Gram matrices on the disk."""

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
    def seconds(self) -> float:
        """Of all stages, one after another."""
        return sum(stage.seconds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("hardware", "stages", "sizes")
        }
        hardware = dataclasses.asdict(dataclasses.replace(self.hardware, sources={}))
        return {
            **values,
            "sizes": self.sizes.to_dict() if self.sizes is not None else None,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "seconds": self.seconds,
            "hardware": {**hardware, "sources": dict(self.hardware.sources)},
        }

    def summary(self) -> str:
        """A few lines for a terminal."""
        stages = ", ".join(
            f"{stage.name} {format_seconds(stage.seconds)} ({stage.bound})" for stage in self.stages
        )
        assumed = "; ".join(f"{k} {v}" for k, v in self.hardware.assumptions().items())
        return (
            f"estimate: {self._shape()}\n"
            f"estimate: {self._memory()}\n"
            f"estimate: {format_seconds(self.seconds)}: {stages}\n"
            f"estimate: by {assumed}"
        )

    def _shape(self) -> str:
        counts = [format_count(count) for count in (self.parameters, self.parameters_after)]
        return (
            f"{self.model}: {' -> '.join(counts)} parameters, {self.blocks} blocks of up to "
            f"{format_bytes(self.largest_block_bytes)} ({self.dtype}), "
            f"{self.windows} windows of {self.seqlen}, {self.micro_batch} a call"
            + (f", {format_bytes(self.gram_bytes)} of Gram matrices" if self.gram_bytes else "")
        )

    def _memory(self) -> str:
        hardware = self.hardware
        host = (
            f"host memory {format_bytes(self.host_bytes)} of {format_bytes(hardware.host_memory)}"
        )
        if hardware.device == "cpu":
            return host
        device = (
            f"device memory {format_bytes(self.device_bytes)} "
            f"of {format_bytes(hardware.device_memory)}"
        )
        return f"{device}, {host}"

    def table(self) -> Group:
        """Stages, memory and assumptions as tables for a terminal."""
        stages = Table(title=self._shape())
        for title in ("stage", "read", "written", "FLOP", "time", "bound by"):
            stages.add_column(title, justify="left" if title in ("stage", "bound by") else "right")
        for stage in self.stages:
            stages.add_row(
                stage.name,
                format_bytes(stage.bytes_read),
                format_bytes(stage.bytes_written),
                f"{stage.flops:.2e}" if stage.flops else "",
                format_seconds(stage.seconds),
                stage.bound,
            )
        stages.add_row(
            "total",
            format_bytes(sum(stage.bytes_read for stage in self.stages)),
            format_bytes(sum(stage.bytes_written for stage in self.stages)),
            f"{sum(stage.flops for stage in self.stages):.2e}",
            format_seconds(self.seconds),
        )
        memory = Table(title=self._memory())
        for title in ("memory at its peak", "part", "bytes"):
            memory.add_column(title, justify="right" if title == "bytes" else "left")
        held = {"host": self.host_parts}
        if self.hardware.device != "cpu":
            held = {f"device, {self.device_stage}": self.device_parts, **held}
        for where, parts in held.items():
            for part, count in parts.items():
                memory.add_row(where, part, format_bytes(count))
        sizes = Table(title="the model")
        for title in ("", "before", "after"):
            sizes.add_column(title, justify="left" if title == "" else "right")
        for row in self.sizes.rows() if self.sizes is not None else ():
            sizes.add_row(*row)
        figures = Table(title="what the seconds rest on")
        for title in ("figure", "value"):
            figures.add_column(title)
        for figure, value in self.hardware.assumptions().items():
            figures.add_row(figure, value)
        return Group(*([sizes] if self.sizes is not None else []), stages, memory, figures)

    def check(self, budget: MemoryBudget) -> None:
        """Raise CfspError where the run needs more than it may take, or than a GPU has free; says
        what to lower."""
        device, host = budget.device, budget.host
        if self.hardware.device == "cpu":
            host = min((x for x in (device, host) if x is not None), default=None)
            device = None
        else:
            device = min(device or self.hardware.device_memory, self.hardware.device_memory)
        for kind, parts, given in (
            ("device", self.device_parts, device),
            ("host", self.host_parts, host),
        ):
            need = sum(parts.values())
            if given is not None and need > given:
                raise CfspError(
                    f"{kind} memory: about {format_bytes(need)} needed, {format_bytes(given)} "
                    f"to be had; {self._advice(parts, need - given)}"
                )

    def _advice(self, parts: dict[str, int], over: int) -> str:
        """What can be lowered to save ``over`` bytes of these."""
        if any(stage.name == "search" for stage in self.stages):
            return "allocator 'search' needs the whole model in memory, others do not"
        if not self.streamed:
            return "this model is loaded whole; one stored as safetensors of floats would not be"
        lowered = {part: count for part, count in parts.items() if part in LOWERED_BY}
        if over > sum(lowered.values()):
            fixed = [x for x in parts.items() if x[0] not in lowered]
            held = ", ".join(f"{part} {format_bytes(count)}" for part, count in fixed)
            return f"no option lowers {held}"
        most = max(lowered, key=lambda part: lowered[part])
        return f"lower {LOWERED_BY[most][self.device_stage == 'calibrate']}"


def format_count(count: int) -> str:
    """70553706496 -> "70.55B"."""
    scale, unit = (1e9, "B") if count >= 1e9 else (1e6, "M") if count >= 1e5 else (1, "")
    return f"{count / scale:.2f}{unit}" if unit else str(count)


def format_seconds(seconds: float) -> str:
    """0.05 -> "0.05 s", 90 -> "1.5 min", 7200 -> "2.0 h"."""
    if seconds < 100:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
