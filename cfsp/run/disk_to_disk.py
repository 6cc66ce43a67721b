"""Prune a model from disk to disk; pass 2 reads each block once, for everything."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from ..calibration.statistics import Statistics
from ..checkpoints import resume as state
from ..checkpoints.documents import write_documents
from ..checkpoints.folder import new_folder, partial_path, write_settings
from ..checkpoints.verification import probe_tokens, verify_streamed
from ..costs.footprint import footprints
from ..distributed import Ranks
from ..errors import CfspError, Stopped
from ..io.hashes import write_hashes
from ..models.blocks import StoredBlocks, empty_
from ..models.blockwise import RidingWindows
from ..pruning.compaction_streamed import prune_to_shards_
from ..pruning.plan import PruningPlan
from ..pruning.ranking import stored_ranking, with_ranking
from .job import Run
from .result import PruneReport, PruneResult, recipe_document


def prune_from_disk_to_disk(
    run: Run, blocks: StoredBlocks, out: Path, *, resume: bool
) -> PruneResult:
    """Calibrate, plan, cut, document, verify and publish, on every rank."""
    opened, ranks, identity = run.opened, run.ranks, run.identity(blocks)
    ranks.check_same(identity)
    if resume:
        ranks.of_first(lambda: state.check_resume(partial_path(out), identity))
    with _shared_folder(out, run.overwrite, resume, ranks) as folder:
        if ranks.first:
            state.begin(folder, identity)
        state.check_shared(folder, ranks)
        statistics = _calibrated(run, folder)
        plan = run.planned(statistics)
        finish_, probe = _cut(run, plan, statistics, folder)

        def publish() -> PruneReport:
            report = finish_()
            rows = report.sizes.rows()
            write_settings(opened.model, opened.tokenizer, folder)
            write_documents(folder, plan, recipe_document(report), rows, report.stock)
            empty_(opened.model)  # one model's embeddings in memory at a time
            verify_streamed(folder, probe, blocks.device)
            if run.verify:
                write_hashes(folder, progress=run.progress)
            state.end(folder)
            return report

        report = ranks.of_first(publish)
    return PruneResult(opened.tokenizer, report, out, None, blocks.device)


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
            message = f"cannot write {out}: {error}; `resume=True` continues this run"
            raise CfspError(message) from error
    ranks.barrier()


def _calibrated(run: Run, folder: Path) -> Statistics | None:
    """The statistics given, those that an interrupted run kept, or new ones, which are kept: first
    alone, then with the ranking that the plan follows from, where that takes long."""
    if not run.calibrates:
        return run.statistics
    recipe, statistics = run.recipe, run.ranks.of_first(lambda: state.kept_statistics(folder))
    if statistics is None:
        statistics = run.calibrated(lambda: state.kept_grams(folder))
        if run.ranks.first:
            state.keep_statistics(folder, statistics)
    if not run.ranks.first:
        return statistics
    planned = run.plan is not None or stored_ranking(statistics, recipe) is not None
    if recipe.ranks_by_gram and not planned:
        weights = run.opened.blocks.ffn_weights
        statistics = with_ranking(statistics, weights, recipe, curves=False, progress=run.progress)
        state.keep_statistics(folder, statistics)
    return statistics


def _cut(
    run: Run, plan: PruningPlan, statistics: Statistics | None, folder: Path
) -> tuple[Callable[[], PruneReport], torch.Tensor]:
    """Write the shards, with each rank's share of the held-out windows riding along; raises Stopped
    on every rank, after each has finished its shards or stopped between two.

    Gives, for the first rank, which reads all blocks, :meth:`Run.finish_` with what was measured,
    and the logits [1, 16, V] of the probe tokens.
    """
    opened, held_out, ranks = run.opened, run.held_out, run.ranks
    model, modules = opened.model, opened.layout.find_blocks(opened.model)
    sizes = footprints(opened.described, plan, run.table)
    own_probe = probe_tokens(model)[: 1 if ranks.first else 0]
    probe = RidingWindows(model, modules, own_probe)
    own = held_out.tokens[ranks.share(len(held_out.tokens))]
    dense, pruned = RidingWindows(model, modules, own), RidingWindows(model, modules, own)
    refitting = run.refitting()
    before, after = ([w.ride for w in x if len(w.windows)] for x in ([dense], [pruned, probe]))
    if refitting is not None:
        before, after = [*before, refitting.run_dense], [refitting.run_pruned, *after]
    inputs, fits = (opened, plan, statistics, folder), None
    with suppress(Stopped):
        fits = prune_to_shards_(
            *inputs, before=before, after=after, stop=run.stop, progress=run.progress, ranks=ranks
        )
    stopped = ranks.any(fits is None)
    if fits is None or stopped:
        raise Stopped
    measured = [held_out.of_logits(w.logits(), ranks, w.seconds) for w in (dense, pruned)]
    logits = next(probe.logits(), torch.empty(0)).cpu()
    known = statistics.without_grams() if statistics is not None else None
    return partial(run.finish_, plan, known, sizes, fits, refitting, *measured), logits
