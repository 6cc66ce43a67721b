"""``cfsp recover``: train a pruned model, merge what was learnt, write it, verify it."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.documents import add_recovery, drop_times_
from ..checkpoints.folder import check_out, new_folder, partial_path, write_model
from ..checkpoints.resume import STATE_FOLDER, begin, check_resume, end
from ..checkpoints.verification import take_probe, verify
from ..costs.hardware import parse_memory
from ..errors import CfspError
from ..evaluation.quality import EVALUATION_WINDOWS, Perplexity
from ..models.surgery import empty_
from .adapters import attach, merge, ranks_by_name, require_peft, save_adapter
from .job import Job, make_job
from .settings import Recovery
from .targets import ffn_parameters, projections

ADAPTER = "adapter"


@dataclass(frozen=True)
class RecoveryReport:
    """What was trained, how, and what it gained."""

    name: str
    """The pruned model's name."""
    settings: Recovery
    """The settings, all resolved."""
    ranks: tuple[int, ...]
    """The rank of each block's adapters, 0 for a block without; () where no block has any."""
    trained_parameters: int
    uniform_parameters: int
    """Parameters that adapters of the uniform rank would have; without adapters, those trained."""
    losses: tuple[float, ...]
    """Training loss of every step."""
    perplexity_before: Perplexity | None
    perplexity_after: Perplexity | None
    versions: dict[str, str]

    @property
    def tokens(self) -> int:
        """Tokens that it was trained on."""
        text = self.settings.text
        return text.samples * text.seqlen

    def to_dict(self) -> dict[str, Any]:
        """The result, as plain values."""
        before, after = self.perplexity_before, self.perplexity_after
        return {
            "ranks": list(self.ranks),
            "trained_parameters": self.trained_parameters,
            "uniform_parameters": self.uniform_parameters,
            "tokens": self.tokens,
            "losses": list(self.losses),
            "perplexity_before": before.to_dict() if before is not None else None,
            "perplexity_after": after.to_dict() if after is not None else None,
        }


def recovery_document(report: RecoveryReport) -> dict[str, Any]:
    """One entry of ``recovery`` in recipe.yaml: equal runs give equal documents."""
    result = report.to_dict()
    drop_times_(result)
    return {
        "settings": report.settings.to_dict(),
        "provenance": {"model": report.name, "versions": report.versions},
        "result": result,
    }


@dataclass(frozen=True)
class RecoveryResult:
    """What came of a recovery."""

    model: PreTrainedModel
    """Reloaded from ``out``, in eval mode on its device."""
    tokenizer: Any
    report: RecoveryReport
    out: Path


def recover(
    folder: str | Path,
    out: str | Path,
    settings: Recovery = Recovery(),  # noqa: B008 - frozen
    *,
    eval_dataset: str | None = None,
    eval_windows: int = EVALUATION_WINDOWS,
    device: str = "auto",
    max_memory: str | None = None,
    keep_adapter: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    stop: Callable[[], bool] = bool,
    progress: bool = True,
) -> RecoveryResult:
    """Train a pruned model for a while, so that it says again what the dense one did.

    Args:
        folder: what :func:`cfsp.prune` or this function wrote.
        out: folder for the result, of the same format. It appears when it is whole.
        settings: how to train.
        eval_dataset: measure perplexity before and after on this text, or mix of texts; None:
            the held-out parts of the training datasets, or builtin where all are files.
        eval_windows: windows to measure on; 0 skips it.
        device: "auto", "cpu" or "cuda", the first GPU that is visible.
        max_memory: what training may take, "20GiB": decides on gradient checkpointing where that is
            left open, and refuses what does not fit. None: what a GPU has free.
        keep_adapter: keep the adapters too, as peft loads them, in ``out/adapter``.
        overwrite: replace ``out`` where it exists, and an interrupted run of it.
        resume: continue a run of the same model, settings and text that was interrupted.
        stop: asked after every step, for an orderly end before the last; then ``resume`` continues.
        progress: show an estimate and bars on stderr.

    Raises:
        CfspError: bad input, or a training that diverged, in one line; the input and an existing
            ``out`` are untouched.
        Stopped: ``stop`` said so.
    """
    goal = Path(out)
    if keep_adapter and settings.method != "lora":
        raise CfspError(f"method {settings.method!r} has no adapter to keep")
    if settings.method == "lora":
        require_peft()
    check_out(goal, overwrite, folder, resume=resume)
    budget = parse_memory(max_memory)
    job = make_job(
        Path(folder), settings, eval_dataset, eval_windows, device, budget, measure=progress
    )
    if progress:
        print(job.estimate.summary(), file=sys.stderr)
    identity = job.identity()
    if resume:
        check_resume(partial_path(goal), identity)
    with new_folder(goal, overwrite, resume) as partial:
        begin(partial, identity)
        before = job.held_out.measure(job.opened.model, progress=progress)
        with _random_state_kept(), _config_kept(job.opened.model):
            losses = _train(job, partial, keep_adapter, stop, progress)
        report = RecoveryReport(
            name=job.opened.name,
            settings=job.settings,
            ranks=job.trained.ranks,
            trained_parameters=job.trained.parameters,
            uniform_parameters=job.trained.uniform_parameters,
            losses=losses,
            perplexity_before=before,
            perplexity_after=job.held_out.measure(job.opened.model, progress=progress),
            versions=job.versions,
        )
        model = _write(job, report, partial)
        end(partial)
    return RecoveryResult(model, job.opened.tokenizer, report, goal)


def _train(
    job: Job, folder: Path, keep_adapter: bool, stop: Callable[[], bool], progress: bool
) -> tuple[float, ...]:
    """Train the model in place, in its own dtypes again afterwards; the loss of every step."""
    from .training import train

    model, settings = job.opened.model, job.settings
    stored = {name: value.dtype for name, value in model.named_parameters()}
    model.requires_grad_(False)
    if not job.half or settings.method == "ffn":
        _cast_(model.parameters(), torch.float32)
    learner: Any = model
    if settings.method == "lora":
        blocks = projections(model, job.opened.layout, settings.targets)
        names = ranks_by_name(blocks, job.trained.ranks)
        learner = attach(model, names, settings.scaling, settings.seed)
    else:
        for value in ffn_parameters(model, job.opened.layout).values():
            value.requires_grad_(True)
    with _gradient_checkpointing(model, job.estimate.gradient_checkpointing):
        losses = train(
            learner,
            job.windows,
            settings,
            folder / STATE_FOLDER / "training",
            teacher=job.teacher,
            half=job.half,
            stop=stop,
            progress=progress,
        )
    if keep_adapter:
        save_adapter(learner, folder / ADAPTER, job.opened.name)
    if settings.method == "lora":
        merge(learner)
    if job.teacher is not None:
        empty_(job.teacher)
    model.requires_grad_(False)
    for name, value in model.named_parameters():
        _cast_([value], stored[name])
    return losses


def _cast_(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """In place; buffers such as the rotary frequencies keep theirs."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def _write(job: Job, report: RecoveryReport, folder: Path) -> PreTrainedModel:
    """Write the trained model and its documents; returns it reloaded, the same to the last bit."""
    model = job.opened.model
    write_model(model, job.opened.tokenizer, folder)
    add_recovery(job.pruned, folder, recovery_document(report))
    expected = take_probe(model)
    empty_(model)  # one model in memory at a time
    return verify(folder, expected, job.device)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Training seeds every generator; afterwards they go on as if it had not."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(min(1, torch.cuda.device_count()))):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _config_kept(model: PreTrainedModel) -> Iterator[None]:
    """The Trainer turns the cache off in the config for good; undo that."""
    values = dict(vars(model.config))
    yield
    vars(model.config).clear()
    vars(model.config).update(values)


@contextmanager
def _gradient_checkpointing(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Keep the inputs of blocks alone, and run each again in the backward pass."""
    if not wanted:
        yield
        return
    # transformers 5.24 calls it activation checkpointing; before, gradient checkpointing.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")()
    yield
    getattr(model, f"{kind}_checkpointing_disable")()
