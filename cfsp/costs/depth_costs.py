"""What it takes to choose the blocks that go, and to be without them."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..models.descriptions import Description
from ..pruning.recipe import Recipe
from ..pruning.whole.blocks import angle_windows
from .flops import ModelCosts
from .workload import HOST, MICRO_BATCH, Load, Workload

STATES, WAITING = "hidden states", "inputs of stretches"


def depth_windows_of(described: Description, left: int, recipe: Recipe) -> int:
    """Windows that go through all blocks to choose the ``left`` that stay, as often as they do."""
    if left == len(described.units):
        return 0
    if recipe.chooses_by_loss:
        return recipe.search_windows * (left - 1)
    samples, seqlen = recipe.calibration.samples, recipe.calibration.seqlen
    return angle_windows(described, left, min(recipe.width_windows, samples), seqlen)


@dataclass(frozen=True)
class DepthCosts:
    """The pass over all blocks, or those over all but a stretch."""

    dense: ModelCosts
    """The model with all of its blocks, in the run's dtype."""
    stored: ModelCosts
    """The same as the checkpoint has it."""
    windows: int
    """That choose; those of the evaluation go with them."""

    def loads(self, run: Workload) -> Iterator[Load]:
        """A streamed model is read once more, for both."""
        if not run.streamed:
            yield Load("open", self.stored.block_bytes - run.stored.block_bytes)
        windows = self.windows + run.evaluation_windows
        if not windows:
            return
        flops = windows * run.seqlen * self.dense.block_flops(run.seqlen)
        read = self.stored.block_bytes if run.streamed else 0
        parts = {**run.model_parts(), MICRO_BATCH: run.working(run.micro_batch)}
        parts[STATES] = run.states(run.of_rank(self.windows)) + run.evaluation_states() // 2
        gone = len(self.dense.blocks) - len(run.dense.blocks)
        waiting = {WAITING: gone * run.states(run.of_rank(self.windows))}
        if not run.streamed:
            parts["blocks"] = self.dense.block_bytes
        if run.device == "cpu":
            parts |= waiting
        else:
            yield Load(HOST, parts=waiting)
        yield Load("depth", read, copied=read, flops=flops, busiest=flops, parts=parts)
