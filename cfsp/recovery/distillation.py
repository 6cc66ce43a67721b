"""The loss of a student beside its teacher."""

from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ..errors import CfspError
from .settings import Distillation


def check_teacher(teacher: PreTrainedModel, student: PreTrainedModel, choice: Distillation) -> None:
    """Raise CfspError where the two have nothing to compare: another vocabulary or, for hidden
    states, another size or number of blocks."""
    names = ["vocab_size"]
    if choice.hidden_weight:
        names += ["hidden_size", "num_hidden_layers"]
    for name in names:
        own, other = (getattr(m.config.get_text_config(), name) for m in (student, teacher))
        if own != other:
            hint = "; hidden_weight 0 needs only its logits" if name != "vocab_size" else ""
            raise CfspError(f"teacher {choice.teacher} has {name} {other}, not {own}{hint}")


def distillation_loss(
    student: Any, teacher: Any, text_loss: torch.Tensor, choice: Distillation
) -> torch.Tensor:
    """See :class:`cfsp.recovery.settings.Distillation`; means over tokens, fp32 [].

    Args:
        student: output of the model with ``logits`` [B, S, V] and, where their weight is not 0,
            ``hidden_states`` of [B, S, D].
        teacher: the same of the teacher, for the same tokens.
        text_loss: the student's cross entropy with the text.
        choice: weights and temperature.
    """
    loss = choice.text_weight * text_loss
    if choice.logits_weight:
        divergence = logits_loss(student.logits, teacher.logits, choice.temperature)
        loss = loss + choice.logits_weight * divergence
    if choice.hidden_weight:
        pairs = zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True)
        distances = torch.stack([hidden_loss(own, goal) for own, goal in pairs])
        loss = loss + choice.hidden_weight * distances.mean()
    return loss


def logits_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² KL(teacher ‖ student) of distributions at temperature T: mean over tokens, fp32 []."""
    own, goal = (
        functional.log_softmax(logits.float() / temperature, dim=-1)
        for logits in (student, teacher)
    )
    divergence = functional.kl_div(own, goal, reduction="sum", log_target=True)
    return divergence * (temperature**2 / student[..., 0].numel())


def hidden_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared distance of hidden states over the squared length of the teacher's, fp32 []."""
    goal = teacher.float()
    return (student.float() - goal).square().sum() / goal.square().sum()
