"""What a run's seconds and limits rest on: this machine's figures, or stated ones."""

import dataclasses
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn import functional

from ..errors import CfspError, shown, unknown_name
from ..models.fingerprints import device_name
from ..models.loading import pick_device, synchronize
from ..typed import decode, is_finite

EFFICIENCY = 0.6
"""Share of the speed of one large matrix product that a whole forward pass is taken to reach."""
PROBE_PRODUCTS = 4
PROBE_SECONDS = 0.02
MAX_PROBE_SIZE = 8192
UNITS = {"B": 1} | {
    f"{letter}{unit}": base**power
    for unit, base in (("B", 1000), ("IB", 1024))
    for power, letter in enumerate("KMGT", 1)
}
MOST_MEMORY = 1 << 60
SIZE = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([a-zA-Z]{1,3})\s*")
FIGURES = {
    "flops": "compute, FLOP/s",
    "fp32_flops": "fp32, FLOP/s",
    "fp64_flops": "fp64, FLOP/s",
    "disk_read": "disk read, B/s",
    "disk_write": "disk write, B/s",
    "copy": "host to device, B/s",
}


@dataclass(frozen=True)
class Hardware:
    """One rank's device and its share-free node. Speeds are what a run is taken to sustain."""

    device: str
    """cpu or cuda."""
    name: str
    device_memory: int
    """Bytes of the device that the run can have; on a CPU the same as ``host_memory``."""
    host_memory: int
    """Bytes of the host that the run can have, with what this process already holds."""
    flops: float
    """FLOP/s of one device in a forward pass."""
    fp32_flops: float = 0.0
    fp64_flops: float = 0.0
    """The same in these precisions, which fits and rankings compute in; 0: as fast as that."""
    disk_read: float = 2e9
    disk_write: float = 2e9
    """Bytes/s of one node."""
    copy: float = 25e9
    """Bytes/s between host and one device."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where a figure is from, by its field's name; the rest are assumed."""

    def assumptions(self) -> dict[str, str]:
        """Every figure that the seconds rest on, with where it is from."""
        return {"device": self.name} | {
            title: f"{getattr(self, name):.3g} ({self.sources.get(name, 'assumed')})"
            for name, title in FIGURES.items()
            if getattr(self, name) and (name != "copy" or self.device != "cpu")
        }

    def stated(self, tflops: float | None = None, disk_gbps: float | None = None) -> "Hardware":
        """With speeds that the user states: 1e12 FLOP/s in a forward pass, 1e9 bytes/s of disk."""
        for name, value in (("tflops", tflops), ("disk_gbps", disk_gbps)):
            if value is not None and not (is_finite(value) and value > 0):
                raise CfspError(f"`{name}` must be above 0, got {value}")
        speeds: dict[str, Any] = {} if tflops is None else {"flops": tflops * 1e12}
        if disk_gbps is not None:
            speeds |= {"disk_read": disk_gbps * 1e9, "disk_write": disk_gbps * 1e9}
        sources = {**self.sources, **dict.fromkeys(speeds, "stated")}
        return dataclasses.replace(self, **speeds, sources=sources)


H100 = Hardware(
    "cuda",
    "NVIDIA H100 SXM 80 GB",
    device_memory=80_000_000_000,
    host_memory=256_000_000_000,
    flops=EFFICIENCY * 989e12,
    fp32_flops=EFFICIENCY * 67e12,
    fp64_flops=EFFICIENCY * 67e12,
    disk_read=6e9,
    disk_write=4e9,
    copy=50e9,
    sources={
        "flops": f"{EFFICIENCY:.0%} of the data sheet's dense bf16",
        "fp32_flops": f"{EFFICIENCY:.0%} of the data sheet's",
        "fp64_flops": f"{EFFICIENCY:.0%} of the data sheet's, tensor cores",
        "disk_read": "assumed, NVMe",
        "disk_write": "assumed, NVMe",
        "copy": "assumed, PCIe 5 from pinned memory",
    },
)
RTX_4090 = dataclasses.replace(
    H100,
    name="NVIDIA GeForce RTX 4090 24 GB",
    device_memory=24 << 30,
    host_memory=64_000_000_000,
    flops=EFFICIENCY * 165.2e12,
    fp32_flops=EFFICIENCY * 82.6e12,
    fp64_flops=EFFICIENCY * 82.6e12 / 64,
    copy=25e9,
    sources={
        **H100.sources,
        "fp64_flops": "1/64 of fp32",
        "copy": "assumed, PCIe 4 from pinned memory",
    },
)
HARDWARE = {"h100": H100, "rtx4090": RTX_4090}
"""Stated hardware by name, to plan for a machine that is not this one."""


@dataclass(frozen=True)
class MemoryBudget:
    """What a run may take, in bytes; None where nothing was said. On a CPU the two are one
    memory, that of the process: the smaller counts."""

    device: int | None = None
    host: int | None = None

    def limits(self, hardware: Hardware) -> tuple[int | None, int | None]:
        """Bytes of the device, at most what a GPU has, and of the host; None: no limit."""
        if hardware.device == "cpu":
            given = [size for size in (self.device, self.host) if size is not None]
            return None, min(given, default=None)
        return min(hardware.device_memory, self.device or hardware.device_memory), self.host


def parse_bytes(text: str) -> int:
    """ "20GiB" -> 21474836480. Units: B, and K, M, G, T with B (1000) or iB (1024), in any case."""
    found = SIZE.fullmatch(text)
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise CfspError(f"not a size: {shown(text.strip())}; write it as 20GiB, 800MiB or 20GB")
    if (size := int(float(found[1]) * unit)) < 1:
        raise CfspError(f"not a size: {text.strip()!r} is no memory at all")
    if size > MOST_MEMORY:
        raise CfspError(f"not a size: {text.strip()!r} is more than any machine has")
    return size


def parse_memory(text: str | None) -> MemoryBudget:
    """ "20GiB" (of the device) or "device=20GiB,host=8GiB"; None says nothing."""
    if text is None:
        return MemoryBudget()
    decode(str, text, "", "max_memory")
    if "=" not in text and "," not in text:
        return MemoryBudget(device=parse_bytes(text))
    sizes: dict[str, int] = {}
    for part in text.split(","):
        kind, _, size = part.partition("=")
        kind = kind.strip()
        if kind not in ("device", "host") or kind in sizes:
            raise CfspError(
                f"max memory {shown(text)}: expected a size such as 20GiB, or "
                "device=20GiB,host=8GiB"
            )
        sizes[kind] = parse_bytes(size)
    return MemoryBudget(**sizes)


def resident_bytes() -> int:
    """Bytes of memory that this process holds."""
    return psutil.Process().memory_info().rss


def _cgroup_room() -> int | None:
    """Bytes left under this container's limit (cgroup v2); its page cache gives way, and so does
    not count as used."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        used = sum(int(x.split()[1]) for x in lines if x.split()[0] in ("anon", "shmem"))
    except (OSError, ValueError, IndexError):  # no such controller, or "max"
        return None
    return max(0, limit - used)


def host_memory() -> int:
    """Bytes that this process can hold without swapping, those it has included."""
    room, limit = psutil.virtual_memory().available, _cgroup_room()
    return resident_bytes() + (room if limit is None else min(room, limit))


def device_memory(device: torch.device) -> int:
    """Free bytes of a GPU, those that this process has reserved included; of a CPU the host's."""
    if device.type != "cuda":
        return host_memory()
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


@torch.no_grad()
def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few linear layers so large that it takes a while: a machine that
    is busy meanwhile slows some of them."""

    def seconds_of_one(x: torch.Tensor) -> float:
        started = time.perf_counter()
        functional.linear(x, x)
        synchronize(device)
        return time.perf_counter() - started

    size, fastest = 128, 0.0
    while PROBE_PRODUCTS * fastest < PROBE_SECONDS and size < MAX_PROBE_SIZE:
        size *= 2
        x = torch.ones(size, size, dtype=dtype, device=device)
        fastest = min(seconds_of_one(x) for _ in range(PROBE_PRODUCTS + 1))
    return 2 * size**3 / fastest


def this_machine(device: torch.device, dtype: torch.dtype, *, measure: bool = True) -> Hardware:
    """This machine: memory as it is, speed of a matrix product (none without ``measure``). The disk
    is not measured: a sample tells more of the page cache than of the disk."""
    memory = device_memory(device), host_memory()
    if not measure:
        sources = {"flops": "not measured"}
        return Hardware(device.type, device_name(device), *memory, math.inf, sources=sources)
    kinds = dtype, torch.float32, torch.float64
    measured = {kind: EFFICIENCY * measured_flops(device, kind) for kind in dict.fromkeys(kinds)}
    names = "flops", "fp32_flops", "fp64_flops"
    sources = dict.fromkeys(names, f"{EFFICIENCY:.0%} of a matrix product's, measured")
    name = device_name(device)
    flops, fp32, fp64 = (measured[kind] for kind in kinds)
    return Hardware(device.type, name, *memory, flops, fp32, fp64, sources=sources)


def choose_hardware(
    hardware: Hardware | str | None,
    device: str,
    dtype: torch.dtype,
    tflops: float | None = None,
    disk_gbps: float | None = None,
) -> Hardware:
    """A machine by its name in ``HARDWARE``, of either case, or as it is; None: this one."""
    if isinstance(hardware, str):
        if hardware.lower() not in HARDWARE:
            raise unknown_name("hardware", hardware, HARDWARE)
        hardware = HARDWARE[hardware.lower()]
    if hardware is None:
        hardware = this_machine(pick_device(device), dtype, measure=tflops is None)
    return hardware.stated(tflops, disk_gbps)


@contextmanager
def device_capped(device: torch.device, limit: int | None) -> Iterator[None]:
    """Let PyTorch take no more than ``limit`` bytes of a GPU meanwhile."""
    if device.type != "cuda" or limit is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
