"""One dense forward pass over the calibration tokens, with statistics of every block."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from cfsp_kernels import block_influence

from ..distributed import ALONE, Ranks
from ..errors import CfspError, Stopped
from ..models.blocks import Blocks, LiveBlocks
from ..models.blockwise import default_micro_batch, record_block_calls, run_block
from ..models.channels import ChannelGroup, Routing, sizes_of
from ..models.fingerprints import tokens_fingerprint, versions
from ..models.layouts import Layout
from .gram_sums import GramSums, Split, check_ranks
from .gram_writing import GramWriter, gram_writer
from .grams import GramFolder, held_out_windows
from .progress import BlockProgress
from .statistics import INFLUENCE_METRICS, BlockStatistics, Statistics


class _BlockCollector:
    """Adds up one block's statistics on its device, without waiting for it.

    The first rank adds as it goes. The others keep what each micro-batch gives, to be added after
    those of the ranks before them.
    """

    def __init__(
        self,
        groups: tuple[ChannelGroup, ...],
        micro_batches: int,
        device: torch.device,
        ranks: Ranks,
        split: Split | None,
    ) -> None:
        """``split``: of the tokens, where Gram matrices are wanted."""
        self.groups = groups
        self.ranks = ranks
        self.tokens = 0
        ends = accumulate(group.total for group in groups)
        self.ffns = [
            _FFNCollector(self, number, slice(end - group.total, end))
            for number, (group, end) in enumerate(zip(groups, ends, strict=True))
        ]
        self.zeros = torch.zeros(2, sum(sizes_of(groups)), dtype=torch.float64, device=device)
        self.sums: list[torch.Tensor] = []
        """Each [2, F] fp64: sum and sum of squares."""
        self.begun = False
        """Whether the last of them is of the micro-batch that is running."""
        self.influences = torch.zeros(
            micro_batches, len(INFLUENCE_METRICS), dtype=torch.float64, device=device
        )
        mine = ranks.share(micro_batches)
        self.own_influences = self.influences[mine]
        self.seen = 0
        """Micro-batches that are through."""
        self.grams = GramSums(groups, split, mine.start, device, ranks) if split else None

    def current(self) -> torch.Tensor:
        """The sums that the running micro-batch adds to."""
        if not self.sums or not (self.ranks.first or self.begun):
            self.sums.append(self.zeros.clone())
        self.begun = True
        return self.sums[-1]

    def add_states(self, index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        self.tokens += before.shape[:-1].numel()
        self.begun = False
        self.seen += 1
        block_influence(before, after, out=self.own_influences[index])

    def result(
        self, number: int, windows: int, micro_batch: int, writer: GramWriter | None
    ) -> BlockStatistics:
        ranks = self.ranks
        influences = ranks.fill_(self.influences.cpu())
        broken = (~influences.isfinite().all(1)).nonzero()
        if len(broken):
            first = int(broken[0]) * micro_batch
            last = min(first + micro_batch, windows) - 1
            where = f"window {first}" if first == last else f"windows {first} to {last}"
            raise CfspError(
                f"block {number} gave NaN or infinite activations in calibration {where}: "
                "check the weights of this block, or use another dtype"
            )
        sums = ranks.ordered_sum([part.cpu() for part in self.sums], self.zeros)
        seen = torch.cat([ffn.seen() for ffn in self.ffns])
        expert_tokens = ranks.ordered_sum([seen], torch.zeros_like(seen))
        if not expert_tokens.any():
            raise CfspError(f"block {number} ran without its FFN: it is not called as a module")
        return BlockStatistics(
            ranks.total(self.tokens),
            windows,
            sums[0].clone(),
            sums[1].clone(),
            influences.sum(0),
            self.groups,
            tuple(int(tokens) for tokens in expert_tokens),
            self.grams.write(writer, number) if self.grams is not None and writer else (),
        )


class _FFNCollector:
    """The :class:`cfsp.models.channels.Observer` of one FFN, or of all its experts."""

    def __init__(self, block: _BlockCollector, number: int, channels: slice) -> None:
        self.block = block
        self.number = number
        self.channels = channels
        self.tokens: int | torch.Tensor = 0

    def totals(self) -> torch.Tensor:
        return self.block.current()[:, self.channels]

    def add(self, x: torch.Tensor, routing: Routing | None = None) -> None:
        rows = x.flatten(0, -2)
        self.tokens += len(rows) if routing is None else routing.offsets.diff()
        if self.block.grams is not None:
            self.block.grams.add(self.number, self.block.seen, rows, routing)

    def seen(self) -> torch.Tensor:
        """Tokens of every expert so far, [E] fp64 on the CPU."""
        experts = self.block.groups[self.number].experts
        return torch.zeros(experts, dtype=torch.float64) + torch.as_tensor(self.tokens).cpu()


@contextmanager
def _observed(
    block: nn.Module, layout: Layout, collector: _BlockCollector, fused: bool
) -> Iterator[None]:
    """Hand the statistics of every FFN of the block to the collector while it runs."""
    with ExitStack() as stack:
        for ffn, observer in zip(layout.block_ffns(block), collector.ffns, strict=True):
            stack.enter_context(ffn.observed(block, observer, fused))
        yield


def _warn_of_idle_experts(blocks: Sequence[BlockStatistics]) -> None:
    idle = [number for number, block in enumerate(blocks) for n in block.expert_tokens if n == 0]
    if idle:
        warnings.warn(
            f"{len(idle)} experts, the first in block {idle[0]}, saw no calibration token: nothing "
            "tells their channels apart; calibrate on more, or other, text",
            stacklevel=3,
        )


def collect_statistics(
    model: nn.Module,
    layout: Layout,
    windows: torch.Tensor,
    *,
    micro_batch: int | None = None,
    provenance: dict[str, Any] | None = None,
    fused: bool = True,
    progress: bool = True,
    weights: Blocks | None = None,
    stop: Callable[[], bool] = bool,
    ranks: Ranks = ALONE,
    grams: GramFolder | None = None,
) -> Statistics:
    """One dense forward pass over each block, with statistics of its FFN and its influence.

    Memory beside the model: the hidden states of this rank's windows once, one micro-batch; on
    ranks other than the first, [2, F] fp64 for each of their micro-batches. With Gram matrices, on
    the device, for the block at work, [F, F] fp32 twice, on ranks other than the first as often as
    each has eighths of the windows, and once more; and the activations of an eighth, twice.

    Args:
        model: a causal LM on its device; left as it was found.
        layout: where it keeps its FFNs.
        windows: [N, S] int64 calibration tokens.
        micro_batch: windows per forward call; None: see :func:`default_micro_batch`.
        provenance: kept with the result.
        fused: use the fused SwiGLU statistics where the FFN allows it; the numbers are the same.
        progress: show a bar on stderr.
        weights: where the blocks' weights are; None: in the model.
        stop: asked before each block.
        ranks: each runs its share of the micro-batches; all get the same result, which does not
            depend on how many they are.
        grams: collect Gram matrices too, in this folder, which all ranks see.

    Raises:
        CfspError: a block gives NaN or infinite activations; names it and the window. Ranks with
            another model, text or version than the first. With Gram matrices: no space for them,
            or another number of ranks than 1, 2, 4 or 8.
        Stopped: ``stop`` said so, on any rank.
    """
    device = next(model.parameters()).device
    count, seqlen = windows.shape
    given = micro_batch
    micro_batch = ranks.of_first(lambda: given or default_micro_batch(device, seqlen))
    micro_batches = -(-count // micro_batch)
    split = Split(count, seqlen, micro_batch) if grams is not None else None
    mine = ranks.share(micro_batches)
    own_windows = windows[mine.start * micro_batch : mine.stop * micro_batch]
    blocks = layout.find_blocks(model)
    weights = weights or LiveBlocks(model, layout)
    identity = {
        "model": weights.fingerprint(),
        "calibration text": tokens_fingerprint(windows),
        "machine or version": versions(device),
    }
    ranks.check_same(identity)
    writing: AbstractContextManager[GramWriter | None] = nullcontext()
    if grams is not None:
        check_ranks(ranks.size)
        sizes = [sizes_of(layout.groups(block)) for block in blocks]
        writing = gram_writer(grams, sizes, count, ranks)
    training = model.training
    model.eval()
    results = []
    try:
        calls = record_block_calls(model, blocks, own_windows, micro_batch)
        bar = tqdm(
            total=len(blocks) * own_windows.numel(),
            desc="calibrate",
            unit="tok",
            unit_scale=True,
            disable=not progress,
        )
        # a rank without windows needs no weights, but takes part in every sum
        needed = weights.turns() if len(own_windows) else nullcontext(enumerate(blocks))
        shown = BlockProgress(bar, len(blocks))
        with bar, writing as writer, needed as turns:
            for number, block in turns:
                if ranks.any(stop()):
                    raise Stopped
                shown.turn(number, weights.stored_bytes(number))
                collector = _BlockCollector(
                    layout.groups(block), micro_batches, device, ranks, split
                )

                def observe(
                    index: int,
                    before: torch.Tensor,
                    after: torch.Tensor,
                    collector: _BlockCollector = collector,
                ) -> None:
                    collector.add_states(index, before, after)
                    bar.update(before.shape[0] * before.shape[1])

                with _observed(block, layout, collector, fused):
                    run_block(block, number, calls, observe)
                results.append(collector.result(number, count, micro_batch, writer))
    finally:
        model.train(training)
    _warn_of_idle_experts(results)
    return Statistics(
        tuple(results),
        str(identity["model"]),
        {
            **(provenance or {}),
            "tokens_sha256": identity["calibration text"],
            "windows": count,
            "seqlen": seqlen,
            "micro_batch": micro_batch,
            **({"held_out_windows": held_out_windows(count)} if grams is not None else {}),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "versions": identity["machine or version"],
        },
    )
