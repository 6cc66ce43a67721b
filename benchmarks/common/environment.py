"""What a number was measured on: card, driver, versions, sources. No names of hosts or paths."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

HELD = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
    0x100: "display clocks",
}
"""nvidia-smi's bits for why clocks are not higher."""
ROOT = Path(__file__).resolve().parents[2]
NOT_MEASURING = ("device_tests.py", "gpu_suite.py", "report.py")
PACKAGES = (
    *("torch", "triton", "transformers", "accelerate", "peft", "safetensors", "numpy"),
    *("pytest", "pytest-benchmark"),
)


def device_type() -> str:
    """The device that benchmarks run on here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> str:
    """The GPU's name, or the number of usable cores and the model of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = torch.get_num_threads()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        model = found[1].strip() if found else model
    article = "an" if model[:1].upper() in "AEIOU" else "a"
    return f"{cores} cores of {article} {model}"


def arch() -> str:
    """The key of this device in the table of launch configurations: ``sm_90``, ``gfx942``, cpu."""
    if not torch.cuda.is_available():
        return "cpu"
    if torch.version.hip:
        return torch.cuda.get_device_properties().gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _ask(*fields: str) -> list[str] | None:
    """What nvidia-smi says of the first GPU, or None where it cannot be asked. Changes nothing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in answer.stdout.split("\n")[0].split(",")]
    return values if len(values) == len(fields) and all(values) else None


@functools.cache
def driver() -> str | None:
    """The version of the GPU's driver, or None where it cannot be asked."""
    answer = _ask("driver_version")
    return answer[0] if answer else None


def clocks() -> dict[str, object] | None:
    """Clocks in MHz, watts, degrees Celsius and what holds the clocks down; None as for driver."""
    values = None
    for reasons in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):  # old drivers
        values = values or _ask("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", reasons)
    if values is None:
        return None
    try:
        found: dict[str, object] = {
            name: float(value)
            for name, value in zip(("sm", "memory", "watts", "celsius"), values, strict=False)
        }
        held = int(values[-1], 16)
    except ValueError:  # "[N/A]"
        return dict(zip(("sm", "memory", "watts", "celsius", "held"), values, strict=True))
    found["held"] = [reason for bit, reason in HELD.items() if held & bit]
    return found


def versions() -> dict[str, str | None]:
    """Versions of Python, CUDA and of every package that a number may depend on."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def sources_digest(*more: str) -> str:
    """A digest of the Python sources that are measured and that measure, and of folders ``more``.

    Launch configurations are left out: tuning changes them between two steps of one visit. So
    are the programs here that only read results or start others.
    """
    digest = hashlib.sha256()
    for folder in ("cfsp_kernels", "benchmarks", *more):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if folder == "benchmarks" and path.name in NOT_MEASURING:
                continue
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def launch_configurations() -> dict[str, dict[str, int]] | None:
    """What every kernel is launched with on this device, or None without such a table."""
    try:
        from cfsp_kernels._configs import config_for, config_table
    except ModuleNotFoundError:
        return None
    return {op: config_for(op, arch()) for op in config_table()}


def describe() -> dict[str, object]:
    """Everything above in one dictionary that JSON takes."""
    described: dict[str, object] = {
        "machine": machine(),
        "device": device_type(),
        "arch": arch(),
        "driver": driver(),
        "clocks": clocks(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "sources": sources_digest(),
        "launch_configurations": launch_configurations(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        described["memory_bytes"] = properties.total_memory
        described["multiprocessors"] = properties.multi_processor_count
    return described


def anonymous(text: str, out: Path) -> str:
    """``text`` without where this checkout, its interpreter and the results lie."""
    places = {str(ROOT): ".", sys.prefix: "<python>", sys.base_prefix: "<python>"}
    if ROOT not in out.parents:
        places[str(out)] = "OUT"
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, places[place])
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
