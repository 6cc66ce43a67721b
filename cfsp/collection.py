"""One dense forward pass over the calibration tokens, with statistics of every block."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from cfsp_kernels import ChannelStatistics, block_influence

from .blocks import Blocks, LiveBlocks
from .errors import CfspError, Stopped
from .ffns import ChannelGroup
from .layouts import Layout
from .provenance import tokens_fingerprint, versions
from .statistics import INFLUENCE_METRICS, BlockStatistics, Statistics
from .stream import default_micro_batch, record_block_calls, run_block


class _BlockCollector:
    """Adds up one block's statistics on its device, without waiting for it."""

    def __init__(
        self, groups: tuple[ChannelGroup, ...], micro_batches: int, device: torch.device
    ) -> None:
        self.groups = groups
        sizes = [group.channels for group in groups for _ in range(group.experts)]
        self.ranges = [
            slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)
        ]
        self.tokens = 0
        self.expert_tokens = [0] * len(sizes)
        self.sum = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self.sum_of_squares = torch.zeros_like(self.sum)
        self.influences = torch.zeros(
            micro_batches, len(INFLUENCE_METRICS), dtype=torch.float64, device=device
        )

    def add_channels(self, first: int, expert: int, part: ChannelStatistics) -> None:
        """``expert`` counts from the ``first`` of its FFN among all of the block."""
        channels = self.ranges[first + expert]
        self.expert_tokens[first + expert] += part.tokens
        self.sum[channels] += part.sum
        self.sum_of_squares[channels] += part.sum_of_squares

    def add_states(self, index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        self.tokens += before.shape[:-1].numel()
        part = block_influence(before, after)
        for column, metric in enumerate(INFLUENCE_METRICS):
            self.influences[index, column] = getattr(part, metric)

    def result(self, number: int, windows: int, micro_batch: int) -> BlockStatistics:
        influences = self.influences.cpu()
        broken = (~influences.isfinite().all(1)).nonzero()
        if len(broken):
            first = int(broken[0]) * micro_batch
            last = min(first + micro_batch, windows) - 1
            where = f"window {first}" if first == last else f"windows {first} to {last}"
            raise CfspError(
                f"block {number} gave NaN or infinite activations in calibration {where}: "
                "check the weights of this block, or use another dtype"
            )
        if not any(self.expert_tokens):
            raise CfspError(f"block {number} ran without its FFN: it is not called as a module")
        return BlockStatistics(
            self.tokens,
            windows,
            self.sum.cpu(),
            self.sum_of_squares.cpu(),
            influences.sum(0),
            self.groups,
            tuple(self.expert_tokens),
        )


@contextmanager
def _observed(
    block: nn.Module, layout: Layout, collector: _BlockCollector, fused: bool
) -> Iterator[None]:
    """Hand the statistics of every FFN of the block to the collector while it runs."""
    expert = 0
    with ExitStack() as stack:
        for ffn in layout.block_ffns(block):
            collect = partial(collector.add_channels, expert)
            stack.enter_context(ffn.observed(block, collect, fused))
            expert += ffn.group(block).experts
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
) -> Statistics:
    """One dense forward pass over each block, with statistics of its FFN and its influence.

    Memory beside the model: the hidden states of all windows once, one micro-batch.

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

    Raises:
        CfspError: a block gives NaN or infinite activations; names it and the window.
        Stopped: ``stop`` said so.
    """
    device = next(model.parameters()).device
    count, seqlen = windows.shape
    micro_batch = micro_batch or default_micro_batch(device, seqlen)
    blocks = layout.find_blocks(model)
    weights = weights or LiveBlocks(model, layout)
    fingerprint = weights.fingerprint()
    training = model.training
    model.eval()
    results = []
    try:
        calls = record_block_calls(model, blocks, windows, micro_batch)
        bar = tqdm(
            total=len(blocks) * windows.numel(),
            desc="calibrate",
            unit="tok",
            unit_scale=True,
            disable=not progress,
        )
        with bar, weights.turns() as turns:
            for number, block in turns:
                if stop():
                    raise Stopped
                bar.set_postfix_str(f"block {number + 1}/{len(blocks)}")
                batches = len(calls.arguments[number])
                collector = _BlockCollector(layout.groups(block), batches, device)

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
                results.append(collector.result(number, count, micro_batch))
    finally:
        model.train(training)
    _warn_of_idle_experts(results)
    return Statistics(
        tuple(results),
        fingerprint,
        {
            **(provenance or {}),
            "tokens_sha256": tokens_fingerprint(windows),
            "windows": count,
            "seqlen": seqlen,
            "micro_batch": micro_batch,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "versions": versions(device),
        },
    )
