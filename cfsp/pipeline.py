"""The whole job: calibrate, plan, prune, measure, save. Each step is also a function of its own."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .allocation import check_budget
from .blocks import StoredBlocks, empty_
from .checkpoint import (
    become_pruned_,
    check_out,
    is_stock,
    load,
    new_folder,
    partial_folder,
    probe_tokens,
    take_probe,
    verify,
    write_documents,
    write_model,
    write_settings,
)
from .collection import collect_statistics
from .compensation import NEEDS_STATISTICS
from .errors import CfspError, Stopped
from .evaluation import Perplexity, evaluation_windows, perplexity, ridden_perplexity
from .layouts import FFNWeights
from .models import OpenModel, adopt, open_model, quiet_loading
from .plan import PruningPlan, make_plan, plan_to_dict
from .provenance import tokens_fingerprint, versions
from .recipe import Calibration, Recipe
from .report import PruneReport, model_card, recipe_document
from .resume import begin, check_resume, end, keep_statistics, kept_statistics
from .rewriting import check_plan, prune_model_
from .second_pass import prune_to_shards_
from .statistics import Statistics, check_statistics, load_statistics, statistics_fingerprint
from .stream import RidingWindows
from .streaming import open_lean, verify_streamed
from .text import CALIBRATE, DATASETS, bos_token, load_text, random_windows, tokenize

EVALUATION_WINDOWS = 16


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


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model; tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_seqlen(model: PreTrainedModel, seqlen: int) -> None:
    """Raise CfspError where a window is longer than the model has positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and seqlen > limit:
        raise CfspError(f"seqlen {seqlen} is beyond the model's {limit} positions")


def _open(
    model: nn.Module | str | Path, tokenizer: Any, dtype: str, device: str, *, streamed: bool = True
) -> OpenModel:
    """A live model as it is; one given by name block by block where that can be."""
    if isinstance(model, nn.Module):
        return adopt(model, tokenizer)
    opened = (open_lean if streamed else open_model)(model, dtype, device)
    return dataclasses.replace(opened, tokenizer=tokenizer or opened.tokenizer)


def calibration_windows(
    model: PreTrainedModel, tokenizer: Any, settings: Calibration
) -> torch.Tensor:
    """Token windows [samples, seqlen] that a calibration runs on.

    Raises:
        CfspError: seqlen beyond the model's positions, unknown dataset, too few tokens.
    """
    check_seqlen(model, settings.seqlen)
    if tokenizer is None:
        raise CfspError("a live model needs its tokenizer to be calibrated on a dataset")
    tokens = tokenize(tokenizer, load_text(settings.dataset, CALIBRATE))
    bos = bos_token(tokenizer, settings.bos)
    return random_windows(tokens, settings.samples, settings.seqlen, settings.seed, bos)


def _collect(
    opened: OpenModel,
    recipe: Recipe,
    windows: torch.Tensor,
    progress: bool,
    stop: Callable[[], bool] = bool,
) -> Statistics:
    return collect_statistics(
        opened.model,
        opened.layout,
        windows,
        micro_batch=recipe.micro_batch,
        provenance={
            "model": opened.name,
            "calibration": dataclasses.asdict(recipe.calibration),
        },
        progress=progress,
        weights=opened.blocks,
        stop=stop,
    )


def calibrate(
    model: nn.Module | str | Path,
    tokenizer: Any = None,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    *,
    device: str = "auto",
    progress: bool = True,
) -> Statistics:
    """Statistics of a dense model from one forward pass over the calibration tokens.

    Args:
        model: hub id, folder, .gguf file or a live causal LM of transformers.
        tokenizer: needed for a live model.
        recipe: its ``calibration``, ``dtype`` and ``micro_batch`` are read.
        device: for a model given by name; a live model stays where it is.
        progress: show a bar on stderr.

    Raises:
        CfspError: bad input, in one line.
    """
    opened = _open(model, tokenizer, recipe.dtype, device)
    windows = calibration_windows(opened.model, opened.tokenizer, recipe.calibration)
    return _collect(opened, recipe, windows, progress)


def plan(
    statistics: Statistics, weights: Callable[[int], FFNWeights] | nn.Module, recipe: Recipe
) -> PruningPlan:
    """Which channels of which block stay: score, allocate, select.

    Args:
        statistics: of the dense model.
        weights: the dense model, or a function from block number to its FFN matrices. Not
            touched by scorers that need no weights.
        recipe: scorer, allocator, importance, sparsity and width multiple are read.

    Raises:
        CfspError: no widths meet the sparsity.
    """
    if isinstance(weights, nn.Module):
        weights = adopt(weights, None).blocks.ffn_weights
    return make_plan(statistics, weights, recipe)


def as_calibrated(recipe: Recipe, statistics: Statistics) -> Recipe:
    """The recipe that would make these statistics: theirs is the calibration that counts."""
    known = statistics.provenance.get("calibration")
    calibration = Calibration(**known) if known else recipe.calibration
    return dataclasses.replace(recipe, calibration=calibration)


@dataclass(frozen=True)
class HeldOut:
    """What a model is measured on before and after."""

    dataset: str
    tokens: torch.Tensor | None
    """[N, S] int64; None where nothing is measured."""


def _held_out(opened: OpenModel, recipe: Recipe, dataset: str | None, windows: int) -> HeldOut:
    """Held-out windows to measure on. A local calibration file has no held-out part of its own,
    so the text that ships with Python stands in unless ``dataset`` names another."""
    if windows == 0:
        return HeldOut("", None)
    name = dataset or recipe.calibration.dataset
    if dataset is None and name not in DATASETS:
        name = "builtin"
    seqlen = recipe.calibration.seqlen
    check_seqlen(opened.model, seqlen)
    if opened.tokenizer is None:
        raise CfspError("a live model needs its tokenizer to be evaluated; eval_windows=0 skips it")
    bos = recipe.calibration.bos
    return HeldOut(name, evaluation_windows(opened.tokenizer, name, seqlen, windows, bos))


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
    overwrite: bool = False,
    resume: bool = False,
    stop: Callable[[], bool] = bool,
    progress: bool = True,
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
        eval_dataset: measure perplexity before and after on this text; None: the held-out part
            of the calibration dataset.
        eval_windows: windows to measure on; 0 skips it. None: 16 where ``out`` is given.
        device: for a model given by name; a live model stays where it is.
        overwrite: replace ``out`` where it exists.
        resume: continue a run of the same model, recipe and text that was interrupted.
        stop: asked between blocks, for an orderly end before the last; then ``resume`` continues.
        progress: show bars on stderr.

    Raises:
        CfspError: bad input, in one line; the input and an existing ``out`` are untouched.
        Stopped: ``stop`` said so.
    """
    if plan is not None:
        recipe = plan.recipe
    if out is not None:
        check_out(Path(out), overwrite, None if isinstance(model, nn.Module) else model)
    if isinstance(statistics, str | Path):
        statistics = load_statistics(statistics)
    if statistics is not None and plan is None:
        recipe = as_calibrated(recipe, statistics)
    if eval_windows is None:
        eval_windows = EVALUATION_WINDOWS if out is not None else 0
    if eval_windows < 0:
        raise CfspError(f"eval_windows must be 0 or more, got {eval_windows}")

    opened = _open(model, tokenizer, recipe.dtype, device, streamed=out is not None)
    layout = opened.layout
    fingerprint = opened.blocks.fingerprint()
    sizes = layout.intermediate_sizes(opened.model)
    if plan is not None:
        check_plan(plan, opened.model, layout, fingerprint)
    else:
        check_budget(sizes, (1 - recipe.sparsity) * sum(sizes), recipe.width_multiple)
    if statistics is not None:
        check_statistics(statistics, opened.model, layout, fingerprint)
    held_out = _held_out(opened, recipe, eval_dataset, eval_windows)

    windows = None
    compensation = recipe.resolved_compensation
    if statistics is None and (plan is None or compensation in NEEDS_STATISTICS):
        windows = calibration_windows(opened.model, opened.tokenizer, recipe.calibration)
    run = _Run(opened, recipe, plan, statistics, windows, held_out, overwrite, stop, progress)
    if out is not None and isinstance(opened.blocks, StoredBlocks):
        return _prune_stored(run, opened.blocks, Path(out), resume)
    where = Path(out) if out is not None else None
    return _prune_live(run, where, given=isinstance(model, nn.Module))


@dataclass(frozen=True)
class _Run:
    """A checked job, the same whether the model is in memory or on disk."""

    opened: OpenModel
    recipe: Recipe
    plan: PruningPlan | None
    statistics: Statistics | None
    windows: torch.Tensor | None
    """[N, S] calibration tokens; None where no calibration is needed."""
    held_out: HeldOut
    overwrite: bool
    stop: Callable[[], bool]
    progress: bool

    def calibrated(self) -> Statistics | None:
        """The statistics given, or those of a pass over the calibration tokens."""
        if self.windows is None:
            return self.statistics
        return _collect(self.opened, self.recipe, self.windows, self.progress, self.stop)

    def planned(self, statistics: Statistics | None) -> PruningPlan:
        """The plan given, or the one that statistics make."""
        if self.plan is not None:
            return self.plan
        if statistics is None:
            raise ValueError("a run has a plan or statistics")
        return make_plan(statistics, self.opened.blocks.ffn_weights, self.recipe)

    def identity(self, blocks: StoredBlocks) -> dict[str, Any]:
        """Everything that the bytes of the result follow from, as plain values."""

        def tokens(windows: torch.Tensor | None) -> str | None:
            return tokens_fingerprint(windows) if windows is not None else None

        plan, statistics = self.plan, self.statistics
        return {
            "model": blocks.checkpoint_fingerprint(),
            "recipe": self.recipe.to_dict(),
            "plan": plan_to_dict(plan)["blocks"] if plan is not None else None,
            "statistics": statistics_fingerprint(statistics) if statistics is not None else None,
            "calibration text": tokens(self.windows),
            "evaluation text": tokens(self.held_out.tokens),
            "machine or version": versions(blocks.device),
        }


def _report(
    opened: OpenModel,
    plan: PruningPlan,
    statistics: Statistics | None,
    parameters_before: int,
    before: Perplexity | None,
    after: Perplexity | None,
) -> PruneReport:
    return PruneReport(
        name=opened.name,
        plan=plan,
        statistics=statistics,
        parameters_before=parameters_before,
        parameters_after=count_parameters(opened.model),
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


def _prune_live(run: _Run, out: Path | None, *, given: bool) -> PruneResult:
    """Cut a model in memory; ``given``: by the caller, so that the result is that very model."""
    opened, held_out = run.opened, run.held_out
    statistics = run.calibrated()
    plan = run.planned(statistics)

    def measure() -> Perplexity | None:
        if held_out.tokens is None:
            return None
        return perplexity(
            opened.model, held_out.tokens, dataset=held_out.dataset, progress=run.progress
        )

    pruned = opened.model
    training = pruned.training
    pruned.eval()
    parameters_before = count_parameters(pruned)
    before = measure()
    if run.stop():
        raise Stopped
    prune_model_(pruned, opened.layout, plan, statistics, progress=run.progress)
    _become_pruned_(opened, plan)
    report = _report(opened, plan, statistics, parameters_before, before, measure())
    device = next(pruned.parameters()).device
    if out is not None:
        with new_folder(out, run.overwrite) as folder:
            write_model(pruned, opened.tokenizer, folder)
            write_documents(folder, plan, recipe_document(report), model_card(report))
            expected = take_probe(pruned)
            if not given:
                empty_(pruned)  # one model in memory at a time
            reloaded = verify(folder, expected, device)
        if not given:
            pruned = reloaded
    pruned.train(training)
    return PruneResult(opened.tokenizer, report, out, pruned, device)


def _prune_stored(run: _Run, blocks: StoredBlocks, out: Path, resume: bool) -> PruneResult:
    """Cut a model from disk to disk, one block at a time; pass 2 reads each once for everything."""
    opened, held_out = run.opened, run.held_out
    model, tokens = opened.model, held_out.tokens
    identity = run.identity(blocks)
    if resume:
        check_resume(partial_folder(out), identity)
    with new_folder(out, run.overwrite, resume) as folder:
        begin(folder, identity)
        statistics = kept_statistics(folder) or run.calibrated()
        if statistics is not None and run.windows is not None:
            keep_statistics(folder, statistics)
        plan = run.planned(statistics)

        modules = opened.layout.find_blocks(model)
        parameters_before = count_parameters(model)
        probe = RidingWindows(model, modules, probe_tokens(model))
        pair = []
        if tokens is not None:
            pair = [RidingWindows(model, modules, tokens) for _ in ("before", "after")]
        prune_to_shards_(
            opened,
            plan,
            statistics,
            folder,
            before=pair[:1],
            after=[*pair[1:], probe],
            stop=run.stop,
            progress=run.progress,
        )
        measured = [ridden_perplexity(windows, held_out.dataset) for windows in pair]
        before, after = measured or (None, None)
        expected = next(probe.logits()).cpu()
        _become_pruned_(opened, plan)
        report = _report(opened, plan, statistics, parameters_before, before, after)
        write_settings(model, opened.tokenizer, folder)
        write_documents(folder, plan, recipe_document(report), model_card(report))
        verify_streamed(folder, expected, blocks.device)
        end(folder)
    return PruneResult(opened.tokenizer, report, out, None, blocks.device)
