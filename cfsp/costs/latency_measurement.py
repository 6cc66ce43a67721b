"""Measure how long the blocks of a model take at a grid of FFN widths, and keep it on disk."""

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..errors import CfspError
from ..models.blocks import set_parameters_
from ..models.channels import EXPERT_WIDTH_MULTIPLE, ChannelGroup, CutDown
from ..models.fingerprints import versions
from ..models.layouts import Layout, as_block_output
from ..models.loading import OpenModel, check_seqlen, model_device
from ..models.surgery import forward_instead
from ..pruning.budget import ModelBudget
from ..pruning.compensation import DownProjection, none
from ..pruning.plan import write_json
from .hardware import device_name
from .latency import LatencyTable, WidthCurve, load_table

MEASURING = 2
"""Version of the way of measuring: tables of an earlier one are not taken from the cache."""
POINTS = 8
"""Widths that are measured of every FFN, up to the dense one."""
ROUNDS = 21
"""Times that every width is measured; the median counts."""
LEAST_ROUNDS, LONG_SECONDS = 7, 60.0
"""From so many rounds on measuring stops after so many seconds."""
CHAIN = 4
"""Blocks of a width that are timed one after another."""
UNCACHED_BYTES = 256 << 20
"""Of weights: blocks together as large find no weights of theirs in a cache."""
FAST_MULTIPLE = 128
"""Of the widths that are measured: matrix products of whole tiles."""
CALLS_PER_SYNC = {"cpu": 1}
"""Calls of a block in a row; on other devices 10, so that the launch of a call is hidden."""


def cache_folder() -> Path:
    """Where tables are kept: $CFSP_CACHE, or ~/.cache/cfsp."""
    return Path(os.environ.get("CFSP_CACHE") or Path.home() / ".cache" / "cfsp") / "latency"


def _settings(block: nn.Module) -> dict[str, Any]:
    """Plain values of a block's modules, such as its attention's window."""
    return {
        f"{path}.{name}": value
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float | str)
        and name[:1] != "_"
        and name not in ("training", "layer_idx", "layer_id")
    }


def _kind(block: nn.Module) -> str:
    """Tells blocks that take different times apart."""
    shapes = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
    values = (type(block).__name__, sorted(shapes.items()), sorted(_settings(block).items()))
    return hashlib.sha256(repr(values).encode()).hexdigest()


def table_identity(
    model: PreTrainedModel, layout: Layout, device: torch.device, batch: int, length: int
) -> dict[str, Any]:
    """Everything that a table depends on: what is measured, on what, and by which versions.

    Args:
        model: dense, perhaps on meta.
        layout: its layout.
        device: to measure on.
        batch: windows of a forward call.
        length: tokens of each.
    """
    kinds = [_kind(block) for block in layout.find_blocks(model)]
    outer = tuple(model.get_input_embeddings().weight.shape)
    attention = getattr(model.config, "_attn_implementation", None)
    experts = getattr(model.config, "_experts_implementation", None)
    shape = (kinds, outer, attention, experts)
    known = versions(device)
    return {
        "model": hashlib.sha256(repr(shape).encode()).hexdigest(),
        "device": device_name(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch": batch,
        "length": length,
        "versions": {name: known[name] for name in ("torch", "transformers")},
        "measuring": MEASURING,
    }


def _cache_file(identity: dict[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"{key[:16]}.json"


def cached_table(identity: dict[str, Any]) -> LatencyTable | None:
    """The table that was measured of just this, where there is one."""
    file = _cache_file(identity)
    if not file.exists():
        return None
    table = load_table(file)
    return table if table.identity == identity else None


def known_table(
    model: PreTrainedModel,
    layout: Layout,
    device: torch.device,
    budget: ModelBudget | None,
    given: str | Path | LatencyTable | None,
) -> LatencyTable | None:
    """The table that is given, or the one that a latency budget wants, where it is kept.

    Args:
        model: dense, perhaps on meta.
        layout: its layout.
        device: that a table is kept of; a given one may be of any.
        budget: of the recipe.
        given: a table of the same model, and of the batch and length of the budget.

    Raises:
        CfspError: no table, or one of another model, batch or length.
    """
    if given is None:
        if budget is None or budget.kind != "latency":
            return None
        return cached_table(table_identity(model, layout, device, budget.batch, budget.length))
    table = given if isinstance(given, LatencyTable) else load_table(given)
    shape = table.batch, table.length
    if budget is not None and budget.kind != "params" and shape != (budget.batch, budget.length):
        raise CfspError(
            f"the latency table is of {table.batch} x {table.length} tokens, budget {budget.text} "
            f"of {budget.batch} x {budget.length}"
        )
    identity = table_identity(model, layout, device, *shape)
    if table.identity.get("model") != identity["model"]:
        raise CfspError("the latency table is of another model: `cfsp latency` measures this one")
    return table


def save_table(table: LatencyTable, path: Path) -> None:
    """Write a table, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, table.to_dict())
    except OSError as error:
        raise CfspError(f"cannot write latency table {path}: {error.strerror}") from None


def table_of(
    opened: OpenModel, batch: int, length: int, *, again: bool = False, progress: bool = True
) -> LatencyTable:
    """The table of a model on its device: the one that is kept, or measured now and kept.

    Args:
        opened: dense; no weights of its blocks are read.
        batch: windows of a forward call.
        length: tokens of each.
        again: measure even where a table is kept.
        progress: show a bar on stderr.

    Raises:
        CfspError: more tokens than the model has positions, no memory for it, or no place to
            keep it.
    """
    check_seqlen(opened.model, length)
    device = model_device(opened.model)
    identity = table_identity(opened.model, opened.layout, device, batch, length)
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
) -> LatencyTable | None:
    """:func:`known_table`, measured now where a latency budget has none."""
    device = model_device(opened.model)
    table = known_table(opened.model, opened.layout, device, budget, given)
    if table is None and budget is not None and budget.kind == "latency":
        return table_of(opened, budget.batch, budget.length, progress=progress)
    return table


@torch.no_grad()
def measure_table(
    opened: OpenModel, identity: dict[str, Any], *, progress: bool = True
) -> LatencyTable:
    """Measure one block of every kind at a grid of widths, and the rest of the model.

    What is timed is the model with a few blocks of one width, and with none: a block takes what
    they add. Alone it would not find the caches and the memory allocator as in the model. Weights
    are random. All widths are in memory at once and take turns, there and back, so that drift
    cancels out.

    Args:
        opened: dense; no weights of its blocks are read.
        identity: of :func:`table_identity`.
        progress: show a bar on stderr.

    Raises:
        CfspError: no memory for all widths.
    """
    model, layout = opened.model, opened.layout
    blocks, device = layout.find_blocks(model), model_device(model)
    names = [_kind(block) for block in blocks]
    kinds = sorted(set(names), key=names.index)
    generator = torch.Generator().manual_seed(0)
    shape = identity["batch"], identity["length"]
    words = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(0, words, shape, generator=generator).to(device)
    measured: list[tuple[WidthCurve, ...]] = []
    outer: list[float] = []
    bar = tqdm(kinds, desc="latency", unit="kind of block", disable=not progress)
    try:
        for name in bar:
            places = [place for place, own in enumerate(names) if own == name][:CHAIN]
            dense = _with_random_weights(blocks[places[0]], device, model.dtype)
            curves, seconds = _curves(model, layout, dense, places, tokens)
            measured.append(curves)
            outer.append(seconds)
    except torch.OutOfMemoryError:
        raise CfspError(
            f"no memory to measure blocks at {shape[0]} x {shape[1]} tokens; fewer tokens need less"
        ) from None
    return LatencyTable(
        identity, median(outer), tuple(measured), tuple(kinds.index(name) for name in names)
    )


def _with_random_weights(block: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of a block, perhaps on meta, with small random weights in memory."""
    dense = copy.deepcopy(block)
    values = {
        name: torch.empty(old.shape, dtype=dtype, device=device).normal_(0, 0.02)
        for name, old in dense.named_parameters()
    }
    set_parameters_(dense, values)
    return dense


def _grid(group: ChannelGroup) -> list[int]:
    """Widths of an FFN, ascending up to the dense one."""
    least = EXPERT_WIDTH_MULTIPLE if group.experts > 1 else 1
    multiple = next((m for m in (FAST_MULTIPLE, 8) if group.channels >= m * POINTS), least)
    spread = (round(group.channels * k / POINTS / multiple) * multiple for k in range(1, POINTS))
    return sorted({max(multiple, width) for width in spread} | {group.channels})


def _curves(
    model: PreTrainedModel,
    layout: Layout,
    dense: nn.Module,
    places: Sequence[int],
    tokens: torch.Tensor,
) -> tuple[tuple[WidthCurve, ...], float]:
    """A curve for every FFN of a block, and the seconds of the model without blocks.

    Args:
        model: whose embeddings, norm and head run too.
        layout: its layout.
        dense: a block with weights.
        places: numbers of the blocks that it stands in for.
        tokens: [batch, length] int64.
    """
    blocks = layout.find_blocks(model)
    size = sum(parameter.nbytes for parameter in dense.parameters())
    copies = min(len(places), max(1, math.ceil(UNCACHED_BYTES / size)))

    def cut(position: int, width: int) -> nn.Module:
        block = copy.deepcopy(dense)
        ffn = layout.block_ffns(block)[position]
        kept = torch.arange(width).expand(ffn.group(block).experts, -1)

        def cut_down(expert: int, down: torch.Tensor, out: torch.Tensor | None) -> CutDown:
            return none(DownProjection(down, kept[expert].to(down.device), out=out))[0]

        ffn.cut_(block, kept, cut_down, None)
        return block

    def runs(position: int, width: int) -> Callable[[], Any]:
        own = [cut(position, width) for _ in range(copies)]
        placed = {place: own[turn % copies] for turn, place in enumerate(places)}
        return _forward(model, blocks, placed, tokens)

    curves, outer = [], []
    for position, group in enumerate(layout.groups(dense)):
        widths = _grid(group)
        cases = [_forward(model, blocks, {}, tokens), *(runs(position, w) for w in widths)]
        rounds = _timed(cases, tokens.device)
        outer.append(median(alone for alone, *_ in rounds))
        seconds = [
            max(0.0, median(times[1 + number] - times[0] for times in rounds)) / len(places)
            for number in range(len(widths))
        ]
        curves.append(WidthCurve(tuple(widths), tuple(seconds)))
    return tuple(curves), median(outer)


def _forward(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    placed: Mapping[int, nn.Module],
    tokens: torch.Tensor,
) -> Callable[[], Any]:
    """A forward call with other blocks in some places; those in all others do nothing."""

    def hand_on(block: nn.Module) -> Callable[..., Any]:
        return lambda states, *_, **__: as_block_output(block, states)

    forwards: list[Callable[..., Any]] = [hand_on(block) for block in blocks]
    for place, block in placed.items():
        forwards[place] = partial(block)

    def run() -> Any:
        with forward_instead(blocks, forwards):
            return model(input_ids=tokens, use_cache=False)

    return run


def _timed(cases: Sequence[Callable[[], Any]], device: torch.device) -> list[list[float]]:
    """Seconds of each case in every round; they take turns, there and back, after a round that is
    not timed. At most :data:`ROUNDS`, and fewer, but :data:`LEAST_ROUNDS`, where they take long."""
    calls = CALLS_PER_SYNC.get(device.type, 10)
    found: list[list[float]] = []
    begun = time.perf_counter()
    for turn in range(ROUNDS + 1):
        seconds = [0.0] * len(cases)
        for number in range(len(cases)) if turn % 2 else reversed(range(len(cases))):
            _wait(device)
            started = time.perf_counter()
            for _ in range(calls):
                cases[number]()
            _wait(device)
            seconds[number] = (time.perf_counter() - started) / calls
        if turn:
            found.append(seconds)
        if len(found) >= LEAST_ROUNDS and time.perf_counter() - begun > LONG_SECONDS:
            break
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
