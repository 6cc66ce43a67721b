"""A job whose input is checked, and the steps that both ways of running it share."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..calibration.collect import DensePass, collect_statistics, warn_of_idle_experts
from ..calibration.statistics import Statistics, check_text, statistics_fingerprint
from ..calibration.windows import Calibration, calibration_windows
from ..costs.budgets import check_met, resolve
from ..costs.footprint import Footprints
from ..costs.latency import LatencyTable
from ..distributed import Ranks
from ..errors import CfspError
from ..evaluation.quality import HeldOut, Perplexity, perplexity
from ..io.files import check_unchanged
from ..models.blocks import StoredBlocks
from ..models.fingerprints import tokens_fingerprint, versions
from ..models.loading import model_device
from ..models.opening import OpenModel
from ..models.pruned_classes import become_pruned_, is_stock
from ..pruning.compaction import warn_of_few_tokens
from ..pruning.compensation import FitRecord
from ..pruning.plan import PruningPlan
from ..pruning.plan_file import depth_to_dict, plan_to_dict
from ..pruning.planning import make_plan
from ..pruning.ranking import Ranker
from ..pruning.recipe import Recipe
from ..pruning.refit import Refitting
from ..pruning.scoring import SCORERS
from ..pruning.search import width_search
from ..pruning.second_pass import SecondPass
from ..pruning.whole.experts import chosen_experts
from .depth import depth_of
from .result import PruneReport


def as_calibrated(recipe: Recipe, statistics: Statistics) -> Recipe:
    """The recipe that would make these statistics: theirs is the calibration that counts."""
    known = statistics.provenance.get("calibration")
    return dataclasses.replace(recipe, calibration=Calibration(**known)) if known else recipe


def check_reach(statistics: Statistics, recipe: Recipe) -> None:
    """Raise CfspError where the statistics are of fewer windows than a plan needs that is made by
    them alone."""
    if "calibration" not in statistics.provenance:  # all that there is
        return
    made_of = statistics.provenance["windows"]
    needed = as_calibrated(recipe, statistics).statistics_windows
    if made_of < needed:
        raise CfspError(
            f"the statistics are of {made_of} windows and this recipe needs {needed}: make them "
            "with `cfsp calibrate`"
        )


def plan_model(
    opened: OpenModel,
    statistics: Statistics,
    recipe: Recipe,
    table: LatencyTable | None = None,
    *,
    windows: torch.Tensor | None = None,
    progress: bool = False,
) -> PruningPlan:
    """The plan under the recipe's budget for this very model; raises CfspError where no widths meet
    it. A search measures on the last of ``windows``, [N, S] calibration tokens, drawn if None."""
    model, layout, described, search = opened.model, opened.layout, opened.described, None
    check_reach(statistics, recipe)
    budget = resolve(described, recipe, table)
    if recipe.searches:
        if windows is None:
            windows = calibration_windows(model, opened.tokenizer, recipe.calibration)
            check_text(statistics, windows)
        measured = windows[-recipe.search_windows :]

        def measure() -> float:
            return perplexity(model, measured, progress=False).perplexity

        search = width_search(
            model, layout, statistics, windows, recipe, measure, progress=progress
        )
    weights = opened.blocks.part_weights
    blocks = layout.find_blocks(model)
    experts = (
        ()
        if recipe.experts is None
        else tuple(
            chosen_experts(known, layout.block_parts(block), recipe.expert_score)
            for known, block in zip(statistics.blocks, blocks, strict=True)
        )
    )
    plan = make_plan(
        statistics, weights, recipe, budget, experts=experts, search=search, progress=progress
    )
    check_met(described, plan, table)
    plan.warn_of_rounding()
    return dataclasses.replace(plan, depth=depth_of(opened))


NOT_MEASURED = HeldOut(torch.empty(0, 0))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A checked job, the same whether the model is in memory or on disk; without a plan, statistics
    or held-out text, all that a calibration needs."""

    opened: OpenModel
    recipe: Recipe
    plan: PruningPlan | None = None
    statistics: Statistics | None = None
    windows: torch.Tensor
    """[N, S] calibration tokens; none where nothing reads them."""
    first_windows: int
    """How many of them, the first, the statistics are made of."""
    calibrates: bool = True
    """Whether a pass over these makes the statistics."""
    held_out: HeldOut = NOT_MEASURED
    table: LatencyTable | None = None
    """Latency of the model on the device that the result is for."""
    before: Perplexity | None = None
    """Of the model with all of its blocks, where some were taken out."""
    micro_batch: int
    """Windows per forward call of calibration."""
    verify: bool = False
    stop: Callable[[], bool] = bool
    progress: bool
    ranks: Ranks

    def calibrated(self) -> Statistics:
        """The statistics of a pass over the calibration tokens, with where they come from, and the
        recipe's ranking where that reads more than sums."""
        opened, recipe, ranks = self.opened, self.recipe, self.ranks
        ranker = Ranker(opened.layout, recipe)
        reads_more = SCORERS[recipe.scorer].reads_weights or recipe.sums_grams
        ranked = self.plan is None and reads_more
        depth = depth_of(opened)
        found = collect_statistics(
            opened.model,
            opened.layout,
            self.windows[: self.first_windows],
            micro_batch=self.micro_batch,
            provenance={
                "model": opened.name,
                "calibration": dataclasses.asdict(recipe.calibration),
                **({"depth": depth_to_dict(depth)} if depth is not None else {}),
            },
            progress=self.progress,
            weights=opened.blocks,
            stop=self.stop,
            ranks=ranks,
            gram=recipe.sums_grams,
            visit=ranker.visit if ranked and ranks.first else lambda *_: None,
        )
        if self.first_windows == len(self.windows) and ranks.first:
            warn_of_idle_experts(found.blocks)
        rankings = ranks.of_first(lambda: (ranker.ranking(),) if ranked else ())
        return dataclasses.replace(found, rankings=rankings)

    def planned(self, statistics: Statistics | None) -> PruningPlan:
        """The plan given, or the one that statistics make."""
        if self.plan is not None:
            if self.ranks.first and self.plan.removes_nothing:
                self.plan.warn_of_rounding()
            return self.plan
        if statistics is None:
            raise ValueError("a run has a plan or statistics")
        inputs = (self.opened, statistics, self.recipe, self.table)
        return self.ranks.of_first(
            lambda: plan_model(*inputs, windows=self.windows, progress=self.progress)
        )

    def second_pass(self, plan: PruningPlan, statistics: Statistics | None) -> SecondPass:
        """What carries the plan out, with the calibration windows where these are read again."""
        model, recipe = self.opened.model, self.recipe
        check_unchanged(self.opened.files)
        if not (recipe.fits or recipe.refits):
            return SecondPass(plan, statistics)
        if recipe.fits and self.ranks.first:
            warn_of_few_tokens(plan.blocks, statistics, *self.windows.shape)
        dense = DensePass(
            model,
            self.opened.layout,
            self.windows,
            micro_batch=self.micro_batch,
            gram=recipe.fits,
            ranks=self.ranks,
        )
        refitting = Refitting(model, dense, recipe) if recipe.refits else None
        selects = self.plan is None and recipe.selects_again
        return SecondPass(plan, statistics, dense, refitting, selects=selects)

    def finish_(
        self,
        cut: SecondPass,
        sizes: Footprints,
        fits: Sequence[tuple[FitRecord, ...]],
        before: Perplexity | None,
        after: Perplexity | None,
    ) -> PruneReport:
        """Give the model, whose FFNs were cut, the config and class that reload it; the record.
        Raises CfspError where its files are no longer those that were opened."""
        check_unchanged(self.opened.files)
        model, plan = self.opened.model, cut.plan
        recipe, refitting = plan.recipe, cut.refitting
        summary = {
            "scorer": recipe.scorer,
            "allocator": recipe.resolved_allocator,
            "compensation": recipe.resolved_compensation,
            "sparsity": round(plan.sparsity, 6),
            **({"depth": depth_to_dict(plan.depth)} if plan.depth is not None else {}),
        }
        become_pruned_(model, self.opened.layout, summary)
        return PruneReport(
            name=self.opened.name,
            plan=plan,
            statistics=cut.statistics,
            fitted_sha256=tokens_fingerprint(self.windows) if cut.dense is not None else None,
            fits=tuple(fits),
            refits=tuple(refitting.refits) if refitting is not None else (),
            sizes=sizes,
            table=self.table,
            perplexity_before=before,
            perplexity_after=after,
            stock=is_stock(model),
            versions=versions(model_device(model)),
        )

    def identity(self, blocks: StoredBlocks) -> dict[str, Any]:
        """Everything that the bytes of the result follow from, as plain values."""

        def tokens(windows: torch.Tensor) -> str | None:
            return tokens_fingerprint(windows) if len(windows) else None

        plan, statistics, recipe = self.plan, self.statistics, self.recipe.to_dict()
        stamps = {str(file): list(stamp) for file, stamp in self.opened.files.items()}
        del recipe["micro_batch"]  # what it asks for; the one in force counts
        return {
            "model": blocks.checkpoint_fingerprint(),
            "state of the model's files": self.ranks.of_first(lambda: stamps),
            "recipe": recipe,
            "micro-batch": self.micro_batch,
            "latency table": self.table.fingerprint() if self.table is not None else None,
            "plan": plan_to_dict(plan)["blocks"] if plan is not None else None,
            "statistics": statistics_fingerprint(statistics) if statistics is not None else None,
            "calibration text": tokens(self.windows),
            "evaluation text": tokens(self.held_out.tokens),
            "machine or version": versions(blocks.device),
        }
