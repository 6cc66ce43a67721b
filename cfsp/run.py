"""A job whose input is checked: in memory or from disk to disk, with what comes of it."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .calibration.collect import collect_statistics
from .calibration.grams import GramFolder, temporary_folder
from .calibration.statistics import Statistics, statistics_fingerprint
from .checkpoints.card import fits_to_dicts
from .checkpoints.documents import drop_times_, write_documents
from .checkpoints.folder import (
    check_out,
    load,
    new_folder,
    partial_path,
    write_model,
    write_settings,
)
from .checkpoints.resume import (
    begin,
    check_resume,
    check_shared,
    end,
    keep_statistics,
    kept_grams,
    kept_statistics,
)
from .checkpoints.verification import probe_tokens, take_probe, verify, verify_streamed
from .costs.footprint import Footprints, footprints, plan_within
from .costs.latency import LatencyTable
from .distributed import ALONE, Ranks
from .errors import CfspError, Stopped
from .evaluation.held_out import HeldOut
from .evaluation.quality import Perplexity, perplexity, ridden_perplexity
from .io.hashes import write_hashes
from .models.blocks import StoredBlocks
from .models.blockwise import RidingWindows
from .models.fingerprints import tokens_fingerprint, versions
from .models.loading import quiet_loading
from .models.opening import OpenModel
from .models.pruned_classes import become_pruned_, is_stock
from .models.surgery import empty_
from .pruning.compaction import prune_model_
from .pruning.compaction_streamed import prune_to_shards_
from .pruning.compensation import FitRecord
from .pruning.live_search import width_search
from .pruning.plan import PruningPlan, plan_to_dict
from .pruning.ranking import stored_ranking, with_ranking
from .pruning.recipe import Recipe
from .pruning.refit import BlockRefit, RefitSettings, Refitting


@dataclass(frozen=True)
class PruneReport:
    """What a run did and measured."""

    name: str
    """The dense model: hub id, folder or file name."""
    plan: PruningPlan
    statistics: Statistics | None
    fits: tuple[tuple[FitRecord, ...], ...]
    """What compensations that fit came to, in each FFN and expert of each block; () for others."""
    refits: tuple[BlockRefit, ...]
    """What fitting blocks again after the cut came to; () where they were not."""
    sizes: Footprints
    """What the model took and takes."""
    table: LatencyTable | None
    """That seconds are by."""
    perplexity_before: Perplexity | None
    perplexity_after: Perplexity | None
    stock: bool
    """Whether the result is an architecture of transformers itself."""
    versions: dict[str, str]

    @property
    def parameters_before(self) -> int:
        """Of the dense model; tied ones once."""
        return self.sizes.before.parameters

    @property
    def parameters_after(self) -> int:
        """Of the pruned model; tied ones once."""
        return self.sizes.after.parameters

    def to_dict(self) -> dict[str, Any]:
        """The measured part, as plain values."""
        before, after = self.perplexity_before, self.perplexity_after
        return {
            "sparsity": self.plan.sparsity,
            "widths": list(self.plan.widths),
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "sizes": self.sizes.to_dict(),
            "perplexity_before": before.to_dict() if before is not None else None,
            "perplexity_after": after.to_dict() if after is not None else None,
            **({"fits": fits_to_dicts(self.fits)} if any(self.fits) else {}),
            **({"refits": [refit.to_dict() for refit in self.refits]} if self.refits else {}),
        }


def recipe_document(report: PruneReport) -> dict[str, Any]:
    """The recipe with everything that a run depends on, for recipe.yaml.

    What was measured is in it but for times: equal runs give equal documents.
    """
    statistics = report.statistics
    result = report.to_dict()
    drop_times_(result)
    return {
        "recipe": report.plan.recipe.to_dict(),
        "provenance": {
            "model": report.name,
            "model_fingerprint": report.plan.model_fingerprint,
            "statistics": statistics.provenance if statistics is not None else None,
            "versions": report.versions,
            "latency_table": report.table.to_dict() if report.table is not None else None,
        },
        "result": result,
    }


@dataclass(frozen=True)
class PruneResult:
    """What came of a run."""

    tokenizer: Any
    report: PruneReport
    out: Path | None
    live: PreTrainedModel | None
    """The pruned model where it is in memory: one that was given live, or that has no ``out``."""
    device: torch.device

    @cached_property
    def model(self) -> PreTrainedModel:
        """The pruned model, in eval mode on its device; read from ``out`` when first asked for,
        where it was pruned from disk to disk."""
        if self.live is not None:
            return self.live
        if self.out is None:
            raise ValueError("a result without a folder has a live model")
        with quiet_loading():
            return load(self.out, device=str(self.device))

    @property
    def plan(self) -> PruningPlan:
        """What every block kept."""
        return self.report.plan

    @property
    def statistics(self) -> Statistics | None:
        """The calibration; None where a plan was applied without any."""
        return self.report.statistics


def collect(
    opened: OpenModel,
    recipe: Recipe,
    windows: torch.Tensor,
    micro_batch: int,
    progress: bool,
    stop: Callable[[], bool] = bool,
    ranks: Ranks = ALONE,
    grams: GramFolder | None = None,
) -> Statistics:
    """Statistics of a calibration pass, with where they come from; Gram matrices where they have a
    folder."""
    return collect_statistics(
        opened.model,
        opened.layout,
        windows,
        micro_batch=micro_batch,
        provenance={
            "model": opened.name,
            "calibration": dataclasses.asdict(recipe.calibration),
        },
        progress=progress,
        weights=opened.blocks,
        stop=stop,
        ranks=ranks,
        grams=grams,
    )


@dataclass(frozen=True)
class Run:
    """A checked job, the same whether the model is in memory or on disk."""

    opened: OpenModel
    recipe: Recipe
    plan: PruningPlan | None
    statistics: Statistics | None
    windows: torch.Tensor | None
    """[N, S] calibration tokens; None where no calibration is needed."""
    refit_windows: torch.Tensor | None
    """[N, S] calibration tokens that blocks are fitted on after the cut; None: they are not."""
    micro_batch: int
    """Windows per forward call of calibration."""
    held_out: HeldOut
    overwrite: bool
    verify: bool
    stop: Callable[[], bool]
    progress: bool
    ranks: Ranks
    search_windows: torch.Tensor | None = None
    """[N, S], for allocator ``search``; None: for others."""
    table: LatencyTable | None = None
    """Of the model on the device that the result is for."""

    def calibrated(self, grams: Callable[[], GramFolder]) -> Statistics | None:
        """The statistics given, or those of a pass over the calibration tokens.

        ``grams`` makes the folder for Gram matrices, where they are needed.
        """
        if self.windows is None:
            return self.statistics
        needs_gram = self.recipe.needs_gram(planned=self.plan is not None)
        return collect(
            self.opened,
            self.recipe,
            self.windows,
            self.micro_batch,
            self.progress,
            self.stop,
            self.ranks,
            self.ranks.of_first(grams) if needs_gram else None,
        )

    def refitting(self) -> Refitting | None:
        """The calibration windows on their way through the blocks, where these are fitted again."""
        if self.refit_windows is None:
            return None
        recipe = self.recipe
        settings = RefitSettings(
            recipe.sequential,
            recipe.damping,
            recipe.epochs if recipe.blockwise else 0,
            recipe.learning_rate,
            recipe.calibration.seed,
        )
        return Refitting(self.opened.model, self.opened.layout, self.refit_windows, settings)

    def planned(self, statistics: Statistics | None) -> PruningPlan:
        """The plan given, or the one that statistics make."""
        if self.plan is not None:
            return self.plan
        if statistics is None:
            raise ValueError("a run has a plan or statistics")
        opened, windows = self.opened, self.search_windows
        search = None
        if windows is not None:

            def measure() -> float:
                return perplexity(opened.model, windows, progress=False).perplexity

            search = width_search(
                opened.model,
                opened.layout,
                statistics,
                self.recipe,
                measure,
                progress=self.progress,
            )
        return self.ranks.of_first(
            lambda: plan_within(
                statistics,
                opened.blocks.ffn_weights,
                self.recipe,
                opened.model,
                opened.layout,
                self.table,
                search=search,
                progress=self.progress,
            )
        )

    def ranked(self, statistics: Statistics) -> Statistics:
        """The statistics with the ranking that the plan follows from, where that takes long."""
        planned = self.plan is not None or stored_ranking(statistics, self.recipe) is not None
        if planned or not self.recipe.ranks_by_gram:
            return statistics
        weights = self.opened.blocks.ffn_weights
        return with_ranking(statistics, weights, self.recipe, curves=False, progress=self.progress)

    def identity(self, blocks: StoredBlocks) -> dict[str, Any]:
        """Everything that the bytes of the result follow from, as plain values."""

        def tokens(windows: torch.Tensor | None) -> str | None:
            return tokens_fingerprint(windows) if windows is not None else None

        plan, statistics = self.plan, self.statistics
        recipe = self.recipe.to_dict()
        del recipe["micro_batch"]  # what it asks for; the one in force counts
        return {
            "model": blocks.checkpoint_fingerprint(),
            "recipe": recipe,
            "micro-batch": self.micro_batch,
            "latency table": self.table.fingerprint() if self.table is not None else None,
            "plan": plan_to_dict(plan)["blocks"] if plan is not None else None,
            "statistics": statistics_fingerprint(statistics) if statistics is not None else None,
            "calibration text": tokens(self.windows),
            "refitting text": tokens(self.refit_windows),
            "evaluation text": tokens(self.held_out.tokens),
            "machine or version": versions(blocks.device),
        }


def _report(
    opened: OpenModel,
    plan: PruningPlan,
    statistics: Statistics | None,
    fits: Sequence[tuple[FitRecord, ...]],
    refitting: Refitting | None,
    sizes: Footprints,
    table: LatencyTable | None,
    before: Perplexity | None,
    after: Perplexity | None,
) -> PruneReport:
    return PruneReport(
        name=opened.name,
        plan=plan,
        statistics=statistics,
        fits=tuple(fits),
        refits=tuple(refitting.refits) if refitting is not None else (),
        sizes=sizes,
        table=table,
        perplexity_before=before,
        perplexity_after=after,
        stock=is_stock(opened.model),
        versions=versions(next(opened.model.parameters()).device),
    )


def _become_pruned_(opened: OpenModel, plan: PruningPlan) -> None:
    recipe = plan.recipe
    summary = {
        "scorer": recipe.scorer,
        "allocator": recipe.resolved_allocator,
        "compensation": recipe.resolved_compensation,
        "sparsity": round(plan.sparsity, 6),
    }
    become_pruned_(opened.model, opened.layout, summary)


def prune_live(run: Run, out: Path | None, *, given: bool) -> PruneResult:
    """Cut a model in memory; ``given``: by the caller, so that the result is that very model."""
    opened, held_out = run.opened, run.held_out
    if out is not None:
        check_out(out, run.overwrite)  # nothing here can be resumed
    statistics = run.calibrated(temporary_folder)
    plan = run.planned(statistics)

    def measure() -> Perplexity | None:
        if held_out.tokens is None:
            return None
        return perplexity(
            opened.model,
            held_out.tokens,
            dataset=held_out.dataset,
            counts=held_out.counts,
            progress=run.progress,
            ranks=run.ranks,
        )

    pruned = opened.model
    training = pruned.training
    pruned.eval()
    sizes = footprints(pruned, opened.layout, plan, run.table)
    before = measure()
    if run.ranks.any(run.stop()):
        raise Stopped
    refitting = run.refitting()
    fits = prune_model_(
        pruned, opened.layout, plan, statistics, refitting=refitting, progress=run.progress
    )
    _become_pruned_(opened, plan)
    report = _report(opened, plan, statistics, fits, refitting, sizes, run.table, before, measure())
    device = next(pruned.parameters()).device
    if out is not None and run.ranks.first:
        with new_folder(out, run.overwrite) as folder:
            write_model(pruned, opened.tokenizer, folder)
            write_documents(
                folder, plan, recipe_document(report), report.sizes.rows(), report.stock
            )
            expected = take_probe(pruned)
            if not given:
                empty_(pruned)  # one model in memory at a time
            reloaded = verify(folder, expected, device)
            if run.verify:
                write_hashes(folder, progress=run.progress)
        if not given:
            pruned = reloaded
    run.ranks.barrier()
    pruned.train(training)
    return PruneResult(opened.tokenizer, report, out, pruned, device)


@contextmanager
def _shared_folder(out: Path, overwrite: bool, resume: bool, ranks: Ranks) -> Iterator[Path]:
    """:func:`new_folder` of the first rank, for all to fill."""
    if ranks.first:
        with new_folder(out, overwrite, resume) as folder:
            yield folder
    else:
        try:
            yield partial_path(out)
        except OSError as error:
            hint = "--resume continues this run"
            raise CfspError(f"cannot write {out}: {error}; {hint}") from error
    ranks.barrier()


def prune_stored(run: Run, blocks: StoredBlocks, out: Path, resume: bool) -> PruneResult:
    """Cut a model from disk to disk, one block at a time; pass 2 reads each once for everything."""
    opened, ranks = run.opened, run.ranks
    identity = run.identity(blocks)
    ranks.check_same(identity)
    if resume:
        ranks.of_first(lambda: check_resume(partial_path(out), identity))
    with _shared_folder(out, run.overwrite, resume, ranks) as folder:
        if ranks.first:
            begin(folder, identity)
        check_shared(folder, ranks)
        statistics = ranks.of_first(lambda: kept_statistics(folder))
        if statistics is None:
            statistics = run.calibrated(lambda: kept_grams(folder))
        if statistics is not None and run.windows is not None and ranks.first:
            keep_statistics(folder, statistics)
            statistics = run.ranked(statistics)
            keep_statistics(folder, statistics)
        plan = run.planned(statistics)
        sizes = footprints(opened.model, opened.layout, plan, run.table)
        second = _second_pass(run, plan, statistics, folder)

        def finish() -> PruneReport:
            _become_pruned_(opened, plan)
            known = statistics.without_grams() if statistics is not None else None
            report = _report(
                opened,
                plan,
                known,
                second.fits,
                second.refitting,
                sizes,
                run.table,
                second.before,
                second.after,
            )
            write_settings(opened.model, opened.tokenizer, folder)
            write_documents(
                folder, plan, recipe_document(report), report.sizes.rows(), report.stock
            )
            empty_(opened.model)  # one model's embeddings in memory at a time
            verify_streamed(folder, second.probe, blocks.device)
            if run.verify:
                write_hashes(folder, progress=run.progress)
            end(folder)
            return report

        report = ranks.of_first(finish)
    return PruneResult(opened.tokenizer, report, out, None, blocks.device)


@dataclass(frozen=True)
class _SecondPass:
    """What pass 2 measured."""

    fits: tuple[tuple[FitRecord, ...], ...]
    """Of every block, on the first rank, which reads all."""
    refitting: Refitting | None
    before: Perplexity | None
    after: Perplexity | None
    probe: torch.Tensor
    """Logits [1, 16, V] of the probe tokens, on the first rank; the others have none."""


def _second_pass(
    run: Run, plan: PruningPlan, statistics: Statistics | None, folder: Path
) -> _SecondPass:
    """Write the shards, with each rank's share of the windows riding along; the probe rides on the
    first.

    Raises:
        Stopped: on every rank, after each has finished its shards or stopped between two.
    """
    opened, held_out, ranks = run.opened, run.held_out, run.ranks
    model, modules = opened.model, opened.layout.find_blocks(opened.model)
    own_probe = probe_tokens(model)[: 1 if ranks.first else 0]
    probe = RidingWindows(model, modules, own_probe)
    pair, tokens = [], held_out.tokens
    if tokens is not None:
        own = tokens[ranks.share(len(tokens))]
        pair = [RidingWindows(model, modules, own) for _ in ("before", "after")]
    refitting = run.refitting()
    stopped = False
    fits: dict[int, tuple[FitRecord, ...]] = {}
    try:
        fits = prune_to_shards_(
            opened,
            plan,
            statistics,
            folder,
            before=pair[:1],
            after=[*pair[1:], probe],
            refitting=refitting,
            stop=run.stop,
            progress=run.progress,
            ranks=ranks,
        )
    except Stopped:
        stopped = True
    if ranks.any(stopped):
        raise Stopped
    before = after = None
    if tokens is not None:
        before, after = (
            ridden_perplexity(
                riding, tokens, dataset=held_out.dataset, counts=held_out.counts, ranks=ranks
            )
            for riding in pair
        )
    logits = next(probe.logits(), torch.empty(0)).cpu()
    return _SecondPass(tuple(fits.values()), refitting, before, after, logits)
