"""What a statistics file says beside its tensors, and what both must be to be used."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from ..errors import CfspError, reason, shown
from ..io.documents import parse_json
from ..io.safetensors import StoredTensor
from ..typed import Bound, Count, Natural, decode
from .curves import CURVE, SCORES
from .windows import Calibration

FORMAT = "cfsp-statistics-5"
INFLUENCE_METRICS = ("angular", "cosine", "mse", "mae")
SUMS = ("sum", "sum_of_squares", "influence")
EXPERT_SUMS = ("expert_energy", "expert_gated")
"""The tensors of a block in the statistics file; the latter where it has experts."""
MAX_CHANNELS = 1 << 27
"""Of a block; a model of a trillion parameters has 48 million in all."""
Whole = Annotated[int, Bound("1 or more", lambda value: value >= 1)]
PartUnits = Annotated[
    tuple[tuple[Count, Count, Count], ...],
    Bound(
        f"FFNs of {MAX_CHANNELS} channels in all at most",
        lambda units: sum(map(math.prod, units)) <= MAX_CHANNELS,
    ),
]


@dataclass(frozen=True)
class StatisticsHeader:
    """A statistics file without its tensors; lists are of every block."""

    format: str
    tokens: Annotated[tuple[Whole, ...], Bound("of 1 or more blocks", len)]
    windows: tuple[Count, ...]
    units: Annotated[tuple[PartUnits, ...], Bound("of 1 or more FFNs", any)]
    """(count, experts, columns) of every part; () of a block without one."""
    expert_tokens: tuple[tuple[Annotated[int, Bound("0 or more", lambda n: n >= 0)], ...], ...]
    rankings: tuple[tuple[str, str, float], ...]
    influence_metrics: tuple[str, ...]
    model_fingerprint: str
    provenance: dict[str, Any]
    sha256: str


@dataclass(frozen=True)
class _Provenance:
    """What is read of where statistics come from."""

    calibration: Calibration | None = None
    windows: Count | None = None
    tokens_sha256: str | None = None
    model: str | None = None
    micro_batch: Natural | None = None


def decoded(text: str) -> StatisticsHeader:
    """The header that JSON holds; CfspError for one of another version, or where a value is not
    what it should be."""
    try:
        document = parse_json(text)
    except ValueError as error:
        raise CfspError(f"bad header: {reason(error)}") from None
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        older = "; calibrate again" if str(found).startswith(FORMAT[:-1]) else ""
        raise CfspError(
            f"it is not a statistics file of this version ({FORMAT}, got {shown(found)}){older}"
        )
    header = decode(StatisticsHeader, document, "bad header")
    if header.influence_metrics != INFLUENCE_METRICS:
        raise CfspError(f"bad header: influence_metrics must be {', '.join(INFLUENCE_METRICS)}")
    for name in ("windows", "units", "expert_tokens"):
        if len(getattr(header, name)) != len(header.tokens):
            raise CfspError(f"bad header: {name} are not of {len(header.tokens)} blocks")
    for number, (units, tokens) in enumerate(zip(header.units, header.expert_tokens, strict=True)):
        if tokens and len(tokens) != sum(experts for _, experts, _ in units):
            raise CfspError(f"bad header: expert_tokens[{number}] are not of {units}")
    known = {k: header.provenance[k] for k in _Provenance.__match_args__ if k in header.provenance}
    provenance = decode(_Provenance, known, "bad header", "provenance")
    if provenance.windows is None and not {"calibration", "tokens_sha256"}.isdisjoint(known):
        raise CfspError("bad header: provenance.windows is missing")
    return header


FINITE = Bound("finite", lambda x: bool(x.isfinite().all()))
SQUARES = Bound("finite and 0 or more", lambda x: bool((x.isfinite() & (x >= 0)).all()))
NUMBERS = Bound("without NaN", lambda x: not bool(x.isnan().any()))


def _ascending(size: int) -> Bound:
    return Bound(
        f"ascending from 0 to {size}",
        lambda x: x[[0, -1]].tolist() == [0, size] and bool((x.diff() > 0).all()),
    )


Tensor = torch.Tensor | StoredTensor


def _expected(
    header: StatisticsHeader, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, torch.dtype, int, Bound]]:
    """Name, dtype, length and values of every vector of a file; an error curve has any length."""
    for number, units in enumerate(header.units):
        channels = sum(map(math.prod, units))
        sizes, bounds = (channels, channels, len(INFLUENCE_METRICS)), (FINITE, SQUARES, FINITE)
        for name, size, bound in zip(SUMS, sizes, bounds, strict=True):
            yield f"block.{number:04d}.{name}", torch.float64, size, bound
        routed = sum(experts for _, experts, _ in units if experts > 1)
        for name in EXPERT_SUMS if routed else ():
            yield f"block.{number:04d}.{name}", torch.float64, routed, SQUARES
    parts = [own for units in header.units for own in units]
    for number in range(len(header.rankings)):
        prefix = f"ranking.{number:04d}."
        has_curves = prefix + CURVE[0].format(0) in tensors
        for part, (count, experts, columns) in enumerate(parts):
            yield prefix + SCORES.format(part), torch.float64, count * experts * columns, NUMBERS
            if has_curves:
                widths, errors = (prefix + name.format(part) for name in CURVE)
                points = math.prod(tensors[widths].shape) if widths in tensors else 0
                yield widths, torch.int64, max(2, points), _ascending(count)
                yield errors, torch.float64, max(2, points), FINITE


def check_tensors(header: StatisticsHeader, tensors: Mapping[str, Tensor]) -> None:
    """Raise CfspError where tensors, read or not yet, are not those that a header speaks of, or
    those that are read hold values that no calibration makes."""
    left = set(tensors)
    for name, dtype, size, bound in _expected(header, tensors):
        tensor = tensors.get(name)
        if tensor is None or (tensor.dtype, tuple(tensor.shape)) != (dtype, (size,)):
            found = f"{tensor.dtype} {list(tensor.shape)}" if tensor is not None else "none"
            raise CfspError(f"tensor {name} must be {dtype} [{size}], got {found}")
        if isinstance(tensor, torch.Tensor) and not bound.holds(tensor):
            raise CfspError(f"tensor {name} must be {bound.text}")
        left.remove(name)
    if left:
        raise CfspError(f"tensor {shown(min(left))} is of no block or ranking")
