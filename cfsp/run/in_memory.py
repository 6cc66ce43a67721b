"""Prune a model that is in memory, in place."""

from pathlib import Path

from transformers import PreTrainedModel

from ..calibration.grams import temporary_folder
from ..checkpoints.documents import write_documents
from ..checkpoints.folder import check_out, new_folder, write_model
from ..checkpoints.verification import take_probe, verify
from ..costs.footprint import footprints
from ..errors import Stopped
from ..io.hashes import write_hashes
from ..models.blocks import empty_
from ..models.loading import model_device
from ..pruning.compaction import prune_model_
from .job import Run
from .result import PruneReport, PruneResult, recipe_document


def prune_in_memory(run: Run, out: Path | None, *, given: bool) -> PruneResult:
    """Calibrate, plan, cut, document, verify and publish; ``given``: the model is the caller's own,
    so that the result is that very model."""
    layout, model = run.opened.layout, run.opened.model
    if out is not None:
        check_out(out, run.overwrite)  # nothing here can be resumed
    statistics = run.calibrated(temporary_folder)
    plan = run.planned(statistics)
    training, device = model.training, model_device(model)
    model.eval()
    sizes, before = footprints(run.opened.described, plan, run.table), run.measured()
    if run.ranks.any(run.stop()):
        raise Stopped
    refitting = run.refitting()
    visits = ([refitting.run_dense], [refitting.run_pruned]) if refitting is not None else ((), ())
    fits = prune_model_(model, layout, plan, statistics, *visits, progress=run.progress)
    report = run.finish_(plan, statistics, sizes, fits, refitting, before, run.measured())
    if out is not None and run.ranks.first:
        model = _published(run, report, out, given)
    run.ranks.barrier()
    model.train(training)
    return PruneResult(run.opened.tokenizer, report, out, model, device)


def _published(run: Run, report: PruneReport, out: Path, given: bool) -> PreTrainedModel:
    """The model after it was written, reloaded and compared: the caller's own, or the new one."""
    model, sizes = run.opened.model, report.sizes.rows()
    device = model_device(model)
    with new_folder(out, run.overwrite) as folder:
        write_model(model, run.opened.tokenizer, folder)
        write_documents(folder, report.plan, recipe_document(report), sizes, report.stock)
        expected = take_probe(model)
        if not given:
            empty_(model)  # one model in memory at a time
        reloaded = verify(folder, expected, device)
        if run.verify:
            write_hashes(folder, progress=run.progress)
    return model if given else reloaded
