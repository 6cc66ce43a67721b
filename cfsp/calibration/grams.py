"""Gram matrices of the block at work: x^T x of its FFNs, summed on its device, then over all ranks.

The micro-batches form 8 chunks of about the same size, whatever the number of ranks. The
activations of a chunk are kept until it is whole; then one call sums their products from zero, in
fp32, and adds them to those of the chunks before. A rank has whole chunks, so that 1, 2, 4 and 8
ranks make the same additions. A sum over n tokens errs by at most n 2^-23 of the sum of the
absolute products.

The last windows are held out: no Gram matrix has them. Of these the activations themselves are
kept while their block is at work, to judge what was fitted without them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from cfsp_kernels import channel_statistics, gram

from ..distributed import Ranks
from ..errors import CfspError
from ..models.parts.channels import Routing, Units, expert_offsets

CHUNKS = 8
PANEL = 1024
"""Rows of a Gram matrix that ranks exchange, or that are mirrored or centred, at a time."""
HELD_OUT_SHARE = 10
"""One window in so many is held out: a fit hardly misses a tenth of its tokens."""
MOST_HELD_OUT = 4
"""Windows held out at most: some thousands of tokens tell the error of an output to a few percent.
"""


def held_out_windows(windows: int) -> int:
    """How many of the calibration windows, the last, are held out; of a single one none."""
    return min(max(1, windows // HELD_OUT_SHARE), MOST_HELD_OUT) if windows > 1 else 0


def check_ranks(ranks: int) -> None:
    """Raise CfspError for a number of ranks that chunks cannot be shared by."""
    if CHUNKS % ranks:
        raise CfspError(
            f"Gram matrices take 1, 2, 4 or 8 ranks, not {ranks}: scorer cfsp, the published "
            "method, needs none"
        )


@dataclass(frozen=True)
class Split:
    """How the windows of a calibration are split into micro-batches, chunks and parts."""

    windows: int
    seqlen: int
    micro_batch: int
    """Windows per micro-batch."""

    @property
    def micro_batches(self) -> int:
        return -(-self.windows // self.micro_batch)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of the longest chunk."""
        chunks = Counter(map(self.chunk, range(self.micro_batches)))
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
        chunks = {split.chunk(index) for index in own if split.tokens(index)[0]}
        most = max(most, min(len(chunks), 1) if rank == 0 else len(chunks))
    return most


@dataclass(frozen=True)
class HeldOut:
    """The activation x [T, F] of one FFN or expert on the held-out tokens of all ranks."""

    rows: Mapping[int, torch.Tensor]
    """What this rank has of it, by micro-batch."""
    tokens: int
    """T, of all ranks."""
    micro_batches: int
    ranks: Ranks

    def squares(self, changes: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> list[float]:
        """|| x C^T - b ||^2 for each (C [D, F], b [D] or None) in the dtype of x; every rank asks
        for the same."""
        found = torch.zeros(self.micro_batches, len(changes), dtype=torch.float64)
        for index, x in self.rows.items():
            for number, (change, bias) in enumerate(changes):
                output = x @ change.T if bias is None else x @ change.T - bias
                found[index, number] = output.float().square().sum(dtype=torch.float64)
        return [float(total) for total in self.ranks.fill_(found).sum(0)]


@dataclass(frozen=True)
class Gram:
    """Second moments of the activation x [T, F] of one FFN or expert over the fitting tokens."""

    tokens: int
    """The number of tokens, T."""
    sum: torch.Tensor
    """[F] fp64, sum of x over tokens."""
    product: torch.Tensor
    """[F, F] fp32, x^T x, symmetric."""
    held_out: HeldOut | None = None
    """What a fit is judged by; None where no window is held out."""

    def moments(
        self,
        rows: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
        *,
        centred: bool = False,
    ) -> torch.Tensor:
        """[rows, columns] of x^T x / T in fp32, or of the covariance; None: all. Zero without
        tokens."""
        tokens = max(self.tokens, 1)
        if rows is None or columns is None:
            rows = columns = torch.arange(len(self.sum), device=self.sum.device)
        found = self.product[rows[:, None], columns].div_(tokens)
        if centred:
            mean = self.sum / tokens
            for own, part in zip(mean[rows].split(PANEL), found.split(PANEL), strict=True):
                part.copy_(part.double().addr_(own, mean[columns], alpha=-1))
        return found


def _panels(channels: int) -> Iterator[slice]:
    return (slice(start, min(start + PANEL, channels)) for start in range(0, channels, PANEL))


def mirror_(product: torch.Tensor) -> torch.Tensor:
    """Make a lower triangle [F, F] the whole symmetric matrix, in place."""
    for rows in _panels(len(product)):
        product[rows, rows.stop :] = product[rows.stop :, rows].T
        square = product[rows, rows]
        square.tril_()
        square += square.tril(-1).T
    return product


class _Sum:
    """One rank's share of the Gram matrices of an FFN's E experts: on the first rank what was added
    up, on others each of their chunks."""

    def __init__(self, units: Units, device: torch.device, ranks: Ranks) -> None:
        self.units, self.device, self.ranks = units, device, ranks
        self.chunk = -1
        self.rows: list[torch.Tensor] = []
        """[T, F] each, of the chunk at work."""
        self.whole = torch.empty(0)
        self.experts: list[torch.Tensor] = []
        """[T] each, the expert of every row, or E where it is of no interest here."""
        self.tokens = torch.zeros(units.experts, dtype=torch.int64, device=device)
        self.products: list[torch.Tensor] = []
        """[E, F, F] fp32 each."""
        self.sums: list[torch.Tensor] = []
        """[E, 2, F] fp64 each: sum, and sum of squares, which nobody asks for."""

    def add(self, chunk: int, x: torch.Tensor, experts: torch.Tensor | None = None) -> None:
        if chunk != self.chunk:
            self.end_chunk()
            self.chunk = chunk
        self.rows.append(x)
        if experts is not None:
            self.experts.append(experts)

    def _start_product(self) -> None:
        count, size, device = self.units.experts, self.units.size, self.device
        self.products.append(torch.zeros(count, size, size, dtype=torch.float32, device=device))
        self.sums.append(torch.zeros(count, 2, size, dtype=torch.float64, device=device))

    def end_chunk(self) -> None:
        """Add up what was kept."""
        if not self.rows:
            return
        if not (self.ranks.first and self.products):
            self._start_product()
        product, total, x = self.products[-1], self.sums[-1], self._in_one_piece()
        if self.experts:
            experts, order = torch.cat(self.experts).sort(stable=True)
            x, offsets = x[order], expert_offsets(experts, self.units.experts)
        else:
            offsets, product, total = None, product[0], total[0]
        gram(x, offsets=offsets, out=product)
        self.tokens += channel_statistics(x, offsets=offsets, totals=total).tokens
        self.rows.clear()
        self.experts.clear()

    def _in_one_piece(self) -> torch.Tensor:
        """The rows of the chunk, in memory that the next chunk takes again."""
        count = sum(map(len, self.rows))
        if count > len(self.whole):
            self.whole = self.rows[0].new_empty(count, self.units.size)
        return torch.cat(self.rows, out=self.whole[:count])

    def over_all_ranks(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Tokens, sum and product of every expert, on every rank."""
        self.end_chunk()
        self.whole = torch.empty(0)
        if not self.products:
            self._start_product()
            own, sums = [], []
        else:
            own, sums = self.products, [total[:, 0] for total in self.sums]
        tokens = self.ranks.ordered_sum([self.tokens], self.tokens)
        total = self.ranks.ordered_sum(sums, self.sums[0][:, 0])
        whole = self.products[0]
        for expert, product in enumerate(whole):
            for rows in _panels(self.units.size) if self.ranks.size > 1 else ():
                panel = product[rows, : rows.stop]
                parts = [chunk[expert, rows, : rows.stop] for chunk in own]
                panel.copy_(self.ranks.ordered_sum(parts, panel))
            yield int(tokens[expert]), total[expert], mirror_(product)


class GramSums:
    """The Gram matrices of one block's FFNs and experts, over this rank's micro-batches."""

    def __init__(
        self, units: Sequence[Units], split: Split, device: torch.device, ranks: Ranks
    ) -> None:
        self.units, self.split, self.ranks = units, split, ranks
        self.first = ranks.share(split.micro_batches).start
        self.sums = [_Sum(own, device, ranks) for own in units]
        self.held_out: list[list[dict[int, torch.Tensor]]] = [
            [{} for _ in range(own.experts)] for own in units
        ]
        """By FFN and expert, see :attr:`HeldOut.rows`."""

    def add(self, ffn: int, index: int, x: torch.Tensor, routing: Routing | None) -> None:
        """Add the activation [T, F] of an FFN, or of all its experts, in a micro-batch, which is
        kept until its chunk ends. ``index`` counts this rank's micro-batches."""
        index += self.first
        x, chunk, (fitted, held) = x.detach(), self.split.chunk(index), self.split.tokens(index)
        if routing is None:
            if fitted:
                self.sums[ffn].add(chunk, x[:fitted])
            if held:
                self.held_out[ffn][0][index] = x[fitted:].clone()
            return
        count, seen = self.units[ffn].experts, routing.tokens < fitted
        experts = routing.experts.clamp(max=count)
        if fitted:
            self.sums[ffn].add(chunk, x, experts.where(seen, count))
        if held:
            lengths = experts[~seen].bincount(minlength=count + 1).tolist()
            parts = x[~seen].split(lengths)[:count]
            for rows, part in zip(self.held_out[ffn], parts, strict=True):
                rows[index] = part

    def result(self) -> tuple[Gram, ...]:
        """Of every FFN and expert, over all ranks and on each of them."""
        found: list[Gram] = []
        for own, kept in zip(self.sums, self.held_out, strict=True):
            counts = torch.tensor([sum(map(len, rows.values())) for rows in kept])
            tokens = self.ranks.ordered_sum([counts], counts).tolist()
            for rows, held, sums in zip(kept, tokens, own.over_all_ranks(), strict=True):
                judge = HeldOut(rows, held, self.split.micro_batches, self.ranks)
                found.append(Gram(*sums, judge if held_out_windows(self.split.windows) else None))
        return tuple(found)
