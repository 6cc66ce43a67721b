"""Gram matrices of a block while it runs: summed on its device, then over all ranks, then written.

The micro-batches form 8 chunks of about the same size, whatever the number of ranks. The
activations of a chunk are kept until it is whole; then one call sums their products from zero, in
fp32, and adds them to those of the chunks before. A rank has whole chunks, so that 1, 2, 4 and 8
ranks make the same additions. A sum over n tokens errs by at most n 2^-23 of the sum of the
absolute products.
"""

import shutil
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from cfsp_kernels import channel_statistics, gram

from ..distributed import Ranks
from ..errors import CfspError
from ..io.files import format_bytes
from ..io.shard_writer import ShardWriter
from ..models.channels import ChannelGroup, Routing, expert_offsets
from .grams import (
    FIT,
    HELD_OUT,
    WITHOUT,
    GramFolder,
    StoredGram,
    TokensAndSum,
    gram_digest,
    held_out_windows,
    panels,
    parts_of,
    planned_file,
    tensor_name,
)

CHUNKS = 8
PENDING = 8
"""Tensors that wait to be written: panels, most of them."""


def check_ranks(ranks: int) -> None:
    """Raise CfspError for a number of ranks that chunks cannot be shared by."""
    if CHUNKS % ranks:
        raise CfspError(f"Gram matrices take 1, 2, 4 or 8 ranks, not {ranks}: {WITHOUT}")


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
        parts = [{split.chunk(i) for i in own if split.tokens(i)[part]} for part in (0, 1)]
        most = max(most, sum(min(len(p), 1 if rank == 0 else CHUNKS) for p in parts))
    return most


@dataclass(frozen=True)
class GramWriter:
    """Takes what the files of a calibration hold; a thread of the last rank writes it."""

    folder: GramFolder
    shards: ShardWriter
    behind: ThreadPoolExecutor
    writes: bool
    """Whether this is the last rank."""
    pending: deque[Future[None]] = field(default_factory=deque)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Have a tensor written, on the CPU and left alone from now on. Raises CfspError where this
        one or one before it found no space, or no permission."""
        if self.writes:
            self.wait(PENDING - 1)
            self.pending.append(self.behind.submit(self.shards.write, name, tensor))

    def wait(self, left: int = 0) -> None:
        """Until at most so many tensors wait to be written. Raises as :meth:`put` does."""
        while len(self.pending) > left:
            try:
                self.pending.popleft().result()
            except OSError as error:
                where = self.folder.path
                raise CfspError(f"cannot write Gram matrices: {where}: {error}") from None


@contextmanager
def gram_writer(
    folder: GramFolder, sizes: Sequence[Sequence[int]], windows: int, ranks: Ranks
) -> Iterator[GramWriter]:
    """What writes the Gram matrices of a calibration, whose blocks have FFNs and experts of these
    ``sizes``; at the end all are on the disk, for every rank. After an error, files that are not
    whole vanish. Raises CfspError where a rank does not see the folder, or the disk has no room."""
    check_ranks(ranks.size)
    files = [planned_file(folder.file(n), n, own, windows) for n, own in enumerate(sizes)]
    need, problem = sum(file.file_bytes for file in files), None
    if not folder.path.is_dir():
        problem = f"rank {ranks.rank} does not see the folder {folder.path}"
    elif need > (free := shutil.disk_usage(folder.path).free):
        problem = (
            f"Gram matrices take {format_bytes(need)} of disk, {folder.path} has "
            f"{format_bytes(free)} free: {WITHOUT}"
        )
    ranks.check(problem)
    if not held_out_windows(windows):
        warnings.warn(
            "a single calibration window leaves none to hold out: nothing will tell whether a "
            "compensation lowers the error",
            stacklevel=4,
        )
    with (
        ShardWriter(folder.path, files) as shards,
        ThreadPoolExecutor(1, thread_name_prefix="write-behind") as behind,
    ):
        writer = GramWriter(folder, shards, behind, ranks.last)
        yield writer
        writer.wait()
    ranks.barrier()


class _Sum:
    """One rank's share of one part of the Gram matrices of an FFN's E experts: on the first rank
    what was added up, on others each of their chunks."""

    def __init__(self, group: ChannelGroup, device: torch.device, ranks: Ranks) -> None:
        self.group, self.device, self.ranks = group, device, ranks
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

    def add(self, chunk: int, x: torch.Tensor, experts: torch.Tensor | None = None) -> None:
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
        count, size, device = self.group.experts, self.group.channels, self.device
        if not (self.ranks.first and self.products):
            self.products.append(torch.zeros(count, size, size, device=device))
            self.sums.append(torch.zeros(count, 2, size, dtype=torch.float64, device=device))
        product, total, x = self.products[-1], self.sums[-1], torch.cat(self.rows)
        if self.experts:
            experts, order = torch.cat(self.experts).sort(stable=True)
            x, offsets = x[order], expert_offsets(experts, count)
        else:
            offsets, product, total = None, product[0], total[0]
        gram(x, offsets=offsets, out=product)
        self.tokens += channel_statistics(x, offsets=offsets, totals=total).tokens
        self.rows.clear()
        self.experts.clear()

    def totals(self) -> list[TokensAndSum]:
        """Those of every expert over all ranks."""
        self.end_chunk()
        tokens = self.ranks.ordered_sum([self.tokens.cpu()], self.tokens)
        like = torch.zeros(self.group.experts, self.group.channels, dtype=torch.float64)
        sums = self.ranks.ordered_sum([total[:, 0].cpu() for total in self.sums], like)
        return list(zip(tokens.tolist(), sums, strict=True))

    def panel(self, expert: int, start: int, end: int) -> torch.Tensor:
        """Rows of the triangle of an expert over all ranks, on the last; see
        :meth:`cfsp.distributed.Ranks.running_sum`."""
        own = [product[expert, start:end, :end].cpu() for product in self.products]
        return self.ranks.running_sum(own, torch.empty(end - start, end))


class GramSums:
    """The Gram matrices of one block's FFNs and experts, over this rank's micro-batches."""

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        split: Split,
        device: torch.device,
        ranks: Ranks,
        writer: GramWriter,
    ) -> None:
        self.groups, self.split, self.writer = groups, split, writer
        self.first = ranks.share(split.micro_batches).start
        parts = parts_of(held_out_windows(split.windows))
        self.found = [{part: _Sum(group, device, ranks) for part in parts} for group in groups]

    def add(self, ffn: int, index: int, x: torch.Tensor, routing: Routing | None) -> None:
        """Add the activation [T, F] of an FFN, or of all its experts, in a micro-batch, which is
        kept until its chunk ends. ``index`` counts this rank's micro-batches."""
        index += self.first
        x, chunk, (fitted, held) = x.detach(), self.split.chunk(index), self.split.tokens(index)
        for part, start, end in ((FIT, 0, fitted), (HELD_OUT, fitted, fitted + held)):
            if start == end:
                continue
            own = self.found[ffn][part]
            if routing is None:
                own.add(chunk, x[start:end])
            else:
                of_nobody = self.groups[ffn].experts
                inside = (routing.tokens >= start) & (routing.tokens < end)
                own.add(chunk, x, routing.experts.clamp(max=of_nobody).where(inside, of_nobody))

    def write(self, block: int) -> tuple[StoredGram, ...]:
        """Sum over all ranks into the file of the block, which the last rank writes. Raises
        CfspError where it finds no space, or no permission."""
        put, written = self.writer.put, list[StoredGram]()
        for group, found in zip(self.groups, self.found, strict=True):
            totals = {part: own.totals() for part, own in found.items()}
            for expert in range(group.experts):
                number, size = len(written), group.channels
                sums = {part: of_part[expert] for part, of_part in totals.items()}
                for part, (tokens, total) in sums.items():
                    name = partial(tensor_name, block, number, part)
                    put(name("tokens"), torch.tensor([tokens]))
                    put(name("sum"), total)
                    for panel, start, end in panels(size):
                        put(name(panel), found[part].panel(expert, start, end))
                held = sums[HELD_OUT][0] if HELD_OUT in sums else 0
                digest = gram_digest({part: sums[part] for part in parts_of(held)})
                counts = sums[FIT][0], held
                written.append(StoredGram(self.writer.folder, block, number, size, counts, digest))
            found.clear()
        return tuple(written)
