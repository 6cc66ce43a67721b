"""What Gram matrices, fits and searches cost: FLOPs and memory, from shapes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..calibration.grams import Split, held_out_windows, products_held
from ..models.parts.channels import Units
from ..pruning.block_cache import MOST_KEPT
from ..pruning.least_squares import ROWS
from .attention import FP32
from .flops import ModelCosts
from .workload import CHUNK, MICRO_BATCH, RANKING, REFITTING, SOLVING, Load, Workload

FP64 = 8


def solving_flops(hidden: int, width: int) -> float:
    """fp32 FLOPs of :func:`cfsp.pruning.least_squares.solve_damped`."""
    return width**3 / 3 + 2.0 * hidden * width**2


def solving_bytes(hidden: int, width: int) -> int:
    """What it holds: the matrix, its factor, the right side, the solution, rows of that twice."""
    return 2 * FP32 * width * (width + hidden + min(ROWS, hidden))


def fitting_bytes(hidden: int, every: int, kept: int) -> int:
    """On the device while ``kept`` of ``every`` channels are fitted, beside the Gram matrix: the
    products with removed channels; or what solving takes; or the projection while it is checked."""
    products = FP32 * ((every - kept) * kept + hidden * every)
    return max(products, solving_bytes(hidden, kept), 4 * FP32 * hidden * kept)


@dataclass(frozen=True)
class GramCosts:
    """Gram matrices of the block at work, and what is made of them."""

    blocks: Sequence[Sequence[Units]]
    """The parts of every block."""
    hidden_size: int
    active_experts: int
    """Experts that a token goes through."""
    sparsity: float
    even: bool = False
    """Whether every FFN keeps the same share; otherwise memory is for one that keeps all."""
    removes: bool = False
    """Whether the calibration makes them, to remove all channels greedily."""
    curves: bool = False
    """Whether the calibration makes them, for error curves."""
    fits: bool = False
    """Whether the pass that cuts makes them, for least squares; error curves then reckon with
    these."""

    @property
    def ranks(self) -> bool:
        """Whether the calibration makes them."""
        return self.removes or self.curves

    @property
    def _sizes(self) -> list[tuple[int, int, int]]:
        """(experts, channels, kept channels) of every FFN, as if all were cut alike."""
        units = (units for block in self.blocks for units in block)
        return [(g.experts, g.size, round(g.size * (1 - self.sparsity))) for g in units]

    def loads(self, run: Workload) -> Iterator[Load]:
        """Each rank fits every block; all get the same."""
        if self.ranks and run.windows:
            flops, parts = self.rank_flops(), {RANKING: self.rank_bytes()}
            yield self._made(run, "calibrate", run.windows)
            yield Load("calibrate", flops=flops, busiest=flops * run.fp64_slower, parts=parts)
        if self.fits and run.fit_windows:
            windows, seqlen, itemsize = run.fit_windows, run.seqlen, run.dense.itemsize
            flops, judging = self.fit_flops(), self.judging_flops(windows, seqlen)
            judged = self.judging_bytes(windows, seqlen, itemsize)
            parts = {SOLVING: max(self.fit_bytes(), judged)}
            busiest = flops * run.fp32_slower + judging
            yield self._made(run, "prune", windows)
            yield Load("prune", flops=flops * run.ranks + judging, busiest=busiest, parts=parts)

    def _made(self, run: Workload, stage: str, windows: int) -> Load:
        """Summing them over the fitting windows: half of a whole product."""
        split, itemsize = Split(windows, run.seqlen, run.micro_batch), run.dense.itemsize
        flops = (windows - held_out_windows(windows)) * run.seqlen * self.sum_flops()
        parts = {
            "Gram matrices": self.sum_bytes(split, run.ranks),
            "held-out activations": self.held_out_bytes(windows, run.seqlen, itemsize),
            CHUNK: self.chunk_bytes(split, itemsize),
        }
        return Load(stage, flops=flops, busiest=flops * run.share_of(windows), parts=parts)

    def sum_flops(self) -> float:
        """FLOPs per token."""
        return float(sum(n**2 * min(experts, self.active_experts) for experts, n, _ in self._sizes))

    def sum_bytes(self, split: Split, ranks: int) -> int:
        """On the busiest rank's device while a block is at work: its products."""
        products = max(sum(g.experts * g.size**2 for g in block) for block in self.blocks)
        return max(1, products_held(split, ranks)) * products * FP32

    def chunk_bytes(self, split: Split, itemsize: int) -> int:
        """The activations of a chunk, all that are kept and those of one FFN in one piece, which
        are sorted into another where they are of experts."""
        most = 0
        for block in self.blocks:
            kept = [(g.experts, g.size * min(g.experts, self.active_experts)) for g in block]
            copies = (channels * (1 if experts == 1 else 2) for experts, channels in kept)
            whole = max(copies, default=0)
            most = max(most, sum(channels for _, channels in kept) + whole)
        return split.chunk_tokens * itemsize * most

    def held_out_bytes(self, windows: int, seqlen: int, itemsize: int) -> int:
        """The activations of the held-out windows."""
        channels = max(
            sum(g.size * min(g.experts, self.active_experts) for g in block)
            for block in self.blocks
        )
        return held_out_windows(windows) * seqlen * itemsize * channels

    def rank_flops(self) -> float:
        """fp64 FLOPs of removing all channels, and of error curves."""
        cubes, squares = (3.0, 2.0) if self.removes else (0.0, 0.0)
        if self.curves:
            cubes += 4 / 3 if self.fits else 0.0
            squares += 1.0 if self.fits else 2.0
        d = self.hidden_size
        return sum(experts * n**2 * (cubes * n + squares * d) for experts, n, _ in self._sizes)

    def rank_bytes(self) -> int:
        """On the device while the channels of one FFN are removed, or its error curve is made,
        beside its Gram matrix: that divided by the tokens, and the rest as in
        cfsp/pruning/obs.py."""
        channels = max(channels for _, channels, _ in self._sizes)
        square, rectangle = channels**2, self.hidden_size * channels
        found = [FP64 * (4 * square + rectangle)] if self.removes else []
        if self.curves and self.fits:
            found.append(FP64 * max(3 * square, 2 * square + 4 * rectangle))
        elif self.curves:
            found.append(FP64 * (2 * square + rectangle) + FP32 * square)
        return FP32 * square + max(found)

    def fit_flops(self) -> float:
        """fp32 FLOPs of fitting every FFN."""
        total, d = 0.0, self.hidden_size
        for experts, every, kept in self._sizes:
            total += experts * (2.0 * d * (every - kept) * kept + solving_flops(d, kept))
        return total

    def judging_flops(self, windows: int, seqlen: int) -> float:
        """FLOPs of three products with the activations of the held-out windows."""
        channels = sum(min(g, self.active_experts) * n for g, n, _ in self._sizes)
        return 6.0 * held_out_windows(windows) * seqlen * self.hidden_size * channels

    def fit_bytes(self) -> int:
        """On the device while one FFN is fitted, beside its Gram matrix."""
        sizes = self._sizes
        return max(fitting_bytes(self.hidden_size, n, k if self.even else n) for _, n, k in sizes)

    def judging_bytes(self, windows: int, seqlen: int, itemsize: int) -> int:
        """On the device while a fit is judged: itself and two changes of the projection; and for
        the held-out tokens, at most all of one expert, an output, and its squares twice."""
        d = self.hidden_size
        changes = max(itemsize * d * (2 * n + (k if self.even else n)) for _, n, k in self._sizes)
        return changes + held_out_windows(windows) * seqlen * d * (itemsize + FP32 + FP64)


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
        busiest = flops
        parts = {
            **run.model_parts(),
            "cut FFNs": run.dense.ffn_bytes + run.widest.largest_block,
            MICRO_BATCH: max(run.working(), run.logits()),
        }
        if self.fits is not None:
            windows, seqlen, itemsize = run.fit_windows, run.seqlen, run.dense.itemsize
            blocks = len(run.dense.blocks)
            cuts = 1 + (self.candidates - 1) * 4 / blocks
            fitting = cuts * self.fits.fit_flops()
            passed = windows * run.dense.block_flops(seqlen) * seqlen
            passed += (windows - held_out_windows(windows)) * seqlen * self.fits.sum_flops()
            others = passed + cuts * self.fits.judging_flops(windows, seqlen)
            flops += fitting + others
            busiest += fitting * run.fp32_slower + others
            split = Split(windows, seqlen, run.micro_batch)
            held = self.fits.sum_bytes(split, 1)
            held += self.fits.held_out_bytes(windows, seqlen, itemsize)
            parts["Gram matrices"] = blocks * held
            parts["hidden states"] = run.states(windows)
            parts[CHUNK] = self.fits.chunk_bytes(split, itemsize)
            parts[MICRO_BATCH] = max(parts[MICRO_BATCH], run.working(run.micro_batch))
            judged = self.fits.judging_bytes(windows, seqlen, itemsize)
            parts[SOLVING] = max(self.fits.fit_bytes(), judged)
        yield Load("search", flops=flops, busiest=busiest, parts=parts)


def widths_of(model: ModelCosts) -> list[int]:
    """Channels of every block."""
    numels = (min((x.numel for x in block.ffn.values()), default=0) for block in model.blocks)
    return [numel // model.hidden_size for numel in numels]


@dataclass(frozen=True)
class RefitCosts:
    """Calibration windows that go through the pruned blocks, to fit these again."""

    pruned: ModelCosts
    epochs: int
    """Epochs of Adam; 0: none."""
    sequential: bool

    def loads(self, run: Workload) -> Iterator[Load]:
        """All on one rank, in the pass that cuts: a block is fitted again when its Gram matrices
        are gone. Beside the hidden states of all windows is what is kept of them in a block."""
        states, cutting = run.states(run.fit_windows), run.cutting_parts()
        parts = {
            **cutting,
            "hidden states": cutting["hidden states"] + (1 + MOST_KEPT) * states,
            MICRO_BATCH: run.working(),
            "blocks fitted again": self._fit_bytes(run),
        }
        yield Load(REFITTING, parts=parts)
        solving = self._solving_flops()
        flops = self.flops(run)
        busiest = flops + solving * run.fp32_slower
        yield Load("prune", flops=flops + solving, busiest=busiest, parts={"hidden states": states})

    def flops(self, run: Workload) -> float:
        """FLOPs of all blocks but for solving.

        What is before the FFN of a pruned block runs once for each window; the FFN alone to fit it
        and to judge that, and twice for what is to be kept of a window. Backwards there are
        gradients of the FFN's matrices and of the input of the last of them; nothing goes further.
        """
        ffn = backwards = 0.0
        for block in self.pruned.blocks:
            own = [block.matrix_flops[name] for name in block.ffn]
            ffn += sum(own)
            backwards += sum(own) + min(own, default=0.0)
        judged = held_out_windows(run.fit_windows)
        fitted = run.fit_windows - judged
        total = run.fit_windows * self.pruned.block_flops(run.seqlen) + 2 * ffn
        if self.sequential:
            total += (fitted + 2 * judged) * ffn + fitted * self._normal_equations()
        if self.epochs:
            total += self.epochs * fitted * (ffn + backwards)
            total += (self.epochs + (not self.sequential)) * judged * ffn
        return total * run.seqlen

    def _normal_equations(self) -> float:
        """FLOPs per token of the closed form: z^T z, half of it, and R^T z."""
        d = self.pruned.hidden_size
        return sum(width * (width + 2.0 * d) for width in widths_of(self.pruned))

    def _solving_flops(self) -> float:
        """fp32 FLOPs of the closed form."""
        solved = (solving_flops(self.pruned.hidden_size, width) for width in widths_of(self.pruned))
        return sum(solved) if self.sequential else 0.0

    def _fit_bytes(self, run: Workload) -> int:
        """Of the block at work: what the closed form takes and the weights before it; then, in
        fp32, the weights, their gradient, two moments and in a step their root, and the weights as
        the block computes with them; what a window leaves for the way back."""
        d, itemsize = run.widest.hidden_size, run.dense.itemsize
        width = max(widths_of(run.widest))
        found = [solving_bytes(d, width) + itemsize * d * width] if self.sequential else []
        if self.epochs:
            values = max(sum(x.numel for x in block.ffn.values()) for block in run.widest.blocks)
            cast = itemsize if itemsize != FP32 else 0
            left = 3 * run.widest.working_bytes(1, run.seqlen, "cpu")
            found += [values * (5 * FP32 + cast), values * (4 * FP32 + 2 * cast) + left]
        return max(found)
