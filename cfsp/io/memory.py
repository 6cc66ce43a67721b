"""Sizes of memory as people write them, and what a run may take."""

import re
from dataclasses import dataclass

from ..errors import CfspError

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}
KINDS = ("device", "host")


def parse_bytes(text: str) -> int:
    """ "20GiB" -> 21474836480. Units: B, and K, M, G, T with B (1000) or iB (1024), in any case.

    Raises:
        CfspError: no number, no unit or an unknown one, or not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise CfspError(f"not a size: {text.strip()!r}; write it as 20GiB, 800MiB or 20GB")
    size = int(float(found[1]) * unit)
    if size < 1:
        raise CfspError(f"not a size: {text.strip()!r} is no memory at all")
    return size


@dataclass(frozen=True)
class MemoryBudget:
    """What a run may take, in bytes; None where nothing was said.

    On a CPU the two are one memory, that of the process: the smaller counts.
    """

    device: int | None = None
    host: int | None = None


def parse_budget(text: str | None) -> MemoryBudget:
    """ "20GiB" (of the device) or "device=20GiB,host=8GiB"; None says nothing.

    Raises:
        CfspError: anything else; says what is expected.
    """
    if text is None:
        return MemoryBudget()
    if "=" not in text and "," not in text:
        return MemoryBudget(device=parse_bytes(text))
    sizes: dict[str, int] = {}
    for part in text.split(","):
        kind, _, size = part.partition("=")
        kind = kind.strip()
        if kind not in KINDS or kind in sizes:
            raise CfspError(
                f"max memory {text!r}: expected a size such as 20GiB, or device=20GiB,host=8GiB"
            )
        sizes[kind] = parse_bytes(size)
    return MemoryBudget(**sizes)
