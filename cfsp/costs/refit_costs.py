"""What fitting blocks again after the cut costs: FLOPs and memory, from shapes."""

from dataclasses import dataclass

from ..calibration.grams import held_out_windows
from ..pruning.block_cache import MOST_KEPT
from .flops import FP32, ModelCosts


@dataclass(frozen=True)
class RefitCosts:
    """Calibration windows that go through the dense and the pruned blocks once more."""

    dense: ModelCosts
    pruned: ModelCosts
    windows: int
    seqlen: int
    epochs: int
    """Of Adam; 0: none."""
    sequential: bool

    @property
    def _held_out(self) -> int:
        return held_out_windows(self.windows)

    def flops(self) -> float:
        """Of all blocks.

        What is before the FFN of a pruned block runs once for each window; the FFN alone to fit it
        and to judge that, and twice for what is to be kept of a window. Backwards there are
        gradients of the FFN's matrices and of the input of the last of them; nothing goes further.
        """
        ffn = backwards = 0.0
        for block in self.pruned.blocks:
            own = [flops for name, flops in block.matrix_flops().items() if name in block.ffn()]
            ffn += sum(own)
            backwards += sum(own) + min(own)
        fitted, judged = self.windows - self._held_out, self._held_out
        blocks = self.dense.block_flops(self.seqlen) + self.pruned.block_flops(self.seqlen)
        total = self.windows * blocks + 2 * ffn
        if self.sequential:
            total += (fitted + 2 * judged) * ffn + fitted * self._normal_equations()
        if self.epochs:
            total += self.epochs * fitted * (ffn + backwards)
            total += (self.epochs + (not self.sequential)) * judged * ffn
        return total * self.seqlen

    def _normal_equations(self) -> float:
        """Of one token, in closed form: z^T z, half of it, and R^T z."""
        total = 0.0
        for block in self.pruned.blocks:
            width = min(x.numel for x in block.ffn().values()) // self.dense.hidden_size
            total += width * (width + 2.0 * self.dense.hidden_size)
        return total

    def state_bytes(self) -> int:
        """Hidden states of all windows, dense and pruned, and what is kept of them in a block."""
        values = self.windows * self.seqlen * self.dense.hidden_size
        return (2 + MOST_KEPT) * values * self.dense.itemsize

    def fit_bytes(self) -> int:
        """The weights of one block in fp32, their gradient and two moments, and as the block
        computes with them; what a window leaves for the way back."""
        if not self.epochs:
            return 0
        values = max(sum(x.numel for x in block.ffn().values()) for block in self.pruned.blocks)
        left = 3 * self.pruned.working_bytes(1, self.seqlen, "cpu")
        return values * (4 * FP32 + self.dense.itemsize) + left
