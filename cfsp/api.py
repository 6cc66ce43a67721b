"""The whole job: calibrate, plan, prune, measure, save. Each step is also a function of its own."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .calibration.grams import temporary_folder
from .calibration.statistics import Statistics, check_grams, check_statistics, load_statistics
from .calibration.windows import Calibration, calibration_windows
from .checkpoints.folder import check_out
from .costs.dry_run import Job, estimate_opened
from .costs.feasibility import check_biases, check_recipe
from .costs.footprint import plan_within
from .costs.hardware import device_capped
from .costs.latency import LatencyTable
from .costs.latency_measurement import table_for, table_of
from .distributed import ALONE, Ranks
from .errors import CfspError
from .evaluation.held_out import held_out_text
from .evaluation.quality import EVALUATION_WINDOWS, perplexity
from .io.hashes import check_hashes, known_hashes
from .io.memory import MemoryBudget, parse_budget
from .models.blocks import StoredBlocks
from .models.channels import FFNWeights
from .models.loading import OpenModel, adopt, model_device, open_model
from .models.opening import open_lean, weight_files
from .pruning.budget import BATCH, LENGTH
from .pruning.compaction import check_plan
from .pruning.compensation import NEEDS_STATISTICS
from .pruning.plan import PruningPlan, make_plan
from .pruning.ranking import stored_ranking
from .pruning.recipe import Recipe
from .pruning.refit import check_refits
from .pruning.search import width_search
from .run import PruneResult, Run, collect, prune_live, prune_stored


def _open(
    model: nn.Module | str | Path, tokenizer: Any, dtype: str, device: str, *, streamed: bool = True
) -> OpenModel:
    """A live model as it is; one given by name block by block where that can be."""
    if isinstance(model, nn.Module):
        return adopt(model, tokenizer)
    opened = (open_lean if streamed else open_model)(model, dtype, device)
    return dataclasses.replace(opened, tokenizer=tokenizer or opened.tokenizer)


def _count(windows: torch.Tensor | None) -> int:
    return len(windows) if windows is not None else 0


def _announced(
    opened: OpenModel, job: Job, budget: MemoryBudget, progress: bool, ranks: Ranks
) -> int:
    """Windows per forward call, the same on every rank, after the estimate was printed and found to
    fit the budget."""
    estimate = estimate_opened(opened, job, budget, measure=progress)
    if progress:
        print(estimate.summary(), file=sys.stderr)
    estimate.check(budget)
    return -int(ranks.most(-estimate.micro_batch))


def calibrate(
    model: nn.Module | str | Path,
    tokenizer: Any = None,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    *,
    gram: bool | None = None,
    gram_folder: str | Path | None = None,
    device: str = "auto",
    max_memory: str | None = None,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> Statistics:
    """Statistics of a dense model from one forward pass over the calibration tokens.

    Args:
        model: hub id, folder, .gguf file or a live causal LM of transformers.
        tokenizer: needed for a live model.
        recipe: its ``calibration``, ``dtype`` and ``micro_batch`` are read.
        gram: collect Gram matrices too; see docs/streaming.md for what they take. None: where the
            recipe needs them, as the default one does.
        gram_folder: a new folder where they go, block by block, until
            :func:`cfsp.save_statistics` puts them beside the statistics; it is removed with the
            result. None: one where temporary files go.
        device: for a model given by name; a live model stays where it is.
        max_memory: see :func:`prune`.
        progress: show an estimate and a bar on stderr.
        ranks: of :func:`distributed.joined`, where several processes share the work; each calls
            this with the same arguments and gets the same statistics.

    Raises:
        CfspError: bad input, in one line.
    """
    budget = parse_budget(max_memory)
    progress = progress and ranks.first
    gram = recipe.needs_gram() is not None if gram is None else gram
    opened = _open(model, tokenizer, recipe.dtype, ranks.device(device))
    windows = calibration_windows(opened.model, opened.tokenizer, recipe.calibration)
    job = Job(recipe, len(windows), prunes=False, gram=gram, ranks=ranks.size)
    micro_batch = _announced(opened, job, budget, progress, ranks)
    folder = Path(gram_folder) if gram_folder is not None else None
    grams = ranks.of_first(lambda: temporary_folder(folder)) if gram else None
    with device_capped(model_device(opened.model), budget.device):
        return collect(opened, recipe, windows, micro_batch, progress, ranks=ranks, grams=grams)


def latency_table(
    model: nn.Module | str | Path,
    *,
    batch: int = BATCH,
    length: int = LENGTH,
    dtype: str = "auto",
    device: str = "auto",
    again: bool = False,
    progress: bool = True,
) -> LatencyTable:
    """Seconds of a forward call of a model by the widths of its FFNs, measured on a device.

    Args:
        model: hub id, folder, .gguf file or a live causal LM of transformers, dense.
        batch: windows of the call.
        length: tokens of each; 1 for a step of generation.
        dtype: for a model given by name.
        device: for a model given by name.
        again: measure even where a table of the same is kept in ~/.cache/cfsp, or $CFSP_CACHE.
        progress: show a bar on stderr.

    Raises:
        CfspError: bad input, no memory for it, or no place to keep the table.
    """
    if min(batch, length) < 1:
        raise CfspError(f"batch and length must be 1 or more, got {batch} x {length}")
    opened = _open(model, None, dtype, device)
    return table_of(opened, batch, length, again=again, progress=progress)


def plan(
    statistics: Statistics,
    weights: Callable[[int], Sequence[FFNWeights]] | nn.Module,
    recipe: Recipe,
    tokenizer: Any = None,
    *,
    progress: bool = False,
) -> PruningPlan:
    """Which channels of which block stay: score, allocate, select.

    Args:
        statistics: of the dense model.
        weights: the dense model, or a function from block number to the matrices of its FFNs, one
            :class:`FFNWeights` for a plain block, one per expert elsewhere. Not
            touched by scorers that need no weights.
        recipe: scorer, allocator, importance, width multiple and sparsity or budget are read. A
            budget needs the model, and so does allocator ``search``, which measures it.
        tokenizer: for allocator ``search``.
        progress: show bars on stderr where it takes long.

    Raises:
        CfspError: no widths meet the sparsity or budget.
    """
    if isinstance(weights, nn.Module):
        return plan_opened(adopt(weights, tokenizer), statistics, recipe, progress=progress)
    return make_plan(statistics, weights, recipe, progress=progress)


def search_windows(
    opened: OpenModel, recipe: Recipe, windows: torch.Tensor | None = None
) -> torch.Tensor | None:
    """What a search measures on: the calibration's last windows; None where nothing is searched.

    ``windows``: those of the calibration, where they are at hand.
    """
    if not recipe.searches:
        return None
    if windows is None:
        windows = calibration_windows(opened.model, opened.tokenizer, recipe.calibration)
    return windows[-recipe.search_windows :]


def plan_opened(
    opened: OpenModel,
    statistics: Statistics,
    recipe: Recipe,
    table: LatencyTable | None = None,
    *,
    progress: bool = False,
) -> PruningPlan:
    """The plan for an open model, which is in memory where its widths are searched for."""
    model, layout, windows = opened.model, opened.layout, search_windows(opened, recipe)
    search = None
    if windows is not None:

        def measure() -> float:
            return perplexity(model, windows, progress=False).perplexity

        search = width_search(model, layout, statistics, recipe, measure, progress=progress)
    given = opened.blocks.ffn_weights
    return plan_within(
        statistics, given, recipe, model, layout, table, search=search, progress=progress
    )


def as_calibrated(recipe: Recipe, statistics: Statistics) -> Recipe:
    """The recipe that would make these statistics: theirs is the calibration that counts."""
    known = statistics.provenance.get("calibration")
    calibration = Calibration(**known) if known else recipe.calibration
    return dataclasses.replace(recipe, calibration=calibration)


def _check_files(model: str | Path, progress: bool, ranks: Ranks) -> None:
    """Raise CfspError on every rank where a weight file is not what it should be."""
    problem = None
    try:
        known = list(known_hashes(weight_files(model)).items())
        check_hashes(dict(known[ranks.share(len(known))]), progress=progress)
    except CfspError as error:
        problem = str(error)
    ranks.check(problem)


def prune(
    model: nn.Module | str | Path,
    tokenizer: Any = None,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    out: str | Path | None = None,
    *,
    statistics: Statistics | str | Path | None = None,
    plan: PruningPlan | None = None,
    eval_dataset: str | None = None,
    eval_windows: int | None = None,
    device: str = "auto",
    latency_table: LatencyTable | str | Path | None = None,
    max_memory: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    verify: bool = False,
    stop: Callable[[], bool] = bool,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> PruneResult:
    """Remove FFN channels of a model after one calibration pass.

    Args:
        model: hub id, folder, .gguf file, or a live causal LM of transformers, which is pruned
            in place and becomes an instance of the class that reloads it.
        tokenizer: needed for a live model, unless ``statistics`` are given and nothing is
            evaluated.
        recipe: how to prune.
        out: folder for the result; None keeps it in memory. It appears when it is whole.
        statistics: of an earlier calibration of this model, instead of a new one.
        plan: apply this one; its own recipe is then what counts.
        eval_dataset: measure perplexity before and after on this text, or mix of texts; None:
            the held-out parts of the calibration's datasets, or builtin where all are files.
        eval_windows: windows to measure on; 0 skips it. None: 16 where ``out`` is given.
        device: for a model given by name; a live model stays where it is.
        latency_table: of :func:`cfsp.latency_table` or a file of ``cfsp latency``, measured on the
            device that the result is for. Where the recipe's budget is a latency and this is None,
            the model is measured on its device here, once: the table is kept in ~/.cache/cfsp, or
            $CFSP_CACHE.
        max_memory: what the run may take: "20GiB" of the device, or "device=20GiB,host=8GiB"; on a
            CPU both are the process's memory. The micro-batch, where the recipe has none, is the
            largest that fits, up to the default.
        overwrite: replace ``out`` where it exists, and an interrupted run of it.
        resume: continue a run of the same model, recipe and text that was interrupted.
        verify: compare the SHA-256 of the model's weight files with what is known of them (see
            :func:`cfsp.io.hashes.known_hashes`), and list those of the result in ``SHA256SUMS``.
        stop: asked between blocks, for an orderly end before the last; then ``resume`` continues.
        progress: show an estimate and bars on stderr.
        ranks: of :func:`distributed.joined`, where several processes share the work; each calls
            this with the same arguments, and ``out`` is on a file system that all see.

    Raises:
        CfspError: bad input or too little memory, in one line; the input and an existing ``out``
            are untouched.
        Stopped: ``stop`` said so.
    """
    budget = parse_budget(max_memory)
    if plan is not None:
        recipe = plan.recipe
    if out is not None:
        source = None if isinstance(model, nn.Module) else model
        check_out(Path(out), overwrite, source, resume=resume)
    if isinstance(statistics, str | Path):
        statistics = load_statistics(statistics)
    if statistics is not None and plan is None:
        recipe = as_calibrated(recipe, statistics)
    if eval_windows is None:
        eval_windows = EVALUATION_WINDOWS if out is not None else 0
    if eval_windows < 0:
        raise CfspError(f"eval_windows must be 0 or more, got {eval_windows}")

    if verify and not isinstance(model, nn.Module):
        _check_files(model, progress and ranks.first, ranks)
    where = ranks.device(device)
    searches = recipe.searches and plan is None
    if searches and ranks.size > 1:
        raise CfspError("allocator 'search' is for one process: make a plan with `cfsp plan`")
    streamed = out is not None and not searches
    opened = _open(model, tokenizer, recipe.dtype, where, streamed=streamed)
    layout = opened.layout
    fingerprint = opened.blocks.fingerprint()
    wanted = recipe.model_budget if plan is None else None
    table = ranks.of_first(lambda: table_for(opened, wanted, latency_table, progress))
    if plan is not None:
        check_biases(opened.model, layout, recipe.resolved_compensation)
        check_plan(plan, opened.model, layout, fingerprint)
    else:
        check_recipe(opened.model, layout, recipe, table)
    if statistics is not None:
        check_statistics(statistics, opened.model, layout, fingerprint)
        planned = plan is not None or stored_ranking(statistics, recipe) is not None
        if reader := recipe.needs_gram(planned):
            check_grams(statistics, reader)
    held_out = held_out_text(opened, recipe.calibration, eval_dataset, eval_windows)

    windows = None
    compensation = recipe.resolved_compensation
    if statistics is None and (plan is None or compensation in NEEDS_STATISTICS):
        windows = calibration_windows(opened.model, opened.tokenizer, recipe.calibration)
    refit_windows = None
    if recipe.refits:
        check_refits(opened.model, layout, ranks)
        refit_windows = (
            windows
            if windows is not None
            else calibration_windows(opened.model, opened.tokenizer, recipe.calibration)
        )
    progress = progress and ranks.first
    job = Job(recipe, _count(windows), _count(held_out.tokens), plan=plan, ranks=ranks.size)
    job = dataclasses.replace(job, table=table)
    micro_batch = _announced(opened, job, budget, progress, ranks)
    run = Run(
        opened,
        recipe,
        plan,
        statistics,
        windows,
        refit_windows,
        micro_batch,
        held_out,
        overwrite,
        verify,
        stop,
        progress,
        ranks,
        search_windows(opened, recipe, windows) if searches else None,
        table,
    )
    folder = Path(out) if out is not None else None
    with device_capped(model_device(opened.model), budget.device):
        if folder is not None and isinstance(opened.blocks, StoredBlocks):
            return prune_stored(run, opened.blocks, folder, resume)
        return prune_live(run, folder, given=isinstance(model, nn.Module))
