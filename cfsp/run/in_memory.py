"""Prune a model that is in memory, in place."""

from functools import partial
from pathlib import Path

from ..checkpoints.documents import write_documents
from ..checkpoints.folder import check_saveable, write_model
from ..checkpoints.verification import take_probe, verify
from ..costs.footprint import footprints
from ..errors import Stopped
from ..io.hashes import write_hashes
from ..io.outputs import staged
from ..models.blocks import empty_
from ..models.loading import model_device
from ..pruning.compaction import prune_model_
from .job import Run
from .result import PruneResult, recipe_document


def prune_in_memory(run: Run, out: Path | None, *, given: bool) -> PruneResult:
    """Calibrate, plan, cut, document and verify what is then published; ``given``: the model is the
    caller's own, so that the result is that very model."""
    opened, model, ranks = run.opened, run.opened.model, run.ranks
    if given and out is not None:
        check_saveable(model)
    statistics = run.calibrated() if run.calibrates else run.statistics
    plan = run.planned(statistics)
    training, device = model.training, model_device(model)
    model.eval()
    measure = partial(run.held_out.measure, model, progress=run.progress, ranks=ranks)
    sizes = footprints(opened.described, plan, run.table)
    before = run.before if opened.dense is not None else measure()
    if ranks.any(run.stop()):
        raise Stopped
    cut = run.second_pass(plan, statistics)
    fits = prune_model_(
        model, opened.layout, plan.recipe, cut.turn, cut.visits, progress=run.progress
    )
    report = run.finish_(cut, sizes, fits, before, measure())
    if out is not None and ranks.first:
        folder = staged(out)
        write_model(opened, folder)
        document, rows = recipe_document(report), sizes.rows()
        write_documents(folder, cut.plan, document, rows, report.stock, opened.folder)
        expected = take_probe(model)
        if not given:
            empty_(model)  # one model in memory at a time
        reloaded = verify(folder, expected, device)
        if run.verify:
            write_hashes(folder, progress=run.progress)
        model = model if given else reloaded
    ranks.barrier()
    model.train(training)
    return PruneResult(opened.tokenizer, report, out, model, device)
