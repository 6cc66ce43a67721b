"""The whole job: calibrate, plan, prune. Each step is also a function of its own."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .calibration.mixtures import dataset_paths
from .calibration.statistics import Statistics, check_text, load_statistics
from .calibration.windows import calibration_windows
from .costs.budgets import check_processes
from .costs.dry_run import Request
from .costs.hardware import device_capped, parse_memory
from .costs.latency import LatencyTable
from .costs.latency_measurement import table_for, table_of
from .distributed import ALONE, Ranks
from .errors import CfspError
from .evaluation.quality import EVALUATION_WINDOWS, held_out_text
from .io.outputs import new_folder
from .models.blocks import StoredBlocks
from .models.loading import model_device
from .models.opening import open_any
from .models.parts.channels import PartWeights
from .pruning.budget import BATCH, LENGTH
from .pruning.compensation import COMPENSATIONS
from .pruning.plan import PruningPlan, plan_of_all
from .pruning.planning import make_plan
from .pruning.recipe import Recipe
from .run import PruneResult, Run, prune_from_disk_to_disk, prune_in_memory, shared_output
from .run.checks import announced_micro_batch, check_files, check_job
from .run.depth import DepthCut, depth_of, known_depth
from .run.job import NOT_MEASURED, as_calibrated, plan_model
from .typed import check_whole


def calibrate(
    model: nn.Module | str | Path,
    tokenizer: Any = None,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    *,
    device: str = "auto",
    max_memory: str | None = None,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> Statistics:
    """Statistics of a dense model from one forward pass over the calibration tokens.

    Args:
        model: hub id, folder, .gguf file or a live causal LM of transformers.
        tokenizer: needed for a live model.
        recipe: what the statistics are for, and how many blocks stay. They serve any budget of
            these, and any other recipe whose scorer and allocator read sums alone.
        device: for a model given by name; a live model stays where it is.
        max_memory: see :func:`prune`.
        progress: show an estimate and a bar on stderr.
        ranks: see :func:`prune`; each process gets the same statistics.

    Raises:
        CfspError: bad input, in one line.
    """
    budget, progress = parse_memory(max_memory), progress and ranks.first
    if recipe.blocks is not None and isinstance(model, nn.Module):
        raise CfspError("blocks: a live model would lose its own; give it by name")
    opened = open_any(
        model,
        tokenizer,
        device=ranks.device(device),
        whole=recipe.chooses_by_loss,
        **recipe.opening,
    )
    depth = DepthCut.of(opened, recipe, None)
    windows = calibration_windows(opened.model, opened.tokenizer, recipe.calibration)
    chosen_by = depth.windows if depth is not None else 0
    request = Request(recipe, len(windows), prunes=False, ranks=ranks.size, depth_windows=chosen_by)
    micro_batch = announced_micro_batch(opened, depth, request, budget, progress, ranks)
    with device_capped(model_device(opened.model), budget.device):
        if depth is not None:
            how: dict[str, Any] = {"stop": bool, "progress": progress, "ranks": ranks}
            opened, _ = depth.cut_(opened, windows, NOT_MEASURED, micro_batch, **how)
        return Run(
            opened=opened,
            recipe=recipe,
            windows=windows,
            first_windows=len(windows),
            micro_batch=micro_batch,
            progress=progress,
            ranks=ranks,
        ).calibrated()


def latency_table(
    model: nn.Module | str | Path,
    *,
    batch: int = BATCH,
    length: int = LENGTH,
    context: int = 0,
    units: str = Recipe.units,
    dtype: str = "auto",
    device: str = "auto",
    again: bool = False,
    progress: bool = True,
) -> LatencyTable:
    """Seconds of a forward call of a model by the units of its parts, measured on a device.

    Args:
        model: hub id, folder, .gguf file or a live causal LM of transformers, dense.
        batch: windows of the call.
        length: tokens of each; 1 for a step of generation.
        context: tokens of each that are in the cache before it.
        units: what a recipe will remove, see :class:`cfsp.Recipe`: KV groups are measured where
            they are among them.
        dtype, device: for a model given by name.
        again: measure even where a table of the same is kept in ~/.cache/cfsp, or $CFSP_CACHE.
        progress: show a bar on stderr.

    Raises:
        CfspError: bad input, no memory for it, or no place to keep the table.
    """
    check_whole("batch", batch, 1)
    check_whole("length", length, 1)
    check_whole("context", context)
    recipe = Recipe(units=units)
    opened = open_any(model, None, dtype, device, attention=recipe.cuts_attention)
    whole_ffns, shape = recipe.removes_ffns, (batch, length, context)
    return table_of(opened, *shape, whole_ffns=whole_ffns, again=again, progress=progress)


def plan(
    statistics: Statistics,
    weights: Callable[[int], Sequence[PartWeights]] | nn.Module,
    recipe: Recipe,
    tokenizer: Any = None,
    *,
    progress: bool = False,
) -> PruningPlan:
    """Which channels of which block stay: score, allocate, select.

    Args:
        statistics: of the dense model.
        weights: the dense model, which a budget and allocator ``search`` need, or a function from
            block number to the matrices of its FFNs and experts. Read by some scorers only.
        recipe: scorer, allocator, importance, width multiple and sparsity or budget are read.
        tokenizer: for allocator ``search``.
        progress: show bars on stderr where it takes long.

    Raises:
        CfspError: no widths meet the sparsity or budget.
    """
    if isinstance(weights, nn.Module):
        opened = open_any(weights, tokenizer, **recipe.opening)
        return plan_model(opened, statistics, recipe, progress=progress)
    return make_plan(statistics, weights, recipe, progress=progress)


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
    """Remove FFN channels of a model.

    Args:
        model: hub id, folder, .gguf file, or a live causal LM of transformers, which is pruned
            in place and becomes an instance of the class that reloads it.
        tokenizer: needed for a live model, unless nothing is calibrated or evaluated.
        recipe: how to prune.
        out: folder for the result, which appears once it is complete; None keeps it in memory.
        statistics: of an earlier calibration of this model, instead of a new one.
        plan: apply this one; its own recipe is then what counts.
        eval_dataset: text, or mix of texts, to measure perplexity on before and after; None: the
            held-out parts of the calibration's datasets, or builtin where all are files.
        eval_windows: windows to measure on; 0 skips it. None: 16 where ``out`` is given.
        device: for a model given by name; a live model stays where it is.
        latency_table: of :func:`cfsp.latency_table` or a file of ``cfsp latency``, of the result's
            device. None: for a latency budget, measured once, kept in ~/.cache/cfsp or $CFSP_CACHE.
        max_memory: "20GiB" of the device, or "device=20GiB,host=8GiB"; on a CPU both are the
            process's memory. A micro-batch left open is the largest that fits, up to the default.
        overwrite: replace ``out``, where cfsp wrote all of it, and an interrupted run of it.
        resume: continue an interrupted run of the same model, recipe and text.
        verify: compare the SHA-256 of the model's weight files with what is known of them (see
            :func:`cfsp.io.hashes.known_hashes`), and list those of the result in ``SHA256SUMS``.
        stop: asked between blocks, for an orderly end before the last; then ``resume`` continues.
        progress: show an estimate and bars on stderr.
        ranks: of :func:`distributed.joined`, where several processes share the work; each makes
            this call, and ``out`` is on a file system that all see.

    Raises:
        CfspError: bad input, an ``out`` that cannot be or is in use, too little memory; the input
            and an existing ``out`` are untouched.
        Stopped: ``stop`` said so.
    """
    budget, progress = parse_memory(max_memory), progress and ranks.first
    source = None if isinstance(model, nn.Module) else model
    target = Path(out) if out is not None else None
    recipe = plan.recipe if plan is not None else recipe
    texts = dataset_paths(recipe.calibration.dataset, eval_dataset)
    inputs = [source, statistics, latency_table, *texts]
    with (
        nullcontext()
        if target is None
        else shared_output(target, new_folder(target, overwrite, resume, inputs), ranks)
    ):
        if isinstance(statistics, str | Path):
            statistics = load_statistics(statistics)
        if plan is None and statistics is not None:
            recipe = as_calibrated(recipe, statistics)
        if eval_windows is None:
            eval_windows = EVALUATION_WINDOWS if target is not None else 0
        check_whole("eval_windows", eval_windows)
        if verify and source is not None:
            check_files(source, progress, ranks)
        searches = recipe.searches and plan is None
        known = known_depth(plan, statistics, recipe)
        by_loss = recipe.chooses_by_loss and plan is None and known is None
        if searches or by_loss:
            check_processes(recipe, ranks.size)
        if latency_table is not None and (recipe.blocks is not None or known is not None):
            raise CfspError("a latency table is of all blocks: drop blocks or latency_table")

        # Open, resolve the budget, check.
        whole, device = target is None or searches or by_loss, ranks.device(device)
        opened = open_any(model, tokenizer, device=device, whole=whole, **recipe.opening)
        wanted = recipe.model_budget if plan is None else None
        whole_ffns = recipe.removes_ffns
        table = ranks.of_first(
            lambda: table_for(opened, wanted, latency_table, progress, whole_ffns=whole_ffns)
        )
        depth = DepthCut.of(opened, recipe, known)
        check_job(opened, depth, recipe, plan, statistics, table, ranks)

        # Estimate, with the texts at hand.
        held_out = held_out_text(opened, recipe.calibration, eval_dataset, eval_windows)
        compensation = COMPENSATIONS[recipe.resolved_compensation]
        reads_sums = compensation.needs_statistics and not recipe.fits
        planned = plan is not None or recipe.only_blocks
        calibrates = statistics is None and (not planned or reads_sums)
        windows, chooses = torch.empty(0, 0), depth is not None and depth.kept is None
        if calibrates or recipe.fits or recipe.refits or searches or chooses:
            windows = calibration_windows(opened.model, opened.tokenizer, recipe.calibration)
            if statistics is not None:
                check_text(statistics, windows)
        counts = recipe.statistics_windows if calibrates else 0, len(held_out.tokens)
        request = Request(recipe, *counts, plan=plan, ranks=ranks.size, table=table)
        if depth is not None:
            request = replace(request, depth_windows=depth.windows)
        micro_batch = announced_micro_batch(opened, depth, request, budget, progress, ranks)

        # Take blocks out, calibrate, plan, cut, document, verify, publish.
        how: dict[str, Any] = {"stop": stop, "progress": progress, "ranks": ranks}
        with device_capped(model_device(opened.model), budget.device):
            before = None
            if depth is not None:
                opened, before = depth.cut_(opened, windows, held_out, micro_batch, **how)
            if plan is None and recipe.only_blocks:
                units, fingerprint = opened.described.units, opened.blocks.fingerprint()
                plan = replace(plan_of_all(units, recipe, fingerprint), depth=depth_of(opened))
            run = Run(
                opened=opened,
                recipe=recipe,
                plan=plan,
                statistics=statistics,
                windows=windows,
                first_windows=recipe.statistics_windows,
                calibrates=calibrates,
                held_out=held_out,
                before=before,
                table=table,
                micro_batch=micro_batch,
                verify=verify,
                **how,
            )
            if target is not None and isinstance(opened.blocks, StoredBlocks):
                return prune_from_disk_to_disk(run, opened.blocks, target)
            return prune_in_memory(run, target, given=source is None)
