"""A job whose input is checked: in memory or from disk to disk, with what comes of it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .blocks import StoredBlocks, empty_
from .checkpoint import (
    become_pruned_,
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
from .errors import Stopped
from .evaluation import Perplexity, perplexity, ridden_perplexity
from .models import OpenModel, quiet_loading
from .plan import PruningPlan, make_plan, plan_to_dict
from .provenance import tokens_fingerprint, versions
from .recipe import Recipe
from .report import PruneReport, model_card, recipe_document
from .resume import begin, check_resume, end, keep_statistics, kept_statistics
from .rewriting import prune_model_
from .second_pass import prune_to_shards_
from .statistics import Statistics, statistics_fingerprint
from .stream import RidingWindows
from .streaming import verify_streamed


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


@dataclass(frozen=True)
class HeldOut:
    """What a model is measured on before and after."""

    dataset: str
    tokens: torch.Tensor | None
    """[N, S] int64; None where nothing is measured."""


def collect(
    opened: OpenModel,
    recipe: Recipe,
    windows: torch.Tensor,
    micro_batch: int,
    progress: bool,
    stop: Callable[[], bool] = bool,
) -> Statistics:
    """Statistics of a calibration pass, with where they come from."""
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
    micro_batch: int
    """Windows per forward call of calibration."""
    held_out: HeldOut
    overwrite: bool
    stop: Callable[[], bool]
    progress: bool

    def calibrated(self) -> Statistics | None:
        """The statistics given, or those of a pass over the calibration tokens."""
        if self.windows is None:
            return self.statistics
        return collect(
            self.opened, self.recipe, self.windows, self.micro_batch, self.progress, self.stop
        )

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
        recipe = self.recipe.to_dict()
        del recipe["micro_batch"]  # what it asks for; the one in force counts
        return {
            "model": blocks.checkpoint_fingerprint(),
            "recipe": recipe,
            "micro-batch": self.micro_batch,
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


def prune_live(run: Run, out: Path | None, *, given: bool) -> PruneResult:
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


def prune_stored(run: Run, blocks: StoredBlocks, out: Path, resume: bool) -> PruneResult:
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
        empty_(model)  # one model's embeddings in memory at a time
        verify_streamed(folder, expected, blocks.device)
        end(folder)
    return PruneResult(opened.tokenizer, report, out, None, blocks.device)
