"""One dense forward pass over the calibration tokens, with statistics of every block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
from .ranks import ALONE, Ranks
from .statistics import INFLUENCE_METRICS, BlockStatistics, Statistics
from .stream import default_micro_batch, forward_instead, record_block_calls, run_block


class _BlockCollector:
    """Adds up one block's statistics on its device, without waiting for it.

    The first rank adds as it goes. The others keep what each micro-batch gives, to be added after
    those of the ranks before them.
    """

    def __init__(
        self, channels: int, micro_batches: int, device: torch.device, ranks: Ranks
    ) -> None:
        self.ranks = ranks
        self.tokens = 0
        self.zeros = torch.zeros(2, channels, dtype=torch.float64, device=device)
        self.sums: list[torch.Tensor] = []
        """Each [2, F] fp64: sum and sum of squares."""
        self.influences = torch.zeros(
            micro_batches, len(INFLUENCE_METRICS), dtype=torch.float64, device=device
        )
        self.own_influences = self.influences[ranks.share(micro_batches)]

    def add_channels(self, part: ChannelStatistics) -> None:
        self.tokens += part.tokens
        if not self.sums or not self.ranks.first:
            self.sums.append(self.zeros.clone())
        self.sums[-1][0] += part.sum
        self.sums[-1][1] += part.sum_of_squares

    def add_states(self, index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        part = block_influence(before, after)
        for column, metric in enumerate(INFLUENCE_METRICS):
            self.own_influences[index, column] = getattr(part, metric)

    def result(self, number: int, windows: int, micro_batch: int) -> BlockStatistics:
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
        return BlockStatistics(
            ranks.total(self.tokens), windows, sums[0].clone(), sums[1].clone(), influences.sum(0)
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
    ranks: Ranks = ALONE,
) -> Statistics:
    """One dense forward pass over each block, with statistics of its FFN and its influence.

    Memory beside the model: the hidden states of this rank's windows once, one micro-batch; on
    ranks other than the first, [2, F] fp64 for each of their micro-batches.

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

    Raises:
        CfspError: a block gives NaN or infinite activations; names it and the window. Ranks with
            another model, text or version than the first.
        Stopped: ``stop`` said so, on any rank.
    """
    device = next(model.parameters()).device
    count, seqlen = windows.shape
    given = micro_batch
    micro_batch = ranks.of_first(lambda: given or default_micro_batch(device, seqlen))
    micro_batches = -(-count // micro_batch)
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
        with bar, needed as turns:
            for number, block in turns:
                if ranks.any(stop()):
                    raise Stopped
                shown.turn(number, weights.stored_bytes(number))
                channels = layout.projection(block, layout.down).in_features
                collector = _BlockCollector(channels, micro_batches, device, ranks)

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
        str(identity["model"]),
        {
            **(provenance or {}),
            "tokens_sha256": identity["calibration text"],
            "windows": count,
            "seqlen": seqlen,
            "micro_batch": micro_batch,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "versions": identity["machine or version"],
        },
    )
