"""A recovery whose input is checked: the model, what of it is trained, and on which tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..calibration.windows import calibration_windows
from ..checkpoints.documents import PLAN, PrunedFolder, read_pruned
from ..costs.hardware import MemoryBudget, resident_bytes, this_machine
from ..errors import CfspError
from ..evaluation.held_out import HeldOut, held_out_text
from ..models.fingerprints import SAMPLED_VALUES, samples_fingerprint, tokens_fingerprint, versions
from ..models.loading import quiet_loading
from ..models.opening import OpenModel, open_model
from ..models.tensors import saved_tensors
from .distillation import check_teacher
from .estimate import RecoveryEstimate, estimate_training
from .lora_ranks import Trained, what_is_trained
from .settings import Recovery

PACKAGES = ("cfsp", "torch", "transformers", "accelerate", "peft", "safetensors", "datasets")


@dataclass(frozen=True)
class Job:
    """A checked recovery."""

    pruned: PrunedFolder
    opened: OpenModel
    settings: Recovery
    """Resolved."""
    teacher: PreTrainedModel | None
    windows: torch.Tensor
    """[steps * batch_size, seqlen] int64, those of each step after the last one's."""
    held_out: HeldOut
    trained: Trained
    estimate: RecoveryEstimate
    device: torch.device

    @property
    def half(self) -> bool:
        """Whether it computes in bf16 what may be; otherwise everything is fp32."""
        return self.device.type == "cuda" and torch.cuda.is_bf16_supported()

    @property
    def versions(self) -> dict[str, str]:
        """Of what computes the result, with the device."""
        return versions(self.device, PACKAGES)

    def identity(self) -> dict[str, Any]:
        """Everything that the bytes of the result follow from, as plain values."""
        tokens = self.held_out.tokens
        settings = self.settings.to_dict()
        del settings["gradient_checkpointing"]  # changes no bit
        return {
            "model": _fingerprint(self.opened.model),
            "plan": self.pruned.plan.model_fingerprint,
            "settings": settings,
            "teacher": _fingerprint(self.teacher) if self.teacher is not None else None,
            "training text": tokens_fingerprint(self.windows),
            "evaluation text": tokens_fingerprint(tokens) if tokens is not None else None,
            "machine or version": self.versions,
        }


def _fingerprint(model: nn.Module) -> str:
    return samples_fingerprint(
        (name, tuple(value.shape), value.flatten()[:SAMPLED_VALUES].float())
        for name, value in saved_tensors(model).items()
    )


def make_job(
    folder: Path,
    settings: Recovery,
    eval_dataset: str | None,
    eval_windows: int,
    device: str,
    budget: MemoryBudget,
    measure: bool,
) -> Job:
    """Open and check everything that a recovery needs.

    Args:
        folder: of the pruned model.
        settings: as the user gave them.
        eval_dataset: None: see :func:`cfsp.calibration.mixtures.held_out_mixture`.
        eval_windows: 0: nothing is measured.
        device: a name.
        budget: of memory.
        measure: find out how fast the device is, for the estimate.

    Raises:
        CfspError: bad input or too little memory, in one line.
    """
    process, pruned = resident_bytes(), read_pruned(folder)
    opened = open_model(folder, device=device)
    if opened.layout.intermediate_sizes(opened.model) != pruned.plan.widths:
        raise CfspError(f"{folder / PLAN} is of another model: its widths are not those here")
    model = opened.model
    where = next(model.parameters()).device
    if where.index:
        raise CfspError(f"device {device}: training uses the first GPU; CUDA_VISIBLE_DEVICES picks")
    recipe = pruned.plan.recipe
    settings = settings.resolved(recipe.calibration, model.num_parameters(), where)
    trained = what_is_trained(pruned.plan, model, opened.layout, settings)
    windows = calibration_windows(model, opened.tokenizer, settings.text)
    held_out = held_out_text(opened, settings.text, eval_dataset, eval_windows)
    teacher = _teacher(opened, settings, device)
    estimate = estimate_training(
        opened.described,
        teacher.described if teacher is not None else None,
        settings,
        trained.parameters,
        len(held_out.tokens) if held_out.tokens is not None else 0,
        this_machine(where, model.dtype, measure=measure),
        budget,
        process,
    )
    estimate.check(budget)
    return Job(
        pruned,
        opened,
        settings,
        teacher.model if teacher is not None else None,
        windows,
        held_out,
        trained,
        estimate,
        where,
    )


def _teacher(opened: OpenModel, settings: Recovery, device: str) -> OpenModel | None:
    choice = settings.distillation
    if choice is None:
        return None
    with quiet_loading():
        teacher = open_model(choice.teacher, device=device)
    check_teacher(teacher.model, opened.model, choice)
    teacher.model.requires_grad_(False)
    return teacher
