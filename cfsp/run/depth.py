"""Take whole blocks out of a model before anything else is done to it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ..calibration.statistics import Statistics
from ..costs.depth_costs import depth_windows_of
from ..distributed import Ranks
from ..errors import CfspError, Stopped
from ..evaluation.quality import HeldOut, Perplexity, perplexity
from ..models.blocks import Blocks
from ..models.blockwise import RidingWindows
from ..models.depth import blocks_alone, shallower, shallower_description
from ..models.descriptions import Description
from ..models.opening import OpenModel
from ..pruning.plan import Depth, PruningPlan
from ..pruning.plan_file import depth_from_dict
from ..pruning.recipe import Recipe
from ..pruning.whole.blocks import (
    StretchAngles,
    any_stretch,
    best_stretch,
    blocks_left,
    stretch_losses,
    stretches,
)


def known_depth(
    plan: PruningPlan | None, statistics: Statistics | None, recipe: Recipe
) -> Depth | None:
    """The blocks that a plan or statistics are of, where these are not all of a model's. Raises
    CfspError for statistics of other blocks than the recipe asks for."""
    if plan is not None:
        return plan.depth
    if statistics is None:
        return None
    told = statistics.provenance.get("depth")
    depth = depth_from_dict(told, "the statistics") if told is not None else None
    left = len(statistics.blocks)
    total = depth.total if depth is not None else left
    if recipe.blocks is not None and recipe.blocks not in (left, left - total or left):
        raise CfspError(
            f"blocks {recipe.blocks}: the statistics are of {left} of {total} blocks, which are "
            "chosen before a calibration; drop one of the two"
        )
    return depth


@dataclass(frozen=True)
class DepthCut:
    """Blocks that are about to go."""

    recipe: Recipe
    kept: tuple[int, ...] | None
    """Those that stay; None: the recipe chooses."""
    left: int
    """How many."""
    shallower: Description
    """The model to be, or one as large."""
    blocks: Blocks | None
    """Those that stay, in the model as it is; None where they are not known."""
    windows: int
    """How many of the calibration's go through all blocks to choose."""

    @staticmethod
    def of(opened: OpenModel, recipe: Recipe, known: Depth | None) -> "DepthCut | None":
        """What goes of a model by a plan or statistics, or else by the recipe; None: nothing.
        Raises CfspError where it cannot."""
        described = opened.described
        total = len(described.units)
        if known is not None:
            if known.total != total:
                raise CfspError(f"the plan is of a model of {known.total} blocks, not {total}")
            blocks, short = (
                blocks_alone(opened, known.kept),
                shallower_description(described, known.kept),
            )
            return DepthCut(recipe, known.kept, len(known.kept), short, blocks, 0)
        left = blocks_left(described, recipe.blocks) if recipe.blocks is not None else total
        if left == total:
            return None
        short = shallower_description(described, any_stretch(described, left))
        windows = depth_windows_of(described, left, recipe)
        return DepthCut(recipe, None, left, short, None, windows)

    def cut_(
        self,
        opened: OpenModel,
        windows: torch.Tensor,
        held_out: HeldOut,
        micro_batch: int,
        *,
        stop: Callable[[], bool],
        progress: bool,
        ranks: Ranks,
    ) -> tuple[OpenModel, Perplexity | None]:
        """The model without these blocks, chosen by calibration ``windows`` [N, S] where they are
        not known, and the perplexity that it had with them. All blocks go by once, for both. Raises
        Stopped where ``stop``, asked before each, says so on any rank."""
        model, described = opened.model, opened.described
        modules = opened.layout.find_blocks(model)
        starts, count = stretches(described, self.left), len(modules) - self.left
        kept, by_loss = self.kept, self.recipe.chooses_by_loss
        training = model.training
        model.eval()
        own = held_out.tokens[ranks.share(len(held_out.tokens))]
        measured = RidingWindows(model, modules, own)
        riding, angles = [measured.ride] if len(own) else [], None
        if kept is None and not by_loss:
            chosen_by = windows[: self.windows]
            angles = StretchAngles(model, modules, chosen_by, count, micro_batch, ranks)
            riding.append(angles.ride)
        if len(held_out.tokens) or angles is not None:
            bar = tqdm(total=len(modules), desc="depth", unit="block", disable=not progress)
            with bar, opened.blocks.turns() as turns:
                for number, _ in turns:
                    if ranks.any(stop()):
                        raise Stopped
                    for ride in riding:
                        ride(number)
                    bar.update()
        before = held_out.of_logits(measured.logits(), ranks, measured.seconds)
        if angles is not None:
            found = angles.angles()
            kept = best_stretch(described, self.left, [found[start] for start in starts])
        elif kept is None:
            last = windows[-self.recipe.search_windows :]

            def measure() -> float:
                return perplexity(model, last, progress=False).perplexity

            losses = stretch_losses(model, opened.layout, starts, count, measure, progress=progress)
            kept = best_stretch(described, self.left, losses)
        model.train(training)
        return shallower(opened, kept), before


def depth_of(opened: OpenModel) -> Depth | None:
    """Which of its blocks are left; None: all."""
    return Depth(opened.kept, len(opened.dense.units)) if opened.dense is not None else None
