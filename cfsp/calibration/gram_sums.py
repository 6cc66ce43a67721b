"""Gram matrices of a block while it runs: summed on its device, then over all ranks.

The micro-batches form 8 chunks of about the same size, whatever the number of ranks. The
activations of a chunk are kept until it is whole; then one call sums their products from zero, in
fp32, and adds them to those of the chunks before. A rank has whole chunks, so that 1, 2, 4 and 8
ranks make the same additions. A sum over n tokens errs by at most n 2^-23 of the sum of the
absolute products.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cfsp_kernels import channel_statistics, gram

from ..distributed import Ranks
from ..errors import CfspError
from ..models.channels import ChannelGroup, Routing
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

    @property
    def chunk_tokens(self) -> int:
        """Of the longest chunk."""
        chunks = Counter(self.chunk(index) for index in range(self.micro_batches))
        return min(max(chunks.values()) * self.micro_batch, self.windows) * self.seqlen

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
        most = max(most, sum(min(len(p), 1 if rank == 0 else CHUNKS) for p in parts))
    return most


class _Sum:
    """One rank's share of one part of the Gram matrices of an FFN's E experts: on the first rank
    what was added up, on others each of their chunks."""

    def __init__(self, group: ChannelGroup, device: torch.device, adds: bool) -> None:
        """``adds``: the first rank."""
        self.group = group
        self.device = device
        self.adds = adds
        self.chunk = -1
        self.rows: list[torch.Tensor] = []
        """[T, F] each, of the chunk at work."""
        self.experts: list[torch.Tensor] = []
        """[T] each, the expert of every row, or E where it is of no interest here."""
        self.tokens = torch.zeros(group.experts, dtype=torch.int64, device=device)
        self.products: list[torch.Tensor] = []
        """[E, F, F] fp32 each."""
        self.sums: list[torch.Tensor] = []
        """[E, 2, F] fp64 each: sum, and sum of squares, which nobody asks for."""

    def add(self, chunk: int, x: torch.Tensor, experts: torch.Tensor | None) -> None:
        if chunk != self.chunk:
            self.end_chunk()
            self.chunk = chunk
        self.rows.append(x)
        if experts is not None:
            self.experts.append(experts)

    def end_chunk(self) -> None:
        """Add up what was kept."""
        if not self.rows:
            return
        count, size = self.group.experts, self.group.channels
        if not (self.adds and self.products):
            shape = (count, size, size)
            self.products.append(torch.zeros(shape, dtype=torch.float32, device=self.device))
            self.sums.append(torch.zeros(count, 2, size, dtype=torch.float64, device=self.device))
        product, total, x = self.products[-1], self.sums[-1], torch.cat(self.rows)
        if self.experts:
            experts, order = torch.cat(self.experts).sort(stable=True)
            x = x[order]
            bounds = torch.arange(count + 1, device=self.device)
            offsets = torch.searchsorted(experts, bounds, out_int32=True)
            gram(x, offsets=offsets, out=product)
            self.tokens += channel_statistics(x, offsets=offsets, totals=total).tokens
        else:
            gram(x, out=product[0])
            self.tokens += channel_statistics(x, totals=total[0]).tokens
        self.rows.clear()
        self.experts.clear()


class GramSums:
    """The Gram matrices of one block's FFNs and experts, over this rank's micro-batches."""

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        split: Split,
        first: int,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        """``first``: number of this rank's first micro-batch."""
        self.groups = groups
        self.split = split
        self.first = first
        self.ranks = ranks
        self.found = [
            {part: _Sum(group, device, ranks.first) for part in parts_of(split.windows)}
            for group in groups
        ]

    def add(self, ffn: int, index: int, x: torch.Tensor, routing: Routing | None) -> None:
        """Add the activation of an FFN, or of all its experts, in a micro-batch.

        Args:
            ffn: counts the FFNs of the block.
            index: counts this rank's micro-batches.
            x: [T, F], kept until its chunk ends.
            routing: whose the rows are, of experts.
        """
        index += self.first
        fitted, held = self.split.tokens(index)
        chunk, found = self.split.chunk(index), self.found[ffn]
        for part, here in ((FIT, slice(0, fitted)), (HELD_OUT, slice(fitted, fitted + held))):
            if here.start == here.stop:
                continue
            if routing is None:
                found[part].add(chunk, x.detach()[here], None)
                continue
            inside = (routing.tokens >= here.start) & (routing.tokens < here.stop)
            of_nobody = self.groups[ffn].experts
            experts = routing.experts.clamp(max=of_nobody).where(inside, of_nobody)
            found[part].add(chunk, x.detach(), experts)

    def write(self, writer: GramWriter, block: int) -> tuple[StoredGram, ...]:
        """Sum over all ranks into the file of the block, which the last rank writes.

        Raises:
            CfspError: no space, or no permission.
        """
        places = [(ffn, e) for ffn, group in enumerate(self.groups) for e in range(group.experts)]
        written = []
        for number, (ffn, expert) in enumerate(places):
            written.append(self._write(writer, block, number, ffn, expert))
            if expert == self.groups[ffn].experts - 1:
                self.found[ffn].clear()
        return tuple(written)

    def _write(
        self, writer: GramWriter, block: int, number: int, ffn: int, expert: int
    ) -> StoredGram:
        """``number`` counts the FFNs and experts of the block, ``expert`` those of one FFN."""
        size, ranks = self.groups[ffn].channels, self.ranks
        known: dict[str, tuple[int, torch.Tensor]] = {}
        for part, own in self.found[ffn].items():
            own.end_chunk()
            tokens = ranks.total(int(own.tokens[expert]))
            like = torch.zeros(size, dtype=torch.float64)
            total = ranks.ordered_sum([x[expert, 0].cpu() for x in own.sums], like)
            known[part] = tokens, total
            writer.put(tensor_name(block, number, part, "tokens"), torch.tensor([tokens]))
            writer.put(tensor_name(block, number, part, "sum"), total)
            for start, end in panels(size):
                panel = ranks.running_sum(
                    [product[expert, start:end, :end].cpu() for product in own.products],
                    torch.empty(end - start, end),
                )
                writer.put(panel_name(block, number, part, start), panel)
        held = known[HELD_OUT][0] if HELD_OUT in known else 0
        kept = {part: sums for part, sums in known.items() if part == FIT or held}
        digest = gram_digest(kept)
        return StoredGram(writer.folder, block, number, size, (known[FIT][0], held), digest)
