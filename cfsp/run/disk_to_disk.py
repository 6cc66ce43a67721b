"""Prune a model from disk to disk; pass 2 reads each block once, for everything."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..calibration.statistics import Statistics, load_statistics, save_statistics
from ..checkpoints import resume as state
from ..checkpoints.documents import write_documents
from ..checkpoints.folder import write_settings
from ..checkpoints.verification import probe_tokens, verify_streamed
from ..costs.footprint import footprints
from ..errors import RankLost, Stopped
from ..io.hashes import write_hashes
from ..io.outputs import staged
from ..models.blocks import StoredBlocks, empty_
from ..models.blockwise import RidingWindows
from ..pruning.compaction_streamed import prune_to_shards_
from ..pruning.plan import PruningPlan
from .job import Run
from .result import PruneReport, PruneResult, recipe_document


def prune_from_disk_to_disk(run: Run, blocks: StoredBlocks, out: Path) -> PruneResult:
    """Calibrate, plan, cut, document and verify what is then published, on every rank; go on where
    an interrupted run of the same is there."""
    opened, ranks, identity = run.opened, run.ranks, run.identity(blocks)
    folder = staged(out)
    staging = folder.parent
    ranks.check_same(identity)
    ranks.of_first(lambda: state.begin(staging, identity))
    state.check_shared(staging, ranks)
    statistics = _calibrated(run, staging)
    plan = run.planned(statistics)
    finish_, probe = _cut(run, blocks, plan, statistics, folder)

    def completed() -> PruneReport:
        report = finish_()
        rows = report.sizes.rows()
        write_settings(opened, folder)
        document = recipe_document(report)
        write_documents(folder, report.plan, document, rows, report.stock, opened.folder)
        empty_(opened.model)  # one model's embeddings in memory at a time
        verify_streamed(folder, probe, blocks.device)
        if run.verify:
            write_hashes(folder, progress=run.progress)
        return report

    report = ranks.of_first(completed)
    return PruneResult(opened.tokenizer, report, out, None, blocks.device)


def _calibrated(run: Run, staging: Path) -> Statistics | None:
    """The statistics given, those that an interrupted run kept, or new ones, which are kept."""
    if not run.calibrates:
        return run.statistics
    file = staging / state.STATISTICS
    statistics = run.ranks.of_first(lambda: load_statistics(file) if file.is_file() else None)
    if statistics is None:
        statistics = run.calibrated()
        if run.ranks.first:
            save_statistics(statistics, file)
    return statistics


def _cut(
    run: Run,
    blocks: StoredBlocks,
    plan: PruningPlan,
    statistics: Statistics | None,
    folder: Path,
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
    cut, fits = run.second_pass(plan, statistics), None
    try:
        fits = prune_to_shards_(
            opened,
            blocks,
            plan,
            cut.turn,
            folder,
            before=[w.ride for w in [dense] if len(w.windows) and opened.dense is None],
            after=[*cut.visits, *(w.ride for w in (pruned, probe) if len(w.windows))],
            stop=run.stop,
            finished_shard=state.keep_shard,
            progress=run.progress,
            ranks=ranks,
            together=cut.dense is not None,
        )
    except RankLost:  # nobody is there to agree with
        raise
    except Stopped:
        pass
    stopped = ranks.any(fits is None)
    if fits is None or stopped:
        raise Stopped
    measured = [
        run.before
        if ridden is dense and opened.dense is not None
        else held_out.of_logits(ridden.logits(), ranks, ridden.seconds)
        for ridden in (dense, pruned)
    ]
    logits = next(probe.logits(), torch.empty(0)).cpu()
    return partial(run.finish_, cut, sizes, fits, *measured), logits
