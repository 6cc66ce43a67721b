"""What Gram matrices, fits and searches cost: FLOPs, memory and disk, from shapes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..calibration.gram_sums import PENDING, Split, products_held
from ..calibration.grams import PANEL, file_bytes, held_out_windows
from ..models.channels import ChannelGroup, sizes_of
from ..pruning.block_cache import MOST_KEPT
from ..pruning.least_squares import ROWS
from .flops import FP32, ModelCosts
from .workload import HOST, MICRO_BATCH, Load, Workload

FP64 = 8
FP64_SLOWER = {"cpu": 2.0, "cuda": 16.0}
"""How much faster a device multiplies in the dtype of a forward pass than in fp64, which it fits
in: a CPU fp32, an H100 bf16. GPUs that are not for data centres are slower yet, by ten times."""


@dataclass(frozen=True)
class GramCosts:
    """Gram matrices of a model, and what is made of them."""

    blocks: Sequence[Sequence[ChannelGroup]]
    """The FFNs of every block."""
    hidden_size: int
    active_experts: int
    """Experts that a token goes through."""
    sparsity: float
    fits: bool
    """Whether least squares are fitted."""
    scores: bool = False
    """Whether channels are scored by them, or error curves made."""
    residuals: bool = False
    """Whether the scores are what the other channels leave of each, and no curves are made."""

    @property
    def _sizes(self) -> list[tuple[int, int, int]]:
        """(experts, channels, kept channels) of every FFN."""
        groups = (group for block in self.blocks for group in block)
        return [(g.experts, g.channels, round(g.channels * (1 - self.sparsity))) for g in groups]

    @property
    def _widest(self) -> int:
        return max(channels for _, channels, _ in self._sizes)

    def loads(self, run: Workload) -> Iterator[Load]:
        """They are written once, by the calibration, and read once for scores and once for the cut.
        Each rank fits the blocks that its evaluation windows go through."""
        disk, slower = self.disk_bytes(run.windows or 2), FP64_SLOWER[run.device]
        if run.windows:
            # The sums take half of a whole product.
            products = (n**2 * min(experts, self.active_experts) for experts, n, _ in self._sizes)
            flops = run.windows * run.seqlen * float(sum(products))
            split = Split(run.windows, run.seqlen, run.micro_batch)
            parts = {"Gram matrices": self.sum_bytes(split, run.ranks, run.dense.itemsize)}
            yield Load("calibrate", 0, disk, disk, flops, flops * run.busiest_share, parts)
            # A panel of every term and of their sum, and those that wait to be written.
            panels = products_held(split, run.ranks) + 1 + PENDING
            held = panels * min(PANEL, self._widest) * self._widest * FP32
            yield Load(HOST, parts={"Gram matrices, written": held})
        if self.scores:
            flops, parts = self.rank_flops(), {**run.model_parts(), "ranking": self.rank_bytes()}
            yield Load("score", disk, 0, disk, flops, flops * slower, parts)
        if self.fits:
            flops, parts = self.fit_flops(), {"least squares": self.fit_bytes()}
            ranks = run.ranks if run.evaluation_windows else min(2, run.ranks)
            yield Load("prune", disk, 0, disk, flops * ranks, flops * slower, parts)

    def disk_bytes(self, windows: int) -> int:
        """Bytes of all blocks' files, which each hold as many parts as ``windows`` have."""
        return sum(file_bytes(tuple(sizes_of(block)), windows) for block in self.blocks)

    def sum_bytes(self, split: Split, ranks: int, itemsize: int) -> int:
        """On the busiest rank's device while a block is at work: its products, and the activations
        of a chunk, kept and in one piece, those of experts once more to be sorted."""
        products = max(sum(g.experts * g.channels**2 for g in block) for block in self.blocks)
        rows = max(
            (2 if experts == 1 else 3) * channels * min(experts, self.active_experts)
            for experts, channels, _ in self._sizes
        )
        return products_held(split, ranks) * products * FP32 + split.chunk_tokens * itemsize * rows

    def rank_flops(self) -> float:
        """fp64 FLOPs of an inverse; or, at most, of removing all channels greedily and of an error
        curve: other scorers with curves leave the removal out."""
        if not self.scores:
            return 0.0
        cubes, squares = (1.0, 0.0) if self.residuals else (13 / 3, 3.0 * self.hidden_size)
        return sum(experts * (cubes * n**3 + squares * n**2) for experts, n, _ in self._sizes)

    def rank_bytes(self) -> int:
        """On the device while the channels of one FFN are scored, as in cfsp/pruning/obs.py."""
        widest = self._widest
        if self.residuals:
            return widest**2 * (FP32 + 2 * FP64)
        return widest**2 * (FP32 + 4 * FP64) + 2 * FP64 * self.hidden_size * widest

    def fit_flops(self) -> float:
        """fp64 FLOPs of fitting every FFN and of judging it."""
        total, d = 0.0, self.hidden_size
        for experts, every, kept in self._sizes:
            solving = 2.0 * d * (every - kept) * kept + kept**3 / 3 + 2.0 * d * kept**2
            judging = 2.0 * d * every**2 + 4.0 * d * kept**2
            total += experts * (solving + judging)
        return total

    def fit_bytes(self) -> int:
        """On the device while one FFN is fitted: its Gram matrix, the factor twice, the products
        with removed channels, rows of the projection on their way, the new projection in fp32."""
        found = []
        for _, every, kept in self._sizes:
            removed, rows = every - kept, min(ROWS, self.hidden_size)
            fp64 = 2 * kept**2 + removed * kept + rows * (every + removed + 5 * kept)
            found.append(FP32 * (every**2 + self.hidden_size * kept) + FP64 * fp64)
        return max(found)


@dataclass(frozen=True)
class SearchCosts:
    """A search for widths, on a model in memory."""

    candidates: int
    """Pruned models that are measured, each on all ``windows``."""
    windows: int
    fits: GramCosts | None
    """What candidates are fitted with."""

    def loads(self, run: Workload) -> Iterator[Load]:
        """The candidates' forward passes; the cuts of all FFNs once and of those that exchange
        channels, each with another, twice a candidate on average."""
        if run.pruned is None:
            return
        flops = self.candidates * self.windows * run.seqlen * run.pruned.flops(run.seqlen)
        read, busiest = 0, flops
        parts = {
            **run.model_parts(),
            "cut FFNs": run.dense.ffn_bytes + run.pruned.largest_block,
            MICRO_BATCH: max(run.working(), run.logits()),
        }
        if self.fits is not None:
            cuts = 1 + (self.candidates - 1) * 4 / len(run.dense.blocks)
            read = round(cuts * self.fits.disk_bytes(run.windows or 2))
            fitting = cuts * self.fits.fit_flops()
            flops, busiest = flops + fitting, busiest + fitting * FP64_SLOWER[run.device]
            parts["least squares"] = self.fits.fit_bytes()
        yield Load("search", read, 0, read, flops, busiest, parts)


@dataclass(frozen=True)
class RefitCosts:
    """Calibration windows that go through the dense and the pruned blocks once more."""

    dense: ModelCosts
    pruned: ModelCosts
    windows: int
    seqlen: int
    epochs: int
    """Epochs of Adam; 0: none."""
    sequential: bool

    def loads(self, run: Workload) -> Iterator[Load]:
        """All on one rank, in the pass that cuts."""
        # Hidden states of all windows, dense and pruned, and what is kept of them in a block.
        values = (2 + MOST_KEPT) * self.windows * self.seqlen * self.dense.hidden_size
        parts = {
            "hidden states": values * self.dense.itemsize,
            MICRO_BATCH: run.working(),
            "blocks fitted again": self._fit_bytes(),
        }
        flops = self.flops()
        yield Load("prune", flops=flops, busiest=flops, parts=parts)

    def flops(self) -> float:
        """FLOPs of all blocks.

        What is before the FFN of a pruned block runs once for each window; the FFN alone to fit it
        and to judge that, and twice for what is to be kept of a window. Backwards there are
        gradients of the FFN's matrices and of the input of the last of them; nothing goes further.
        """
        ffn = backwards = 0.0
        for block in self.pruned.blocks:
            own = [block.matrix_flops[name] for name in block.ffn]
            ffn += sum(own)
            backwards += sum(own) + min(own)
        judged = held_out_windows(self.windows)
        fitted = self.windows - judged
        blocks = self.dense.block_flops(self.seqlen) + self.pruned.block_flops(self.seqlen)
        total = self.windows * blocks + 2 * ffn
        if self.sequential:
            total += (fitted + 2 * judged) * ffn + fitted * self._normal_equations()
        if self.epochs:
            total += self.epochs * fitted * (ffn + backwards)
            total += (self.epochs + (not self.sequential)) * judged * ffn
        return total * self.seqlen

    def _normal_equations(self) -> float:
        """FLOPs per token of the closed form: z^T z, half of it, and R^T z."""
        d = self.dense.hidden_size
        numels = (min(x.numel for x in block.ffn.values()) for block in self.pruned.blocks)
        return sum(width * (width + 2.0 * d) for width in (numel // d for numel in numels))

    def _fit_bytes(self) -> int:
        """The weights of one block in fp32, their gradient and two moments, and as the block
        computes with them; what a window leaves for the way back."""
        if not self.epochs:
            return 0
        values = max(sum(x.numel for x in block.ffn.values()) for block in self.pruned.blocks)
        left = 3 * self.pruned.working_bytes(1, self.seqlen, "cpu")
        return values * (4 * FP32 + self.dense.itemsize) + left
