"""From the shards of a dense model to those of the pruned one, one block at a time.

Each block is read once more, ahead of its turn. At its turn it is cut exactly as a live model's
is, windows that measure the model go through it before and after, and a thread behind writes it.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from .checkpoint import MAX_SHARD_BYTES, saved_tensors
from .errors import Stopped
from .models import OpenModel
from .plan import PruningPlan
from .progress import BlockProgress
from .rewriting import check_compensation, check_plan, planned_tensors, prune_block_
from .shards import ShardWriter, finished_shards, pack_shards, write_index
from .statistics import Statistics
from .stream import RidingWindows


def _write_all(writer: ShardWriter, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        writer.write(name, tensor)


def _around_blocks(
    tensors: Mapping[str, torch.Tensor], blocks: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors that come before and after those of the blocks, so that shards are filled in turn
    and finished one after another."""
    head: dict[str, torch.Tensor] = {}
    tail: dict[str, torch.Tensor] = {}
    part = head
    for name, tensor in tensors.items():
        if name.startswith(blocks):
            part = tail
        else:
            part[name] = tensor
    return head, tail


def prune_to_shards_(
    opened: OpenModel,
    plan: PruningPlan,
    statistics: Statistics | None,
    folder: Path,
    *,
    before: Sequence[RidingWindows] = (),
    after: Sequence[RidingWindows] = (),
    stop: Callable[[], bool] = bool,
    progress: bool = True,
) -> None:
    """Write the weights of the pruned model, the bytes that a pruned live model's would be.

    Args:
        opened: the dense model; its skeleton has the pruned shapes afterwards.
        plan: what each block keeps.
        statistics: for compensations that need them.
        folder: where the shards go; those that an earlier run finished there stay as they are.
        before: windows that go through the dense blocks.
        after: windows that go through the pruned blocks.
        stop: asked after each block; shards that are being written are finished first.
        progress: show a bar on stderr.

    Raises:
        CfspError: a plan for another model, statistics that are missing, a shard that cannot be
            read.
        OSError: no space for a shard; nothing of it was written then.
        Stopped: ``stop`` said so.
    """
    layout, model = opened.layout, opened.model
    check_plan(plan, model, layout, opened.blocks.fingerprint())
    check_compensation(plan, statistics)
    compensation = plan.recipe.resolved_compensation
    dense = saved_tensors(model)
    planned = planned_tensors(dense, layout, plan)
    shards = pack_shards(planned, MAX_SHARD_BYTES)
    total = sum(shard.nbytes for shard in shards)
    bar = tqdm(total=total, desc="prune", unit="B", unit_scale=True, disable=not progress)
    shown = BlockProgress(bar, len(plan.blocks))
    with (
        bar,
        ShardWriter(folder, shards, finished_shards(folder, shards)) as writer,
        ThreadPoolExecutor(1, thread_name_prefix="write-behind") as behind,
        opened.blocks.turns() as turns,
    ):
        head, tail = _around_blocks(dense, f"{layout.blocks}.")
        writing: Future[None] = behind.submit(_write_all, writer, head)
        bar.update(sum(tensor.nbytes for tensor in head.values()))
        stop_after: int | None = None
        for number, block in turns:
            shown.turn(number, opened.blocks.stored_bytes(number))
            for windows in before:
                windows.ride(number)
            block_statistics = statistics.blocks[number] if statistics is not None else None
            prune_block_(block, layout, plan.blocks[number], compensation, block_statistics)
            for windows in after:
                windows.ride(number)
            writing.result()  # at most one block waits to be written
            prefix = f"{layout.blocks}.{number}."
            pruned = {prefix + name: tensor for name, tensor in block.state_dict().items()}
            writing = behind.submit(_write_all, writer, pruned)
            bar.update(sum(tensor.nbytes for tensor in pruned.values()))
            del pruned
            if stop_after is None and stop():
                writing.result()
                stop_after = writer.closed + len(writer.open)
            if stop_after is not None and writer.closed >= stop_after:
                writing.result()
                raise Stopped
        writing.result()
        _write_all(writer, tail)
        bar.update(sum(tensor.nbytes for tensor in tail.values()))
    write_index(folder, shards)
