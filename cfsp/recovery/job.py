"""A recovery whose input is checked: the model, what of it is trained, and on which tokens."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import saved_tensors
from ..errors import CfspError
from ..models import OpenModel, open_model, quiet_loading
from ..pipeline import calibration_windows, held_out_windows
from ..provenance import SAMPLED_VALUES, samples_fingerprint, tokens_fingerprint, versions
from ..runs import HeldOut, count_parameters
from .distillation import check_teacher
from .folder import PrunedFolder, check_opened, read_pruned
from .ranks import importance_ranks, uniform_ranks
from .settings import Recovery
from .targets import ffn_parameters, largest_ranks, projections, rank_costs

PACKAGES = ("cfsp", "torch", "transformers", "accelerate", "peft", "safetensors", "datasets")


@dataclass(frozen=True)
class Job:
    """A checked recovery."""

    pruned: PrunedFolder
    opened: OpenModel
    settings: Recovery
    teacher: PreTrainedModel | None
    windows: torch.Tensor
    held_out: HeldOut
    ranks: tuple[int, ...]
    uniform_parameters: int
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
        return {
            "model": _fingerprint(self.opened.model),
            "plan": self.pruned.plan.model_fingerprint,
            "settings": self.settings.to_dict(),
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
    folder: Path, settings: Recovery, eval_dataset: str | None, eval_windows: int, device: str
) -> Job:
    """Open and check everything that a recovery needs.

    Raises:
        CfspError: bad input, in one line.
    """
    pruned = read_pruned(folder)
    opened = open_model(folder, device=device)
    check_opened(pruned, opened)
    model = opened.model
    where = next(model.parameters()).device
    if where.index:
        raise CfspError(f"device {device}: training uses the first GPU; CUDA_VISIBLE_DEVICES picks")
    recipe = pruned.plan.recipe
    settings = settings.resolved(recipe.calibration, count_parameters(model), where)
    ranks, uniform_parameters = _ranks(pruned, opened, settings)
    windows = calibration_windows(model, opened.tokenizer, settings.text)
    measured = dataclasses.replace(recipe, calibration=settings.text)
    held_out = held_out_windows(opened, measured, eval_dataset, eval_windows)
    teacher = None
    if settings.distillation is not None:
        with quiet_loading():
            teacher = open_model(settings.distillation.teacher, device=device).model
        check_teacher(teacher, model, settings.distillation)
    return Job(
        pruned, opened, settings, teacher, windows, held_out, ranks, uniform_parameters, where
    )


def _ranks(
    pruned: PrunedFolder, opened: OpenModel, settings: Recovery
) -> tuple[tuple[int, ...], int]:
    """Rank of every block, () without adapters, and the parameters of the uniform one."""
    if settings.method != "lora":
        trained = ffn_parameters(opened.model, opened.layout).values()
        return (), sum(value.numel() for value in trained)
    blocks = projections(opened.model, opened.layout, settings.targets)
    costs, largest = rank_costs(blocks), largest_ranks(blocks)
    uniform = uniform_ranks(settings.rank, largest)
    ranks = uniform
    if settings.allocation == "importance":
        importance = torch.tensor(
            [block.importance for block in pruned.plan.blocks], dtype=torch.float64
        )
        ranks = importance_ranks(importance, settings.rank, costs, largest)
    return tuple(ranks), sum(rank * cost for rank, cost in zip(uniform, costs, strict=True))
