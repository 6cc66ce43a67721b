"""One dense forward pass over the calibration tokens, with statistics of every block."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from cfsp_kernels import block_influence

from ..distributed import ALONE, Ranks
from ..errors import CfspError, Stopped
from ..models.blocks import Blocks, LiveBlocks
from ..models.blockwise import default_micro_batch, record_block_calls, run_block
from ..models.fingerprints import tokens_fingerprint, versions
from ..models.layouts import Layout
from ..models.loading import model_device
from ..models.parts.channels import Routing, Units, sizes_of
from .grams import GramSums, Split, check_ranks
from .statistics import INFLUENCE_METRICS, BlockStatistics, Statistics


class BlockProgress:
    """Keeps a bar's postfix at the block that has its turn and the speed of reading so far."""

    def __init__(self, bar: tqdm, blocks: int) -> None:
        self.bar, self.blocks, self.bytes_read = bar, blocks, 0

    def turn(self, number: int, stored_bytes: int) -> None:
        """A block's turn has come, whose reading took ``stored_bytes`` from disk."""
        self.bytes_read += stored_bytes
        elapsed, shown = self.bar.format_dict["elapsed"], f"block {number + 1}/{self.blocks}"
        if elapsed and (speed := self.bytes_read / elapsed / 1e9) >= 0.01:
            shown += f", {speed:.2f} GB/s read"
        self.bar.set_postfix_str(shown)


class _BlockCollector:
    """Adds up one block's statistics on its device, without waiting for it.

    The first rank adds as it goes. The others keep what each micro-batch gives, to be added after
    those of the ranks before them.
    """

    def __init__(
        self,
        units: tuple[Units, ...],
        split: Split,
        ranks: Ranks,
        device: torch.device,
        gram: bool,
        advance: Callable[[int], object],
    ) -> None:
        self.units, self.split, self.ranks = units, split, ranks
        self.advance = advance
        sizes, outputs = sizes_of(units), [2 * own.experts for own in units if own.experts > 1]
        self.columns = [*(own.total for own in units), *outputs]
        self.zeros = torch.zeros(2, sum(self.columns), dtype=torch.float64, device=device)
        self.sums: dict[int, torch.Tensor] = defaultdict(self.zeros.clone)
        """[2, F] fp64 of each micro-batch, on the first rank of all: sum and sum of squares, at the
        end those of the outputs of experts."""
        self.tokens = torch.zeros(len(sizes), dtype=torch.int64, device=device)
        """Tokens so far of each FFN, and of each expert of those that have some."""
        self.influences = torch.zeros(
            split.micro_batches, len(INFLUENCE_METRICS), dtype=torch.float64, device=device
        )
        self.own_influences = self.influences[ranks.share(split.micro_batches)]
        self.seen = 0
        """Micro-batches that are through."""
        self.grams = GramSums(units, split, device, ranks) if gram else None

    def observers(self) -> "list[_Observer]":
        """What each FFN hands its activation to."""
        tokens = self.tokens.split([own.experts for own in self.units])
        return [_Observer(self, ffn, own) for ffn, own in enumerate(tokens)]

    def totals(self) -> Sequence[torch.Tensor]:
        """[2, F of the FFN], the sums that the running micro-batch adds to, then [2, 2 * E] of the
        experts."""
        sums = self.sums[0 if self.ranks.first else self.seen]
        return sums.split(self.columns, dim=1)

    def add_states(self, index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """A micro-batch is through, with these hidden states [b, S, D] around the block."""
        self.seen += 1
        block_influence(before, after, out=self.own_influences[index])
        self.advance(before.shape[:-1].numel())

    def result(self, number: int) -> BlockStatistics:
        """The statistics of block ``number`` over all ranks."""
        split, ranks = self.split, self.ranks
        influences = ranks.fill_(self.influences.cpu())
        if len(broken := (~influences.isfinite().all(1)).nonzero()):
            first = int(broken[0]) * split.micro_batch
            last = min(first + split.micro_batch, split.windows) - 1
            where = f"window {first}" if first == last else f"windows {first} to {last}"
            raise CfspError(
                f"block {number} gave NaN or infinite activations in calibration {where}: "
                "check the weights of this block, or use another dtype"
            )
        every = ranks.ordered_sum(list(self.sums.values()), self.zeros).cpu()
        sums, outputs = every.tensor_split([sum(own.total for own in self.units)], dim=1)
        tokens = ranks.ordered_sum([self.tokens], self.tokens)
        if self.units and not tokens.any():
            raise CfspError(f"block {number} ran without its FFN: it is not called as a module")
        return BlockStatistics(
            tokens=split.windows * split.seqlen,
            windows=split.windows,
            sum=sums[0].clone(),
            sum_of_squares=sums[1].clone(),
            influence=influences.sum(0),
            expert_energy=outputs[1, ::2].clone(),
            expert_gated=outputs[0, 1::2].clone(),
            units=self.units,
            expert_tokens=tuple(tokens.tolist()),
            grams=self.grams.result() if self.grams is not None else (),
        )


@dataclass(frozen=True)
class _Observer:
    """The :class:`cfsp.models.parts.channels.Observer` of one part, or of all its experts."""

    block: _BlockCollector
    ffn: int
    tokens: torch.Tensor
    """[E] int64, those of every expert so far."""

    def totals(self) -> torch.Tensor:
        return self.block.totals()[self.ffn]

    def outputs(self) -> torch.Tensor:
        units = self.block.units
        before = sum(own.experts > 1 for own in units[: self.ffn])
        return self.block.totals()[len(units) + before]

    def add(self, x: torch.Tensor, routing: Routing | None = None) -> None:
        rows = x.flatten(0, -2)
        self.tokens.add_(len(rows) if routing is None else routing.offsets.diff())
        if self.block.grams is not None:
            self.block.grams.add(self.ffn, self.block.seen, rows, routing)


class DensePass:
    """Calibration windows, [N, S] int64, on their way through the dense blocks of a causal LM.

    Memory beside the model: the hidden states of this rank's windows once, one micro-batch; on
    ranks other than the first, [2, F] fp64 for each of their micro-batches. With Gram matrices,
    for the block at work, [F, F] fp32 once, on ranks other than the first as often as each has
    eighths of the windows; the activations of an eighth, twice, and of the held-out windows.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        windows: torch.Tensor,
        *,
        micro_batch: int | None = None,
        gram: bool = False,
        fused: bool = True,
        ranks: Ranks = ALONE,
    ) -> None:
        """``fused`` takes the fused SwiGLU statistics where the FFN allows it: the same numbers.
        Raises CfspError for a number of ranks that cannot share Gram matrices."""
        if gram:
            check_ranks(ranks.size)
        self.layout, self.blocks = layout, layout.find_blocks(model)
        self.windows, self.gram, self.fused, self.ranks = windows, gram, fused, ranks
        self.device = model_device(model)
        count, seqlen = windows.shape
        size = ranks.of_first(lambda: micro_batch or default_micro_batch(self.device, seqlen))
        self.split = Split(count, seqlen, size)
        own = ranks.share(self.split.micro_batches)
        self.own_windows = windows[own.start * size : own.stop * size]
        self.calls = record_block_calls(model, self.blocks, self.own_windows, size)

    def run(self, number: int, advance: Callable[[int], object] = bool) -> BlockStatistics:
        """Take all windows through a block; its statistics over all ranks, on each of them.
        ``advance`` is told the tokens of every call. Raises CfspError for NaN or infinity."""
        block, parts = self.blocks[number], self.layout.block_parts(self.blocks[number])
        units = tuple(part.units(block) for part in parts)
        collector = _BlockCollector(units, self.split, self.ranks, self.device, self.gram, advance)
        with ExitStack() as observed:
            for part, observer in zip(parts, collector.observers(), strict=True):
                observed.enter_context(part.observed(block, observer, self.fused))
            run_block(block, number, self.calls, collector.add_states)
        return collector.result(number)


def warn_of_idle_experts(blocks: Sequence[BlockStatistics]) -> None:
    """Warn where experts saw no token."""
    idle = [number for number, found in enumerate(blocks) for n in found.expert_tokens if n == 0]
    if idle:
        warnings.warn(
            f"{len(idle)} experts, the first in block {idle[0]}, saw no calibration token: nothing "
            "tells their channels apart; calibrate on more, or other, text",
            stacklevel=2,
        )


Visit = Callable[[int, nn.Module, BlockStatistics], object]


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
    gram: bool = False,
    visit: Visit = lambda *_: None,
) -> Statistics:
    """One dense forward pass over each block of a causal LM, left as it was found, with statistics
    of its FFNs and its influence on [N, S] int64 ``windows``; the same on every rank.

    ``visit`` is handed every block, while it has weights, with its statistics: those with Gram
    matrices where asked for, which none of the result has. Raises Stopped where ``stop``, asked
    before each block, says so on any rank; CfspError for NaN or infinite activations, and for ranks
    with another model, text or version than the first. Memory: see :class:`DensePass`.
    """
    blocks = layout.find_blocks(model)
    weights = weights or LiveBlocks(model, layout)
    identity = {
        "model": weights.fingerprint(),
        "calibration text": tokens_fingerprint(windows),
        "machine or version": versions(model_device(model)),
    }
    ranks.check_same(identity)
    training = model.training
    model.eval()
    results = []
    try:
        options: dict[str, Any] = {"micro_batch": micro_batch, "gram": gram, "fused": fused}
        dense = DensePass(model, layout, windows, ranks=ranks, **options)
        own_windows = dense.own_windows
        total = len(blocks) * own_windows.numel()
        bar = tqdm(total=total, desc="calibrate", unit="tok", unit_scale=True, disable=not progress)
        # a rank without windows needs no weights, but takes part in every sum
        needed = weights.turns() if len(own_windows) else nullcontext(enumerate(blocks))
        shown = BlockProgress(bar, len(blocks))
        with bar, needed as turns:
            for number, block in turns:
                if ranks.any(stop()):
                    raise Stopped
                shown.turn(number, weights.stored_bytes(number))
                found = dense.run(number, bar.update)
                visit(number, block, found)
                results.append(replace(found, grams=()))
    finally:
        model.train(training)
    return Statistics(
        tuple(results),
        str(identity["model"]),
        {
            **(provenance or {}),
            "tokens_sha256": identity["calibration text"],
            "windows": len(windows),
            "seqlen": windows.shape[1],
            "micro_batch": dense.split.micro_batch,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "versions": identity["machine or version"],
        },
    )
