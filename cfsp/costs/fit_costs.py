"""What Gram matrices and least squares cost: FLOPs, memory and disk, from shapes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..calibration.gram_sums import PENDING, Split, products_held
from ..calibration.grams import PANEL, file_bytes
from ..models.channels import ChannelGroup, sizes_of
from ..pruning.least_squares import ROWS

FP32, FP64 = 4, 8
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
    ranks: bool = False
    """Whether channels are scored by them, or error curves made."""
    residuals: bool = False
    """Whether the scores are what the other channels leave of each, and no curves are made."""

    def disk_bytes(self, windows: int) -> int:
        """Of the files of all blocks, which each hold as many parts as ``windows`` have."""
        alike = Counter(tuple(block) for block in self.blocks)
        return sum(count * file_bytes(sizes_of(block), windows) for block, count in alike.items())

    def sum_flops(self) -> float:
        """Of one token, in the pass that collects them: half of a whole product."""
        return sum(
            float(group.channels**2) * min(group.experts, self.active_experts)
            for block in self.blocks
            for group in block
        )

    def sum_bytes(self, split: Split, ranks: int, itemsize: int) -> int:
        """On the device of the rank with the most, while a block is at work: its products, and the
        activations of a chunk, kept and in one piece, those of experts once more to be sorted.

        ``itemsize``: bytes of an activation.
        """
        products = max(sum(g.experts * g.channels**2 for g in block) for block in self.blocks)
        chunk = split.chunk_tokens * itemsize
        rows = [
            (2 if group.experts == 1 else 3)
            * group.channels
            * min(group.experts, self.active_experts)
            for block in self.blocks
            for group in block
        ]
        return products_held(split, ranks) * products * FP32 + chunk * max(rows)

    def panel_bytes(self, split: Split, ranks: int) -> int:
        """On the host, while a file is written: a panel of every term and of their sum, and those
        that wait to be written."""
        widest = max(group.channels for block in self.blocks for group in block)
        return (products_held(split, ranks) + 1 + PENDING) * min(PANEL, widest) * widest * FP32

    def _kept(self, group: ChannelGroup) -> int:
        return round(group.channels * (1 - self.sparsity))

    def rank_flops(self) -> float:
        """In fp64, of an inverse; or of removing all channels greedily and of an error curve: at
        most, other scorers with curves leave the first out."""
        groups = [group for block in self.blocks for group in block if self.ranks]
        cubes, squares = (1.0, 0.0) if self.residuals else (13 / 3, 3.0 * self.hidden_size)
        return sum(
            group.experts * (cubes * group.channels**3 + squares * group.channels**2)
            for group in groups
        )

    def rank_bytes(self) -> int:
        """On the device, while the channels of one FFN are scored: see
        :func:`cfsp.pruning.obs.residual_norms` and :func:`cfsp.pruning.obs.removal_order`."""
        widest = max(group.channels for block in self.blocks for group in block)
        if self.residuals:
            return widest**2 * (FP32 + 2 * FP64)
        return widest**2 * (FP32 + 4 * FP64) + 2 * FP64 * self.hidden_size * widest

    def fit_flops(self) -> float:
        """Of fitting every FFN and of judging it, all in fp64."""
        total = 0.0
        for group in (group for block in self.blocks for group in block if self.fits):
            every, kept, d = group.channels, self._kept(group), self.hidden_size
            solving = 2.0 * d * (every - kept) * kept + kept**3 / 3 + 2.0 * d * kept**2
            judging = 2.0 * d * every**2 + 4.0 * d * kept**2
            total += group.experts * (solving + judging)
        return total

    def fit_bytes(self) -> int:
        """On the device, while one FFN is fitted: its Gram matrix, the factor twice, the products
        with removed channels, rows of the projection on their way, the new projection in fp32."""
        found = [0]
        for group in (group for block in self.blocks for group in block if self.fits):
            every, kept = group.channels, self._kept(group)
            removed, rows = every - kept, min(ROWS, self.hidden_size)
            fp64 = 2 * kept**2 + removed * kept + rows * (every + removed + 5 * kept)
            found.append(FP32 * (every**2 + self.hidden_size * kept) + FP64 * fp64)
        return max(found)
