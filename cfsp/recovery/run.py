"""``cfsp recover``: train a pruned model, merge what was learnt, write it, verify it."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..calibration.mixtures import dataset_paths
from ..calibration.windows import calibration_windows
from ..checkpoints.documents import PLAN, add_recovery, read_pruned
from ..checkpoints.folder import write_model
from ..checkpoints.resume import STATE_FOLDER, begin
from ..checkpoints.verification import take_probe, verify
from ..costs.hardware import parse_memory, resident_bytes, this_machine
from ..errors import CfspError
from ..evaluation.quality import EVALUATION_WINDOWS, held_out_text
from ..io.outputs import new_folder
from ..models.fingerprints import SAMPLED_VALUES, samples_fingerprint, tokens_fingerprint, versions
from ..models.loading import model_device, quiet_loading
from ..models.opening import OpenModel, open_model
from ..models.surgery import empty_
from ..models.tensors import saved_tensors
from .adapters import attach, merge, require_peft, save_adapter
from .estimate import estimate_training
from .result import RecoveryReport, RecoveryResult, recovery_document
from .settings import Recovery
from .targets import Trained, ffn_parameters, projections, what_is_trained

ADAPTER = "adapter"
PACKAGES = ("cfsp", "torch", "transformers", "accelerate", "peft", "safetensors", "datasets")


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
        overwrite: replace ``out``, where cfsp wrote all of it, and an interrupted run of it.
        resume: continue a run of the same model, settings and text that was interrupted.
        stop: asked after every step, for an orderly end before the last; then ``resume`` continues.
        progress: show an estimate and bars on stderr.

    Raises:
        CfspError: bad input, or a training that diverged, in one line; the input and an existing
            ``out`` are untouched.
        Stopped: ``stop`` said so.
    """
    folder, budget = Path(folder), parse_memory(max_memory)
    if keep_adapter and settings.method != "lora":
        raise CfspError(f"method {settings.method!r} has no adapter to keep")
    if settings.method == "lora":
        require_peft()
    taught_by = settings.distillation.teacher if settings.distillation is not None else None
    inputs = [folder, taught_by, *dataset_paths(settings.dataset, eval_dataset)]
    with new_folder(Path(out), overwrite, resume, inputs) as new:
        partial = new.parent

        # Open, resolve the settings, check.
        process, pruned = resident_bytes(), read_pruned(folder)
        opened = open_model(folder, device=device)
        model, layout, plan = opened.model, opened.layout, pruned.plan
        if layout.intermediate_sizes(model) != plan.widths:
            raise CfspError(f"{folder / PLAN} is of another model: its widths are not those here")
        where = model_device(model)
        if where.index:
            raise CfspError(
                f"device {device}: training uses the first GPU; CUDA_VISIBLE_DEVICES picks"
            )
        settings = settings.resolved(plan.recipe.calibration, model.num_parameters(), where)
        trained = what_is_trained(plan, model, layout, settings)
        windows = calibration_windows(model, opened.tokenizer, settings.text)
        held_out = held_out_text(opened, settings.text, eval_dataset, eval_windows)
        teacher = _teacher(opened, settings, device)

        # Estimate, with the texts at hand.
        estimate = estimate_training(
            opened.described,
            teacher.described if teacher is not None else None,
            settings,
            trained.parameters,
            len(held_out.tokens),
            this_machine(where, model.dtype, measure=progress),
            budget,
            process,
        )
        estimate.check(budget)
        if progress:
            print(estimate.summary(), file=sys.stderr)

        # Train, merge, write, verify, publish.
        from .training import train  # the Trainer, which the estimate counts apart from the process

        made_by = versions(where, PACKAGES)
        changing = {k: v for k, v in settings.to_dict().items() if k != "gradient_checkpointing"}
        identity = {
            "model": _fingerprint(model),
            "plan": plan.model_fingerprint,
            "settings": changing,
            "teacher": _fingerprint(teacher.model) if teacher is not None else None,
            "training text": tokens_fingerprint(windows),
            "evaluation text": tokens_fingerprint(held_out.tokens)
            if len(held_out.tokens)
            else None,
            "machine or version": made_by,
        }
        half = where.type == "cuda" and torch.cuda.is_bf16_supported()
        begin(partial, identity)
        before = held_out.measure(model, progress=progress)
        checkpointing = estimate.gradient_checkpointing
        learning = _learning(opened, settings, trained, half, checkpointing)
        with _random_state_kept(), learning as learner:
            losses = train(
                learner,
                windows,
                settings,
                partial / STATE_FOLDER / "training",
                teacher=teacher.model if teacher is not None else None,
                half=half,
                stop=stop,
                progress=progress,
            )
            if keep_adapter:
                save_adapter(learner, new / ADAPTER, opened.name)
        if teacher is not None:
            empty_(teacher.model)
        report = RecoveryReport(
            name=opened.name,
            settings=settings,
            ranks=trained.ranks,
            trained_parameters=trained.parameters,
            uniform_parameters=trained.uniform_parameters,
            losses=losses,
            perplexity_before=before,
            perplexity_after=held_out.measure(model, progress=progress),
            versions=made_by,
        )
        write_model(opened, new)
        add_recovery(pruned, new, recovery_document(report))
        expected = take_probe(model)
        empty_(model)  # one model in memory at a time
        reloaded = verify(new, expected, where)
    return RecoveryResult(reloaded, opened.tokenizer, report, Path(out))


def _teacher(student: OpenModel, settings: Recovery, device: str) -> OpenModel | None:
    """The teacher, where there is one; raises CfspError where the two have nothing to compare:
    another vocabulary or, for hidden states, another size or number of blocks."""
    choice = settings.distillation
    if choice is None:
        return None
    with quiet_loading():
        teacher = open_model(choice.teacher, device=device)
    names = ["vocab_size"]
    if choice.hidden_weight:
        names += ["hidden_size", "num_hidden_layers"]
    configs = [opened.model.config.get_text_config() for opened in (student, teacher)]
    for name in names:
        own, other = (getattr(config, name) for config in configs)
        if own != other:
            hint = "; hidden_weight 0 needs only its logits" if name != "vocab_size" else ""
            raise CfspError(f"teacher {choice.teacher} has {name} {other}, not {own}{hint}")
    teacher.model.requires_grad_(False)
    return teacher


def _fingerprint(model: nn.Module) -> str:
    return samples_fingerprint(
        (name, tuple(value.shape), value.flatten()[:SAMPLED_VALUES].float())
        for name, value in saved_tensors(model).items()
    )


@contextmanager
def _learning(
    opened: OpenModel, settings: Recovery, trained: Trained, half: bool, checkpointing: bool
) -> Iterator[Any]:
    """What is trained of a model, in fp32; afterwards the model has learnt it, and its own dtypes
    again. ``checkpointing``: keep the inputs of blocks alone, and run each again backward."""
    model, layout = opened.model, opened.layout
    learner: Any = model
    stored = {name: value.dtype for name, value in model.named_parameters()}
    configs = {id(part): vars(part) for part in (model.config, model.config.get_text_config())}
    kept = {key: dict(values) for key, values in configs.items()}
    model.requires_grad_(False)
    if not half or settings.method == "ffn":
        for value in model.parameters():  # not buffers such as the rotary frequencies
            value.data = value.data.float()
    if settings.method == "lora":
        blocks = projections(model, layout, settings.targets)
        learner = attach(model, blocks, trained.ranks, settings.scaling, settings.seed)
    else:
        for value in ffn_parameters(model, layout):
            value.requires_grad_(True)
    if checkpointing:
        # transformers 5.24 calls it activation checkpointing; before, gradient checkpointing.
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{kind}_checkpointing_enable")()
    yield learner
    if settings.method == "lora":
        merge(learner)
    model.requires_grad_(False)
    for name, value in model.named_parameters():
        value.data = value.data.to(stored[name])
    for key, values in configs.items():  # the Trainer turned the cache off
        values.clear()
        values.update(kept[key])


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
