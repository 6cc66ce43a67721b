"""Measure how long the blocks of a model take at a grid of FFN widths and numbers of KV groups, and
keep it on disk."""

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..errors import CfspError
from ..models.fingerprints import block_kind, device_name, versions
from ..models.layouts import Layout
from ..models.loading import check_seqlen, model_device, outer_weights, synchronize
from ..models.opening import OpenModel
from ..models.parts.attention import Attention
from ..models.parts.channels import EXPERT_WIDTH_MULTIPLE, CutDown, Units
from ..models.parts.part import Part
from ..models.surgery import set_parameters_
from ..pruning.budget import ModelBudget
from ..pruning.compensation import DownProjection, none
from .latency import LatencyTable, WidthCurve, load_table, save_table
from .placed_blocks import cache_maker, forward_call

MEASURING = 3
"""Version of the way of measuring: tables of an earlier one are not taken from the cache."""
POINTS = 8
"""Widths that are measured of every FFN, up to the dense one."""
ROUNDS = 21
"""Times that every width is measured; the median counts."""
LEAST_ROUNDS, LONG_SECONDS = 7, 60.0
"""After so many seconds measuring stops, once there were so many rounds."""
CHAIN = 4
"""Blocks of a width that are timed one after another."""
UNCACHED_BYTES = 256 << 20
"""Blocks whose weights come to this find none of them in a cache."""
FAST_MULTIPLE = 128
"""Measured widths are multiples of this, for matrix products of whole tiles."""


def _digest(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()


def table_identity(
    model: PreTrainedModel,
    layout: Layout,
    device: torch.device,
    batch: int,
    length: int,
    context: int = 0,
    *,
    whole_ffns: bool = False,
) -> dict[str, Any]:
    """Everything that a table depends on: what is measured, on what, and by which versions. KV
    groups are where the layout has the attention; ``whole_ffns``: blocks without their FFNs too."""
    kinds = [block_kind(block) for block in layout.find_blocks(model)]
    outer = tuple(model.get_input_embeddings().weight.shape)
    attention = getattr(model.config, "_attn_implementation", None)
    experts = getattr(model.config, "_experts_implementation", None)
    known = versions(device)
    return {
        "model": _digest(repr((kinds, outer, attention, experts))),
        "device": device_name(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch": batch,
        "length": length,
        "context": context,
        "units": [
            "channels",
            *(("groups",) if layout.attention is not None else ()),
            *(("ffn",) if whole_ffns else ()),
        ],
        "versions": {name: known[name] for name in ("torch", "transformers")},
        "measuring": MEASURING,
    }


def _cache_file(identity: dict[str, Any]) -> Path:
    root = Path(os.environ.get("CFSP_CACHE") or Path.home() / ".cache" / "cfsp")
    return root / "latency" / f"{_digest(json.dumps(identity, sort_keys=True))[:16]}.json"


def cached_table(identity: dict[str, Any]) -> LatencyTable | None:
    """The table that was measured of just this, where there is one."""
    file = _cache_file(identity)
    table = load_table(file) if file.exists() else None
    return table if table is not None and table.identity == identity else None


def known_table(
    model: PreTrainedModel,
    layout: Layout,
    device: torch.device,
    budget: ModelBudget | None,
    given: str | Path | LatencyTable | None,
    *,
    whole_ffns: bool = False,
) -> LatencyTable | None:
    """The given table, of any device; or the cached one of this device for a latency budget. Of KV
    groups where the layout has the attention; ``whole_ffns`` as for :func:`table_identity`."""
    if given is None:
        if budget is None or budget.kind != "latency":
            return None
        return cached_table(
            table_identity(model, layout, device, *budget.shape, whole_ffns=whole_ffns)
        )
    table = given if isinstance(given, LatencyTable) else load_table(given)
    if budget is not None and budget.kind in ("flops", "latency") and table.shape != budget.shape:
        own, asked = (
            f"{x.batch} x {x.length}" + (f" + {x.context}" if x.context else "")
            for x in (table, budget)
        )
        raise CfspError(f"the latency table is of {own} tokens, budget {budget.text} of {asked}")
    identity = table_identity(model, layout, device, *table.shape)
    if table.identity.get("model") != identity["model"]:
        raise CfspError("the latency table is of another model: `cfsp latency` measures this one")
    if layout.attention is None:
        return table.of_channels()
    if not table.knows_groups:
        raise CfspError("the latency table is of channels alone: measure it with the same `units`")
    return table


def table_of(
    opened: OpenModel,
    batch: int,
    length: int,
    context: int = 0,
    *,
    whole_ffns: bool = False,
    again: bool = False,
    progress: bool = True,
) -> LatencyTable:
    """The table of a dense model on its device: from the cache, or measured now and kept there."""
    check_seqlen(opened.model, length + context)
    device, shape = model_device(opened.model), (batch, length, context)
    identity = table_identity(opened.model, opened.layout, device, *shape, whole_ffns=whole_ffns)
    table = None if again else cached_table(identity)
    if table is None:
        table = measure_table(opened, identity, progress=progress)
        save_table(table, _cache_file(identity))
    return table


def table_for(
    opened: OpenModel,
    budget: ModelBudget | None,
    given: str | Path | LatencyTable | None,
    progress: bool,
    *,
    whole_ffns: bool = False,
) -> LatencyTable | None:
    """:func:`known_table`, measured now where a latency budget has none."""
    where, device = (opened.model, opened.layout), model_device(opened.model)
    table = known_table(*where, device, budget, given, whole_ffns=whole_ffns)
    if table is None and budget is not None and budget.kind == "latency":
        return table_of(opened, *budget.shape, whole_ffns=whole_ffns, progress=progress)
    return table


@torch.no_grad()
def measure_table(
    opened: OpenModel, identity: dict[str, Any], *, progress: bool = True
) -> LatencyTable:
    """Measure one block of every kind at a grid of widths, and of numbers of KV groups where the
    layout has the attention, and the rest of the model.

    What is timed is the model with a few blocks of one width, and with none: a block takes what
    they add. Alone it would not find the caches and the memory allocator as in the model. Weights,
    and the keys and values of a context, are random. All widths are in memory at once and take
    turns, there and back, so that drift cancels out.
    """
    model, shape = opened.model, (identity["batch"], identity["length"])
    context, whole_ffns = identity["context"], "ffn" in identity["units"]
    names = [block_kind(block) for block in opened.layout.find_blocks(model)]
    kinds = sorted(set(names), key=names.index)
    words = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(0, words, shape, generator=torch.Generator().manual_seed(0))
    measured: list[tuple[tuple[WidthCurve, ...], float]] = []
    try:
        for name in tqdm(kinds, desc="latency", unit="kind of block", disable=not progress):
            places = [place for place, own in enumerate(names) if own == name][:CHAIN]
            with outer_weights(model):
                on_device = tokens.to(model_device(model))
                measured.append(_curves(opened, places, on_device, context, whole_ffns))
    except torch.OutOfMemoryError:
        raise CfspError(
            f"no memory to measure blocks at {shape[0]} x {shape[1]} tokens; fewer tokens need less"
        ) from None
    curves, outer = zip(*measured, strict=True)
    return LatencyTable(identity, median(outer), curves, tuple(map(kinds.index, names)))


def _grid(part: Part, units: Units, whole_ffns: bool) -> list[int]:
    """What is measured of a part."""
    if isinstance(part, Attention):
        return sorted({0, 1, -(-units.count // 2), units.count})
    least = EXPERT_WIDTH_MULTIPLE if units.experts > 1 else 1
    multiple = next((m for m in (FAST_MULTIPLE, 8) if units.count >= m * POINTS), least)
    spread = (round(units.count * k / POINTS / multiple) * multiple for k in range(1, POINTS))
    none = {0} if whole_ffns and units.experts == 1 else set()
    return sorted({max(multiple, width) for width in spread} | {units.count} | none)


def _curves(
    opened: OpenModel,
    places: Sequence[int],
    tokens: torch.Tensor,
    context: int,
    whole_ffns: bool,
) -> tuple[tuple[WidthCurve, ...], float]:
    """A curve for every part of the block in these places, of width 0 where it has none; the
    model's seconds without blocks."""
    layout, dtype = opened.layout, opened.model.dtype
    dense = copy.deepcopy(layout.find_blocks(opened.model)[places[0]])
    values = {
        name: torch.empty(old.shape, dtype=dtype, device=tokens.device).normal_(0, 0.02)
        for name, old in dense.named_parameters()
    }
    set_parameters_(dense, values)
    size = sum(parameter.nbytes for parameter in dense.parameters())
    copies = min(len(places), max(1, math.ceil(UNCACHED_BYTES / size)))

    def cut(position: int, width: int) -> nn.Module:
        block = copy.deepcopy(dense)
        if not parts:
            return block
        part = parts[position]
        if not width:
            part.remove_(block)
            return block
        units = part.units(block)
        kept = torch.arange(width).expand(units.experts, -1)

        def cut_down(expert: int, down: torch.Tensor, out: torch.Tensor | None) -> CutDown:
            columns = units.columns_of(kept[expert]).to(down.device)
            return none(DownProjection(down, columns, out=out))[0]

        part.cut_(block, kept, cut_down, None)
        return block

    def runs(position: int, width: int) -> Callable[[], Any]:
        own = [cut(position, width) for _ in range(copies)]
        placed = {place: own[turn % copies] for turn, place in enumerate(places)}
        return forward_call(opened, placed, tokens, cached)

    parts = layout.block_parts(dense)
    cached = cache_maker(opened.model, len(tokens), context) if context else None
    grids = [_grid(part, part.units(dense), whole_ffns) for part in parts] or [[0]]
    is_attention = [isinstance(part, Attention) for part in parts] or [False]
    turns = [[position] for position in range(len(grids))]
    if is_attention[-1] and len(turns) > 1:  # beside the first FFN's: dense blocks are of both
        turns[0] += turns.pop()
    found: dict[int, WidthCurve] = {}
    outer = []
    for positions in turns:
        points = [(position, width) for position in positions for width in grids[position]]
        cases = [forward_call(opened, {}, tokens, cached), *(runs(*point) for point in points)]
        rounds = _timed(cases, tokens.device)
        outer.append(median(alone for alone, *_ in rounds))
        added = (median(x[number] - x[0] for x in rounds) for number in range(1, len(cases)))
        seconds = {p: max(0.0, more) / len(places) for p, more in zip(points, added, strict=True)}
        whole = mean(seconds[position, grids[position][-1]] for position in positions)
        for position in positions:
            *cut_widths, _ = widths = grids[position]
            taken = (*(seconds[position, width] for width in cut_widths), whole)
            found[position] = WidthCurve(tuple(widths), taken, is_attention[position])
    return tuple(found[position] for position in range(len(grids))), median(outer)


def _timed(cases: Sequence[Callable[[], Any]], device: torch.device) -> list[list[float]]:
    """Seconds of each case in every round. Cases take turns, there and back; the first round is
    not counted. Where rounds take long there are only :data:`LEAST_ROUNDS`."""
    calls = 1 if device.type == "cpu" else 10  # in a row, so that the launch of a call is hidden
    found: list[list[float]] = []
    begun = time.perf_counter()
    for turn in range(ROUNDS + 1):
        seconds = [0.0] * len(cases)
        for number in range(len(cases)) if turn % 2 else reversed(range(len(cases))):
            synchronize(device)
            started = time.perf_counter()
            for _ in range(calls):
                cases[number]()
            synchronize(device)
            seconds[number] = (time.perf_counter() - started) / calls
        if turn:
            found.append(seconds)
        if len(found) >= LEAST_ROUNDS and time.perf_counter() - begun > LONG_SECONDS:
            break
    return found
