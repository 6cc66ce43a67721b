"""Gram matrices of a block while it runs: summed on its device, then over all ranks.

fp32 products are added up in fp32. A sum over n tokens errs by at most (m + n / m) 2^-23 of the
sum of the absolute products, where m is the number of tokens in a micro-batch: those of one
micro-batch are added up by the kernel, then the micro-batches one to another.

The micro-batches form 8 chunks of about the same size, whatever the number of ranks. Each is
summed from zero, and the chunks are added in order. A rank has whole chunks, so that 1, 2, 4 and 8
ranks make the same additions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cfsp_kernels import ChannelStatistics, channel_statistics, gram

from .errors import CfspError
from .gram_writing import GramWriter
from .grams import (
    FIT,
    HELD_OUT,
    WITHOUT,
    StoredGram,
    gram_digest,
    held_out_windows,
    panel_name,
    panels,
    parts_of,
    tensor_name,
)
from .ranks import Ranks

CHUNKS = 8


def check_ranks(ranks: int) -> None:
    """Raise CfspError for a number of ranks that chunks cannot be shared by."""
    if CHUNKS % ranks:
        raise CfspError(f"Gram matrices take 1, 2, 4 or 8 ranks, not {ranks}: {WITHOUT}")


@dataclass(frozen=True)
class Split:
    """Which tokens of a micro-batch are fitted on, and in which chunk they are."""

    windows: int
    seqlen: int
    micro_batch: int
    """Windows per micro-batch."""

    @property
    def micro_batches(self) -> int:
        """How many there are."""
        return -(-self.windows // self.micro_batch)

    def tokens(self, index: int) -> tuple[int, int]:
        """(fitted on, held out) of micro-batch ``index``, in this order in it."""
        start = index * self.micro_batch
        end = min(start + self.micro_batch, self.windows)
        border = min(max(self.windows - held_out_windows(self.windows), start), end)
        return (border - start) * self.seqlen, (end - border) * self.seqlen

    def chunk(self, index: int) -> int:
        """The chunk that micro-batch ``index`` is in."""
        return index * CHUNKS // self.micro_batches


def products_held(split: Split, ranks: int) -> int:
    """[F, F] products that the rank with the most of them holds when a block ends."""
    most = 0
    for rank in range(ranks):
        own = range(split.micro_batches)[Ranks(rank, ranks).share(split.micro_batches)]
        parts = [{split.chunk(i) for i in own if split.tokens(i)[part]} for part in (0, 1)]
        most = max(most, sum(min(len(p), 2 if rank == 0 else CHUNKS) for p in parts))
    return most


class _Sum:
    """One rank's share of one Gram matrix: on the first rank what was added up and the chunk at
    work; on others each of their chunks."""

    def __init__(self, channels: int, device: torch.device, folds: bool) -> None:
        self.channels = channels
        self.device = device
        self.folds = folds
        self.chunk = -1
        self.tokens = 0
        self.products: list[torch.Tensor] = []
        self.sums: list[torch.Tensor] = []

    def add(self, chunk: int, x: torch.Tensor, total: torch.Tensor) -> None:
        if chunk != self.chunk:
            self.chunk = chunk
            self._begin_chunk()
        gram(x, out=self.products[-1])
        self.sums[-1] += total
        self.tokens += len(x)

    def _begin_chunk(self) -> None:
        if self.folds and len(self.products) == 2:
            for parts in (self.products, self.sums):
                parts[0] += parts[1]
                parts[1].zero_()
            return
        size, device = self.channels, self.device
        self.products.append(torch.zeros(size, size, device=device))
        self.sums.append(torch.zeros(size, dtype=torch.float64, device=device))


class GramSums:
    """The Gram matrices of one block's FFNs and experts, over this rank's micro-batches."""

    def __init__(
        self, sizes: Sequence[int], split: Split, first: int, device: torch.device, ranks: Ranks
    ) -> None:
        """``sizes``: channels of each; ``first``: number of this rank's first micro-batch."""
        self.sizes = sizes
        self.split = split
        self.first = first
        self.ranks = ranks
        self.parts = parts_of(split.windows)
        self.found = [
            {part: _Sum(size, device, ranks.first) for part in self.parts} for size in sizes
        ]

    def add(
        self,
        ffn: int,
        index: int,
        statistics: ChannelStatistics,
        x: torch.Tensor,
        tokens: torch.Tensor | None,
    ) -> None:
        """Add the activation of an FFN in this rank's micro-batch ``index``.

        Args:
            ffn: counts the FFNs and experts of the block.
            index: counts this rank's micro-batches.
            statistics: of ``x``.
            x: [..., F].
            tokens: positions of its rows among the micro-batch's tokens; None: all of them.
        """
        rows, index = x.detach().flatten(0, -2), self.first + index
        fitted, held = self.split.tokens(index)
        chunk, found = self.split.chunk(index), self.found[ffn]
        if not (fitted and held):
            found[FIT if fitted else HELD_OUT].add(chunk, rows, statistics.sum)
            return
        inside = torch.arange(len(rows), device=rows.device) if tokens is None else tokens
        for part, here in ((FIT, inside < fitted), (HELD_OUT, inside >= fitted)):
            own = rows[here]
            if len(own):
                found[part].add(chunk, own, channel_statistics(own).sum)

    def write(self, writer: GramWriter, block: int) -> tuple[StoredGram, ...]:
        """Sum over all ranks into the file of the block, which the last rank writes.

        Raises:
            CfspError: no space, or no permission.
        """
        return tuple(self._write_ffn(writer, block, ffn) for ffn in range(len(self.sizes)))

    def _write_ffn(self, writer: GramWriter, block: int, ffn: int) -> StoredGram:
        size, ranks = self.sizes[ffn], self.ranks
        known: dict[str, tuple[int, torch.Tensor]] = {}
        for part, own in self.found[ffn].items():
            tokens = ranks.total(own.tokens)
            like = torch.zeros(size, dtype=torch.float64)
            total = ranks.ordered_sum([x.cpu() for x in own.sums], like)
            known[part] = tokens, total
            writer.put(tensor_name(block, ffn, part, "tokens"), torch.tensor([tokens]))
            writer.put(tensor_name(block, ffn, part, "sum"), total)
            for start, end in panels(size):
                panel = ranks.running_sum(
                    [product[start:end, :end].cpu() for product in own.products],
                    torch.empty(end - start, end),
                )
                writer.put(panel_name(block, ffn, part, start), panel)
            own.products.clear()
        held = known[HELD_OUT][0] if HELD_OUT in known else 0
        kept = {part: sums for part, sums in known.items() if part == FIT or held}
        digest = gram_digest(kept)
        return StoredGram(writer.folder, block, ffn, size, (known[FIT][0], held), digest)
