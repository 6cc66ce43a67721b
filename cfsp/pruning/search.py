"""Evolutionary search over widths: exchanges between FFNs that keep the cost, judged by a loss.

Candidates are measured in the place of the dense model, cut as they would be saved.
"""

import copy
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..calibration.collect import DensePass
from ..calibration.statistics import BlockStatistics, Statistics
from ..models.layouts import Layout
from .allocation import AllocationProblem
from .budget import Widths
from .compaction import prune_block_
from .plan import BlockPlan, PruningPlan
from .planning import WidthSearch
from .recipe import Recipe

EXCHANGE_FRACTION = 32
"""The smallest exchange is about this part of the smallest FFN, or one multiple."""
EXCHANGE_SIZES = (1, 2, 4)
"""An exchange is this many of the smallest ones."""
MOST_EXCHANGES = 3
"""Exchanges between a parent and its offspring, at most."""
ATTEMPTS = 50
"""Draws of an offspring that was not measured before, at most."""


@dataclass(frozen=True)
class SearchResult:
    """The best widths that were found."""

    widths: Widths
    loss: float
    start_loss: float
    evaluations: int


def search_widths(
    evaluate: Callable[[Widths], float],
    start: Sequence[int],
    sizes: Sequence[int],
    multiple: int,
    *,
    costs: Sequence[int] | None = None,
    generations: int = 20,
    offspring: int = 4,
    seed: int = 0,
) -> SearchResult:
    """Improve widths by moving channels between FFNs at constant cost.

    Each generation makes offspring of the best widths so far, by one to three random exchanges,
    fewer being likelier, and keeps the best of all. No widths are measured twice. Source: the
    level-switch mutation of EvoPress (arXiv 2410.14649), here with a (1 + offspring) strategy.

    ``evaluate`` gives the loss of widths, NaN for infinite, at most ``1 + generations * offspring``
    times; ``costs`` are of one channel of width in every FFN (None: 1). The same arguments give
    the same calls.
    """
    costs = costs or [1] * len(sizes)
    generator = random.Random(seed)
    smallest = max(1, min(sizes) // multiple // EXCHANGE_FRACTION) * multiple
    losses: dict[Widths, float] = {}

    def exchanged(widths: Widths) -> Widths:
        """One exchange on; the same where the pair that was drawn has no room for it."""
        if len(widths) < 2:
            return widths
        giver, taker = generator.sample(range(len(widths)), 2)
        amount = smallest * generator.choice(EXCHANGE_SIZES)
        shared = math.lcm(costs[giver], costs[taker])
        changed = list(widths)
        changed[giver] -= amount * (shared // costs[giver])
        changed[taker] += amount * (shared // costs[taker])
        fits = changed[giver] >= multiple and changed[taker] <= sizes[taker] // multiple * multiple
        return tuple(changed) if fits else widths

    def new_child(parent: Widths) -> Widths | None:
        """Widths a few exchanges away that were not measured yet; None where none was met."""
        for _ in range(ATTEMPTS):
            child = parent
            for _ in range(min(generator.randint(1, MOST_EXCHANGES) for _ in range(2))):
                child = exchanged(child)
            if child not in losses:
                return child
        return None

    def measure(widths: Widths) -> float:
        loss = evaluate(widths)
        losses[widths] = math.inf if math.isnan(loss) else loss
        return losses[widths]

    best = tuple(start)
    start_loss = measure(best)
    for _ in range(generations):
        parent = best
        for _ in range(offspring):
            child = new_child(parent)
            if child is None:
                break
            if measure(child) < losses[best]:
                best = child
    return SearchResult(best, losses[best], start_loss, len(losses))


def width_search(
    model: PreTrainedModel,
    layout: Layout,
    statistics: Statistics,
    windows: torch.Tensor,
    recipe: Recipe,
    measure: Callable[[], float],
    *,
    progress: bool = False,
) -> WidthSearch:
    """A search that measures every candidate as it would be saved, compensation and all.

    Time: a pass of the calibration ``windows`` [N, S] where candidates are fitted to them, a
    measurement for each candidate, and a cut for each new width of a block. Memory: the Gram
    matrices of all blocks for these fits; see :class:`CutBlocks`. The dense model is left as it was
    found; ``measure`` gives its loss as it stands.
    """
    known: list[BlockStatistics] = []

    def cut(number: int, block: nn.Module, plan: BlockPlan) -> None:
        compensation = recipe.resolved_compensation
        prune_block_(block, layout, plan, compensation, recipe.damping, known[number])

    def search(
        plan_of: Callable[[Sequence[int]], PruningPlan], start: Widths, problem: AllocationProblem
    ) -> Widths:
        total = recipe.search_candidates
        bar = tqdm(total=total, desc="search", unit="model", disable=not progress)
        with bar, CutBlocks(model, layout, cut).in_place() as put:
            if recipe.fits:
                dense = DensePass(model, layout, windows, gram=True)
                known.extend(map(dense.run, range(len(dense.blocks))))
            else:
                known.extend(statistics.blocks)

            def evaluate(widths: Widths) -> float:
                put(plan_of(widths))
                measured = measure()
                bar.set_postfix(perplexity=f"{measured:.3f}", refresh=False)
                bar.update()
                return measured

            return search_widths(
                evaluate,
                start,
                [own.size for own in problem.steps],
                recipe.width_multiple,
                costs=problem.costs,
                generations=recipe.search_generations,
                offspring=recipe.search_offspring,
                seed=recipe.search_seed,
            ).widths

    return search


class CutBlocks:
    """Puts cut copies of blocks into a model in memory, each cut once for each width.

    A copy shares everything with its block but the matrices that a cut makes. Memory beside the
    model: as much as all dense FFNs, for copies in place and waiting, and a block while it is cut.
    ``cut`` takes (number of the block, a copy of it, what it keeps) and cuts the copy in place.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, cut: Callable[[int, nn.Module, BlockPlan], None]
    ) -> None:
        self.model = model
        self.blocks: nn.ModuleList = layout.find_blocks(model)  # type: ignore[assignment]
        self.dense = list(self.blocks)
        self.cut = cut
        ffns = ((block, name) for block in self.dense for name in layout.weight_names(block))
        self.room = sum(block.get_parameter(name).nbytes for block, name in ffns)
        self.kept: OrderedDict[tuple[int, Widths], tuple[nn.Module, int]] = OrderedDict()
        """Each with the bytes that it does not share with its block, the last used at the end."""

    @property
    def bytes(self) -> int:
        return sum(own for _, own in self.kept.values())

    @contextmanager
    def in_place(self) -> Iterator[Callable[[PruningPlan], None]]:
        """Gives what makes the model, in evaluation mode, that of a plan; it ends as it was."""

        def put(plan: PruningPlan) -> None:
            for number, block_plan in enumerate(plan.blocks):
                self.blocks[number] = self._cut_block(number, block_plan)

        training = self.model.training
        self.model.eval()
        try:
            yield put
        finally:
            for number, block in enumerate(self.dense):
                self.blocks[number] = block
            self.kept.clear()
            self.model.train(training)

    def _cut_block(self, number: int, plan: BlockPlan) -> nn.Module:
        key = (number, plan.counts)
        if key not in self.kept:
            dense = self.dense[number]
            shared = {id(tensor): tensor for tensor in (*dense.parameters(), *dense.buffers())}
            block = copy.deepcopy(dense, dict(shared))
            self.cut(number, block, plan)
            self.kept[key] = block, sum(p.nbytes for p in block.parameters() if id(p) not in shared)
        self.kept.move_to_end(key)
        while self.bytes > self.room and len(self.kept) > 1:
            self.kept.popitem(last=False)
        return self.kept[key][0]
