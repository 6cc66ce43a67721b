"""One dense forward pass over the calibration tokens, with statistics of every block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from cfsp_kernels import ChannelStatistics, block_influence, channel_statistics, swiglu_statistics

from .blocks import Blocks, LiveBlocks
from .errors import CfspError, Stopped
from .layouts import Layout
from .progress import BlockProgress
from .provenance import tokens_fingerprint, versions
from .statistics import INFLUENCE_METRICS, BlockStatistics, Statistics
from .stream import default_micro_batch, forward_instead, record_block_calls, run_block


class _BlockCollector:
    """Adds up one block's statistics on its device, without waiting for it."""

    def __init__(self, channels: int, micro_batches: int, device: torch.device) -> None:
        self.tokens = 0
        self.sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.sum_of_squares = torch.zeros_like(self.sum)
        self.influences = torch.zeros(
            micro_batches, len(INFLUENCE_METRICS), dtype=torch.float64, device=device
        )

    def add_channels(self, part: ChannelStatistics) -> None:
        self.tokens += part.tokens
        self.sum += part.sum
        self.sum_of_squares += part.sum_of_squares

    def add_states(self, index: int, before: torch.Tensor, after: torch.Tensor) -> None:
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
        return BlockStatistics(
            self.tokens, windows, self.sum.cpu(), self.sum_of_squares.cpu(), influences.sum(0)
        )


@contextmanager
def _observed(
    block: nn.Module, layout: Layout, collector: _BlockCollector, fused: bool
) -> Iterator[None]:
    """Hand the statistics of the block's FFN activation to the collector while it runs.

    A gated FFN computes down(act(gate(x)) * up(x)). Where its activation is one that the fused op
    knows, the product and its statistics are made in one pass; elsewhere the input of down is
    read once more. Both round where the model does and give the same numbers.
    """
    activation = layout.gated_activation(block) if fused else None
    down = layout.projection(block, layout.down)
    if activation is None:
        hook = down.register_forward_pre_hook(
            lambda module, args: collector.add_channels(channel_statistics(args[0]))
        )
        try:
            yield
        finally:
            hook.remove()
        return
    gate, up = layout.projection(block, layout.gate), layout.projection(block, layout.up)

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        product, part = swiglu_statistics(gate(hidden_states), up(hidden_states), activation)
        collector.add_channels(part)
        return down(product)

    with forward_instead([layout.ffn(block)], [forward]):
        yield


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
        shown = BlockProgress(bar, len(blocks))
        with bar, weights.turns() as turns:
            for number, block in turns:
                if stop():
                    raise Stopped
                shown.turn(number, weights.stored_bytes(number))
                channels = layout.projection(block, layout.down).in_features
                collector = _BlockCollector(channels, len(calls.arguments[number]), device)

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
