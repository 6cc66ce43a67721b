"""A search for widths on a model in memory: candidates measured in the dense one's place."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..calibration.statistics import Statistics
from ..models.layouts import Layout
from .allocation import AllocationProblem
from .compaction import check_compensation, prune_block_
from .plan import BlockPlan, PruningPlan, WidthSearch
from .recipe import Recipe
from .search import search_widths

Cut = Callable[[int, nn.Module, BlockPlan], None]
"""Takes (number of the block, a copy of it, what it keeps): cuts the copy in place."""


def width_search(
    model: PreTrainedModel,
    layout: Layout,
    statistics: Statistics,
    recipe: Recipe,
    measure: Callable[[], float],
    *,
    progress: bool = False,
) -> WidthSearch:
    """A search that measures every candidate as it would be saved, compensation and all.

    Time: a measurement for each of ``1 + search_generations * search_offspring``
    candidates, and a cut for each new width of a block. Memory: see :class:`CutBlocks`.

    Args:
        model: the dense model; left as it was found.
        layout: where its FFNs are.
        statistics: that the cuts are compensated by.
        recipe: its compensation, damping and settings of the search are read.
        measure: the loss of the model as it stands, such as its perplexity.
        progress: show a bar on stderr.

    Raises, when it is run:
        CfspError: the compensation lacks what it needs.
    """

    def cut(number: int, block: nn.Module, plan: BlockPlan) -> None:
        prune_block_(block, layout, plan, recipe, statistics.blocks[number])

    def search(
        plan_of: Callable[[Sequence[int]], PruningPlan],
        start: tuple[int, ...],
        problem: AllocationProblem,
    ) -> tuple[int, ...]:
        check_compensation(plan_of(start), statistics)
        experts = problem.experts or (1,) * len(start)
        bar = tqdm(
            total=recipe.search_candidates, desc="search", unit="model", disable=not progress
        )
        with bar, _evaluating(model), CutBlocks(model, layout, cut).in_place() as put:

            def evaluate(widths: tuple[int, ...]) -> float:
                put(plan_of(widths))
                measured = measure()
                bar.set_postfix(perplexity=f"{measured:.3f}", refresh=False)
                bar.update()
                return measured

            return search_widths(
                evaluate,
                start,
                [len(s) // count for s, count in zip(problem.scores, experts, strict=True)],
                recipe.width_multiple,
                costs=problem.costs or experts,
                generations=recipe.search_generations,
                offspring=recipe.search_offspring,
                seed=recipe.search_seed,
            ).widths

    return search


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class CutBlocks:
    """Puts cut copies of blocks into a model in memory, each cut once for each width.

    A copy shares everything with its block but the matrices that a cut makes. Scores are fixed, so
    a block of given widths is always the same. Memory beside the model: up to as much as all dense
    FFNs, for the copies in place and those that wait, and one block while it is cut.
    """

    def __init__(self, model: nn.Module, layout: Layout, cut: Cut) -> None:
        self.blocks: nn.ModuleList = layout.find_blocks(model)  # type: ignore[assignment]
        self.dense = list(self.blocks)
        self.cut = cut
        self.room = sum(
            parameter.nbytes
            for block in self.dense
            for name, parameter in block.named_parameters()
            if name in layout.weight_names(block)
        )
        self.kept: OrderedDict[tuple[int, tuple[int, ...]], nn.Module] = OrderedDict()
        self.bytes = 0

    @contextmanager
    def in_place(self) -> Iterator[Callable[[PruningPlan], None]]:
        """While it lasts, the function it gives makes the model that of a plan; afterwards the
        model is the dense one."""
        try:
            yield self._apply
        finally:
            for number, block in enumerate(self.dense):
                self.blocks[number] = block
            self.kept.clear()
            self.bytes = 0

    def _apply(self, plan: PruningPlan) -> None:
        for number, block_plan in enumerate(plan.blocks):
            self.blocks[number] = self._cut_block(number, block_plan)

    def _cut_block(self, number: int, plan: BlockPlan) -> nn.Module:
        key = (number, tuple(kept.shape[1] for kept in plan.kept_by_group))
        block = self.kept.get(key)
        if block is None:
            block = _sharing_copy(self.dense[number])
            self.cut(number, block, plan)
            self.kept[key] = block
            self.bytes += self._own_bytes(number, block)
        self.kept.move_to_end(key)
        while self.bytes > self.room and len(self.kept) > 1:
            (old_number, _), old = self.kept.popitem(last=False)
            self.bytes -= self._own_bytes(old_number, old)
        return block

    def _own_bytes(self, number: int, block: nn.Module) -> int:
        shared = {id(parameter) for parameter in self.dense[number].parameters()}
        return sum(p.nbytes for p in block.parameters() if id(p) not in shared)


def _sharing_copy(block: nn.Module) -> nn.Module:
    """A block of its own modules and the same parameters and buffers."""
    tensors: list[torch.Tensor] = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, {id(tensor): tensor for tensor in tensors})
