"""Cut a model to its plan, block by block, in place."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat

import torch
from torch import nn
from tqdm import tqdm

from ..calibration.grams import held_out_windows
from ..calibration.statistics import BlockStatistics, Statistics, check_model
from ..errors import CfspError
from ..io.memory import Room
from ..io.safetensors import TensorInfo, Tensors
from ..models.blocks import Blocks
from ..models.descriptions import PlacedPart
from ..models.layouts import Layout
from ..models.parts.channels import CutDown, check_expert_width, sizes_of
from ..models.parts.expert_removal import keep_experts_, with_fewer
from .compensation import COMPENSATIONS, DownProjection, FitRecord
from .plan import BlockPlan, PruningPlan
from .recipe import Recipe

Visit = Callable[[int], None]
"""Takes windows through the block of this number, before or after it is cut."""
Turn = Callable[[int, nn.Module], tuple[BlockPlan, BlockStatistics | None]]
"""(number, block) at its turn -> what it keeps, and what a compensation reads, where it reads any.
"""
TOKENS_PER_CHANNEL = 4
"""Below it least squares fit noise too."""


def check_plan(plan: PruningPlan, model: Blocks) -> None:
    """Raise CfspError where the plan is for another model, as :func:`check_statistics` does, or
    has widths at which experts cannot run."""
    sizes, made_with = tuple(b.columns for b in plan.blocks), plan.model_fingerprint
    check_model("the plan is for", sizes, made_with, model)
    asked = model.layout.fewer_experts
    for number, block in enumerate(plan.blocks):
        for kept in block.kept:
            check_expert_width(kept.shape[1], len(kept), f"plan, block {number}: width")
        routed = any(own.experts > 1 for own in block.units)
        wanted = asked.count if asked is not None and routed else None
        found = len(block.experts) if block.experts is not None else None
        if wanted != found:
            raise CfspError(
                f"plan, block {number}: keeps {found or 'all'} experts, its recipe's `experts` "
                f"says {wanted or 'all'}"
            )
        if asked is not None and block.experts is not None:
            own = torch.zeros(block.dense_experts).index_fill(0, block.experts, 1)
            if not torch.equal(asked.choose(own), block.experts):
                raise CfspError(
                    f"plan, block {number}: its experts must be as many of each of "
                    f"{asked.groups} groups"
                )


def warn_of_few_tokens(
    blocks: Sequence[BlockPlan],
    statistics: Statistics | None,
    windows: int,
    seqlen: int,
) -> None:
    """Warn where least squares will be of few tokens: the share of the fitting windows' that an
    expert saw in the statistics, all of them where nothing is known."""
    fitted, few, total = (windows - held_out_windows(windows)) * seqlen, [], 0
    for number, block in enumerate(blocks):
        known = statistics.blocks[number] if statistics is not None else None
        sizes = sizes_of(block.left_units)
        shares = [1.0] * len(sizes)
        if known is not None and known.expert_tokens:
            left = chain.from_iterable(block.left(known.expert_tokens))
            shares = [tokens / known.tokens for tokens in left]
        total += len(sizes)
        for size, share in zip(sizes, shares, strict=True):
            if (tokens := round(share * fitted)) < TOKENS_PER_CHANNEL * size:
                few.append((tokens / size, number, tokens, size))
    if few:
        _, number, tokens, size = min(few)
        warnings.warn(
            f"least squares: {len(few)} of {total} FFNs have fewer than {TOKENS_PER_CHANNEL} "
            f"tokens per channel, block {number} {tokens} for {size}: calibrate on more windows",
            stacklevel=2,
        )
    if not held_out_windows(windows):
        warnings.warn(
            "a single calibration window leaves none to hold out: nothing will tell whether a "
            "compensation lowers the error",
            stacklevel=2,
        )


@torch.no_grad()
def prune_block_(
    block: nn.Module,
    layout: Layout,
    plan: BlockPlan,
    compensation: str,
    damping: float,
    statistics: BlockStatistics | None,
    room: Room | None = None,
) -> tuple[FitRecord, ...]:
    """Cut the parts of one block in place, into new memory or what ``room`` gives; the records are
    those of compensations that fit, one for each part and expert."""
    of_parts = plan.left(statistics.parts() if statistics is not None else repeat(None))
    fewer = layout.fewer_experts
    if plan.experts is not None and fewer is not None:
        keep_experts_(block, fewer, plan.experts, room)
    records: list[FitRecord] = []

    def compensate(
        columns: torch.Tensor,
        known: Sequence[BlockStatistics | None],
        expert: int,
        weight: torch.Tensor,
        out: torch.Tensor | None,
    ) -> CutDown:
        stays = columns[expert].to(weight.device)
        down = DownProjection(weight, stays, known[expert], damping, out)
        cut, record = COMPENSATIONS[compensation].cut(down)
        if record is not None:
            records.append(record)
        return cut

    parts = layout.block_parts(block)
    for part, kept, own, known in zip(parts, plan.kept, plan.units, of_parts, strict=True):
        if kept.shape[1]:
            part.cut_(block, kept, partial(compensate, own.columns_of(kept), known), room)
        else:
            part.remove_(block)
    return tuple(records)


def cut_blocks_(
    turns: Iterable[tuple[int, nn.Module]],
    layout: Layout,
    recipe: Recipe,
    turn: Turn,
    before: Sequence[Visit],
    after: Sequence[Visit],
    room: Callable[[], Room | None] = lambda: None,
) -> Iterator[tuple[int, nn.Module, tuple[FitRecord, ...]]]:
    """Cut every block at its turn, see :func:`prune_block_`, between the visits ``before`` and
    ``after``; ``room`` is called once for each."""
    compensation, damping = recipe.resolved_compensation, recipe.damping
    for number, block in turns:
        for visit in before:
            visit(number)
        planned, known = turn(number, block)
        records = prune_block_(block, layout, planned, compensation, damping, known, room())
        del known
        for visit in after:
            visit(number)
        yield number, block, records


def prune_model_(
    model: nn.Module,
    layout: Layout,
    recipe: Recipe,
    turn: Turn,
    after: Sequence[Visit] = (),
    *,
    progress: bool = True,
) -> tuple[tuple[FitRecord, ...], ...]:
    """Cut every block of a live model; the records are by block."""
    blocks = tqdm(layout.find_blocks(model), desc="prune", unit="block", disable=not progress)
    cut = cut_blocks_(enumerate(blocks), layout, recipe, turn, (), after)
    return tuple(records for _, _, records in cut)


def left_tensors(tensors: Tensors, parts: Sequence[PlacedPart]) -> Tensors:
    """``tensors`` of the dense model without the experts that are removed."""
    cuts = [(placed.prefix, placed.fewer) for placed in parts if placed.fewer is not None]
    return with_fewer(tensors, cuts)


def planned_tensors(
    tensors: Tensors, parts: Sequence[PlacedPart], plan: PruningPlan
) -> dict[str, TensorInfo]:
    """What is left, in order, of ``tensors`` of the dense model, with the biases that are added."""
    adds_bias = COMPENSATIONS[plan.recipe.resolved_compensation].adds_bias
    counts = (count for block in plan.blocks for count in block.counts)
    cut: dict[str, tuple[int, int]] = {}  # dimension and its new size
    new: dict[str, str] = {}  # the bias that comes after a weight
    gone = []
    left = left_tensors(tensors, parts)
    for placed, count in zip(parts, counts, strict=True):
        prefix, part = placed.prefix, placed.part
        for name, axis in part.channels.items():
            cut[prefix + name] = (axis.dimension, axis.size(count))
        if not count:
            gone.append(f"{prefix}{part.path}.")
        elif adds_bias and part.down_bias is not None:
            new[f"{prefix}{part.down}.weight"] = prefix + part.down_bias
    found: dict[str, TensorInfo] = {}
    for name, info in left.items():
        if name.startswith(tuple(gone)):
            continue
        shape = list(info.shape)
        if name in cut:
            dimension, size = cut[name]
            shape[dimension] = size
        found[name] = TensorInfo(info.dtype, tuple(shape))
        if (bias := new.get(name)) is not None and bias not in tensors:
            found[bias] = TensorInfo(info.dtype, info.shape[:1])
    return found
