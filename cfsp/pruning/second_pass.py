"""What every block is cut by when its turn comes: its channels, and what a fit is made from."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from torch import nn

from ..calibration.statistics import BlockStatistics, Statistics
from ..models.layouts import Layout
from .plan import BlockPlan, PruningPlan
from .planning import with_highest
from .ranking import rank_block
from .refit import Refitting
from .whole.experts import chosen_experts


class DenseRun(Protocol):
    """As :class:`cfsp.calibration.collect.DensePass`."""

    layout: Layout

    def run(self, number: int) -> BlockStatistics: ...


class SecondPass:
    """A plan that is carried out block by block, with the calibration windows that go through each
    dense block once more, where something is fitted to them.

    What they show of a block is forgotten with it. Where ``selects``, the widths of the plan are
    of a part of the windows, and channels are chosen block by block, by all of them.
    """

    def __init__(
        self,
        plan: PruningPlan,
        statistics: Statistics | None = None,
        dense: DenseRun | None = None,
        refitting: Refitting | None = None,
        *,
        selects: bool = False,
    ) -> None:
        self.statistics, self.dense, self.refitting = statistics, dense, refitting
        self.selects = selects
        self._planned, self._chosen = plan, dict(enumerate(plan.blocks))

    @property
    def plan(self) -> PruningPlan:
        """The plan, with the channels that blocks were cut to so far."""
        return replace(self._planned, blocks=tuple(self._chosen.values()))

    def turn(self, number: int, block: nn.Module) -> tuple[BlockPlan, BlockStatistics | None]:
        """What a dense block is to keep, and what its compensation reads."""
        if self.dense is None:
            known = self.statistics.blocks[number] if self.statistics is not None else None
            return self._chosen[number], known
        windows = self.refitting or self.dense
        known, planned = windows.run(number), self._chosen[number]
        if self.selects:
            weights = partial(self.dense.layout.part_weights, block)
            recipe, parts = self._planned.recipe, self.dense.layout.block_parts(block)
            scores, _ = rank_block(known, weights, recipe)
            again = replace(planned, experts=chosen_experts(known, parts, recipe.expert_score))
            self._chosen[number] = with_highest(again, scores, planned.counts)
        return self._chosen[number], known

    @property
    def visits(self) -> Sequence[Callable[[int], None]]:
        """What visits a block after the cut: what fits it again, where that is asked for."""
        return [self.refitting.run_pruned] if self.refitting is not None else []
