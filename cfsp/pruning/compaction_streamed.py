"""From the shards of a dense model to those of the pruned one, one block at a time.

Each block is read ahead of its turn, cut exactly as a live model's is, with the windows that
measure the model going through it before and after, and written by a thread behind.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..calibration.collect import BlockProgress
from ..distributed import ALONE, Ranks
from ..errors import Stopped
from ..io.block_reader import Arena, aligned
from ..io.memory import Room
from ..io.safetensors import TensorInfo
from ..io.shard_writer import (
    MAX_SHARD_BYTES,
    Shard,
    ShardWriter,
    finished_shards,
    pack_shards,
    write_index,
)
from ..models.blocks import StoredBlocks
from ..models.layouts import Layout
from ..models.loading import model_device
from ..models.opening import OpenModel
from ..models.parts.channels import in_place
from ..models.surgery import on_meta, set_parameters_
from ..models.tensors import saved_tensors
from ..weights.mapping import WayBack
from .compaction import Turn, Visit, cut_blocks_, planned_tensors
from .compensation import FitRecord
from .plan import PruningPlan

Tensors = dict[str, torch.Tensor]


def _write_all(
    writer: ShardWriter,
    renamed: Callable[[Tensors], Tensors],
    tensors: Tensors,
    ready: Callable[[], None],
) -> None:
    ready()
    for name, tensor in renamed(tensors).items():
        writer.write(name, tensor)


class _Aside:
    """Where a cut block waits to be written while its own memory takes the next one."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.arena = Arena(nbytes, torch.device("cpu"), pinned=self.on_gpu)

    def room(self) -> Room:
        """Where the cut matrices of the next block go at once: on a CPU, here."""
        self.arena.clear()
        return in_place if self.on_gpu else self.arena.take

    def put(self, tensors: Tensors) -> tuple[Tensors, Callable[[], None]]:
        """The tensors here, and what to call before they are read."""
        memory = self.arena.memory
        inside = range(memory.data_ptr(), memory.data_ptr() + len(memory))

        def here(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_cuda and tensor.data_ptr() in inside:
                return tensor
            place = self.arena.take(tuple(tensor.shape), tensor.dtype)
            return place.copy_(tensor, non_blocking=True)

        found = {name: here(tensor) for name, tensor in tensors.items()}
        if not self.on_gpu:
            return found, lambda: None
        return found, torch.cuda.current_stream(self.device).record_event().synchronize


def _largest_block(planned: Mapping[str, TensorInfo], layout: Layout) -> int:
    """Bytes of memory for the largest of the planned blocks."""
    sizes: Counter[int] = Counter()
    for name, info in planned.items():
        if (place := layout.place_of(name)) is not None:
            sizes[place[0]] += aligned(info.nbytes)
    return max(sizes.values())


def blocks_of(shards: Sequence[Shard], way_back: WayBack) -> set[int]:
    """Numbers of the blocks with tensors in these shards."""
    places = {way_back.block_of[name] for shard in shards for name in shard.tensors}
    return {place for place in places if place is not None}


def _pruned_skeleton(
    opened: OpenModel, plan: PruningPlan, planned: Mapping[str, TensorInfo]
) -> PreTrainedModel:
    """A copy of a model on meta with what is left of its tensors."""
    model, layout = opened.model, opened.layout
    pruned = on_meta(model)
    for block, own in zip(layout.find_blocks(pruned), plan.blocks, strict=True):
        for part, count in zip(layout.block_parts(block), own.counts, strict=True):
            if not count:
                part.remove_(block)
    buffers = {name for name, _ in model.named_buffers()}
    left = {k: torch.empty(x.shape, dtype=x.dtype, device="meta") for k, x in planned.items()}
    set_parameters_(pruned, {name: value for name, value in left.items() if name not in buffers})
    return pruned


def prune_to_shards_(
    opened: OpenModel,
    blocks: StoredBlocks,
    plan: PruningPlan,
    turn: Turn,
    folder: Path,
    *,
    before: Sequence[Visit] = (),
    after: Sequence[Visit] = (),
    stop: Callable[[], bool] = bool,
    finished_shard: Callable[[Path], None] = lambda file: None,
    progress: bool = True,
    ranks: Ranks = ALONE,
    together: bool = False,
) -> tuple[tuple[FitRecord, ...], ...]:
    """Write the bytes that a pruned live model's shards would be; the records are by block read.

    Each rank writes some of the shards, those that ``folder`` lacks, and reads only their blocks
    where there are no visits. Each stops on its own, once the shards that are being written are
    finished. ``together``, where ranks exchange something at every block, each reads all, and all
    stop after the same one. Raises OSError before a shard for which there is no space.
    """
    layout, model = opened.layout, opened.model
    planned = planned_tensors(opened.described.tensors, opened.described.parts, plan)
    way_back = WayBack(
        _pruned_skeleton(opened, plan, planned), blocks.sources, planned, layout.number_of
    )
    shards = pack_shards(way_back.planned, MAX_SHARD_BYTES)
    finished = ranks.of_first(lambda: finished_shards(folder, shards))
    left = [shard for shard in shards if shard.name not in finished]
    mine = [left[i] for i in ranks.weighted_share([shard.nbytes for shard in left])]
    others = frozenset(shard.name for shard in shards) - {shard.name for shard in mine}
    wanted = None if together or before or after else blocks_of(mine, way_back)
    device = model_device(model)
    aside = _Aside(_largest_block(planned, layout), device)
    total = sum(shard.nbytes for shard in shards)
    bar = tqdm(total=total, desc="prune", unit="B", unit_scale=True, disable=not progress)
    shown = BlockProgress(bar, len(plan.blocks))
    with (
        bar,
        ShardWriter(folder, shards, others, finished_shard) as writer,
        ThreadPoolExecutor(1, thread_name_prefix="write-behind") as behind,
        blocks.turns(wanted) as turns,
    ):
        # Tensors before and after the blocks, so that shards are filled and finished in turn.
        in_order = list(way_back.planned)
        first = next(n for n, name in enumerate(in_order) if way_back.block_of[name] is not None)
        dense = saved_tensors(model)
        outside = way_back({k: t for k, t in dense.items() if layout.place_of(k) is None})
        head = {name: outside[name] for name in in_order[:first]}
        tail = {name: tensor for name, tensor in outside.items() if name not in head}

        def write(
            tensors: Tensors,
            renamed: Callable[[Tensors], Tensors] = dict,
            ready: Callable[[], None] = lambda: None,
        ) -> Future[None]:
            bar.update(sum(tensor.nbytes for tensor in tensors.values()))
            return behind.submit(_write_all, writer, renamed, tensors, ready)

        def show(number: int) -> None:
            shown.turn(number, blocks.stored_bytes(number))

        def room() -> Room:
            writing.result()  # at most one block waits to be written
            return aside.room()

        writing = write(head)
        stop_after: int | None = None
        others_too = ranks if together else ALONE
        records: list[tuple[FitRecord, ...]] = []
        cut = cut_blocks_(turns, layout, plan.recipe, turn, [show, *before], after, room)
        for number, block, found in cut:
            records.append(found)
            prefix = layout.prefix(number)
            pruned, ready = aside.put({prefix + k: t for k, t in block.state_dict().items()})
            writing = write(pruned, way_back, ready)
            del pruned
            if stop_after is None and others_too.any(stop()):
                writing.result()
                stop_after = writer.closed + len(writer.open)
            if stop_after is not None and not others_too.any(writer.closed < stop_after):
                writing.result()
                raise Stopped
        writing.result()
        write(tail).result()
    if ranks.first:
        write_index(folder, shards)
    return tuple(records)
