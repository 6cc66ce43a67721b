"""What a run's seconds and limits rest on: this machine's figures, or stated ones."""

import dataclasses
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from torch.nn import functional

from ..errors import CfspError

EFFICIENCY = 0.6
"""Share of the speed of one large matrix product that a whole forward pass is taken to reach."""
PROBE_PRODUCTS = 4
PROBE_SECONDS = 0.02
MAX_PROBE_SIZE = 8192
DISK_BYTES_PER_SECOND = 2e9
COPY_BYTES_PER_SECOND = 25e9
FIGURES = {
    "flops": "compute, FLOP/s",
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
    disk_read: float = DISK_BYTES_PER_SECOND
    """Bytes/s of one node."""
    disk_write: float = DISK_BYTES_PER_SECOND
    """Bytes/s of one node."""
    copy: float = COPY_BYTES_PER_SECOND
    """Bytes/s between host and one device."""
    sources: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Where a figure is from, by its field's name; those that are not named are assumed."""

    def assumptions(self) -> dict[str, str]:
        """Every figure that the seconds rest on, with where it is from."""
        shown = {
            title: f"{getattr(self, name):.3g} ({self.sources.get(name, 'assumed')})"
            for name, title in FIGURES.items()
            if name != "copy" or self.device != "cpu"
        }
        return {"device": self.name, **shown}

    def stated(self, tflops: float | None = None, disk_gbps: float | None = None) -> "Hardware":
        """With speeds that the user states: 1e12 FLOP/s in a forward pass, 1e9 bytes/s of disk.

        Raises:
            CfspError: a speed that is not above 0.
        """
        for name, value in (("tflops", tflops), ("disk-gbps", disk_gbps)):
            if value is not None and not value > 0:
                raise CfspError(f"{name} must be above 0, got {value}")
        flops, read, write = self.flops, self.disk_read, self.disk_write
        sources = dict(self.sources)
        if tflops is not None:
            flops, sources["flops"] = tflops * 1e12, "stated"
        if disk_gbps is not None:
            read = write = disk_gbps * 1e9
            sources["disk_read"] = sources["disk_write"] = "stated"
        return dataclasses.replace(
            self, flops=flops, disk_read=read, disk_write=write, sources=MappingProxyType(sources)
        )


H100 = Hardware(
    "cuda",
    "NVIDIA H100 SXM 80 GB",
    device_memory=80_000_000_000,
    host_memory=256_000_000_000,
    flops=EFFICIENCY * 989e12,
    disk_read=6e9,
    disk_write=4e9,
    copy=50e9,
    sources=MappingProxyType(
        {
            "flops": f"{EFFICIENCY:.0%} of the data sheet's dense bf16",
            "disk_read": "assumed, NVMe",
            "disk_write": "assumed, NVMe",
            "copy": "assumed, PCIe 5 from pinned memory",
        }
    ),
)
HARDWARE = {"h100": H100}
"""Stated hardware by name, to plan for a machine that is not this one."""


def resident_bytes() -> int:
    """Bytes of memory that this process holds; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _cgroup_room() -> int | None:
    """Bytes left under the limit of this process's container (cgroup v2); its page cache gives
    way, and so does not count as used."""
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
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        room = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    limit = _cgroup_room()
    return resident_bytes() + (room if limit is None else min(room, limit))


def device_memory(device: torch.device) -> int:
    """Free bytes of a GPU, those that this process has reserved included; of a CPU the host's."""
    if device.type != "cuda":
        return host_memory()
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


@torch.no_grad()
def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of linear layers so large that a few of them take a while."""
    size, seconds = 128, 0.0
    while seconds < PROBE_SECONDS and size < MAX_PROBE_SIZE:
        size *= 2
        x = torch.ones(size, size, dtype=dtype, device=device)
        functional.linear(x, x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(PROBE_PRODUCTS):
            functional.linear(x, x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    return 2 * size**3 * PROBE_PRODUCTS / seconds


def device_name(device: torch.device) -> str:
    """What a device is called; of a CPU the threads that compute on it too."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = "CPU"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def this_machine(device: torch.device, dtype: torch.dtype, *, measure: bool = True) -> Hardware:
    """This machine: memory as it is, speed of a matrix product, other speeds assumed.

    The disk is not measured: a sample tells more of the page cache than of the disk. Without
    ``measure`` compute takes no time.
    """
    flops = EFFICIENCY * measured_flops(device, dtype) if measure else math.inf
    source = f"{EFFICIENCY:.0%} of a matrix product's, measured" if measure else "not measured"
    return Hardware(
        device.type,
        device_name(device),
        device_memory(device),
        host_memory(),
        flops,
        sources=MappingProxyType({"flops": source}),
    )


@contextmanager
def device_capped(device: torch.device, limit: int | None) -> Iterator[None]:
    """Let PyTorch take no more than ``limit`` bytes of a GPU for a while."""
    if device.type != "cuda" or limit is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
