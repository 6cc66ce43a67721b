"""The steps: transformers' Trainer on windows that are drawn before, with checkpoints to resume."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..errors import CfspError, Stopped
from .settings import Distillation, Recovery

SAVE_STEPS = 50
"""Steps between checkpoints; one more is made where a run is stopped."""
WARMUP = 0.05
TRAINED, COMPLETE = "trained.safetensors", "complete"


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


class RecoveryTrainer(Trainer):
    """A Trainer that may have a teacher, and whose checkpoints hold what is trained alone."""

    def __init__(self, settings: Recovery, teacher: PreTrainedModel | None, **options: Any) -> None:
        super().__init__(**options)
        self.distillation = settings.distillation
        self.teacher = teacher
        self.model_accepts_loss_kwargs = False  # windows are of one length: means of means

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], **_: Any) -> Any:
        """Mean over the tokens of a micro-batch: cross entropy, perhaps beside a teacher."""
        choice = self.distillation
        if choice is None or self.teacher is None:
            return model(**inputs, use_cache=False).loss
        options = {"use_cache": False, "output_hidden_states": choice.hidden_weight > 0}
        outputs = model(**inputs, **options)
        with torch.no_grad(), self.compute_loss_context_manager():
            goal = self.teacher(input_ids=inputs["input_ids"], **options)
        return distillation_loss(outputs, goal, outputs.loss, choice)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = trained_parameters(self.model)
        save_file({name: value.detach() for name, value in trained.items()}, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        stored = load_file(Path(resume_from_checkpoint) / TRAINED)
        for name, value in trained_parameters(self.model).items():
            value.data.copy_(stored[name])


class Watch(TrainerCallback):
    """Shows a bar, notices a loss that is no number, and ends training where that is asked."""

    def __init__(self, steps: int, stop: Callable[[], bool], progress: bool) -> None:
        self.stop = stop
        self.bar = tqdm(total=steps, desc="recover", unit="step", disable=not progress)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Steps of an earlier run count as done."""
        self.bar.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After each optimizer step."""
        self.bar.update()
        if self.stop() and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """After each step too, with its loss."""
        if "loss" not in logs:  # the summary at the end
            return
        loss = logs["loss"]
        self.bar.set_postfix_str(f"loss {loss:.3f}")
        if not math.isfinite(loss):
            raise CfspError(
                f"training diverged: the loss of step {state.global_step} is {loss}; "
                f"lower the learning rate, now {args.learning_rate}"
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After a checkpoint was written whole."""
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written whole."""
    found = [mark.parent for mark in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def train(
    model: nn.Module,
    windows: torch.Tensor,
    settings: Recovery,
    folder: Path,
    *,
    teacher: PreTrainedModel | None,
    half: bool,
    stop: Callable[[], bool],
    progress: bool,
) -> tuple[float, ...]:
    """Train what requires gradients, in place, on [steps * batch_size, seqlen] tokens in order;
    continue where ``folder`` has a checkpoint. ``half``: compute in bf16 what may be.

    Returns the loss of every step, those of runs before included, and leaves the model in eval
    mode. Raises CfspError where the loss is no number any more; Stopped where ``stop``, asked after
    every step, said so, and a checkpoint was written.
    """
    device = next(model.parameters()).device
    batch_size, micro_batch = settings.batch_size or 1, settings.micro_batch or 1
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=batch_size // micro_batch,
        learning_rate=settings.learning_rate or 0.0,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(WARMUP * settings.steps),
        train_sampling_strategy="sequential",
        seed=settings.seed,
        bf16=half,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a visible second GPU would get a replica
    watch = Watch(settings.steps, stop, progress)
    trainer = RecoveryTrainer(
        settings,
        teacher,
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": window, "labels": window} for window in windows],
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(folder)
    with watch.bar:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.eval()
    if trainer.state.global_step < settings.steps:
        raise Stopped
    return tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def distillation_loss(
    student: Any, teacher: Any, text_loss: torch.Tensor, choice: Distillation
) -> torch.Tensor:
    """See :class:`cfsp.Distillation`; fp32 [], means over tokens of outputs for the same tokens.

    These have ``logits`` [B, S, V] and, where their weight is not 0, ``hidden_states`` of
    [B, S, D]; ``text_loss`` is the student's cross entropy with the text.
    """
    loss = choice.text_weight * text_loss
    if choice.logits_weight:
        outputs, temperature = (student, teacher), choice.temperature
        own, goal = (
            functional.log_softmax(output.logits.float() / temperature, dim=-1)
            for output in outputs
        )
        divergence = functional.kl_div(own, goal, reduction="sum", log_target=True)
        scale = temperature**2 / student.logits[..., 0].numel()
        loss = loss + choice.logits_weight * (divergence * scale)
    if choice.hidden_weight:
        pairs = zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True)
        distances = torch.stack([hidden_loss(own, goal) for own, goal in pairs])
        loss = loss + choice.hidden_weight * distances.mean()
    return loss


def hidden_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared distance of hidden states over the squared length of the teacher's, fp32 []."""
    goal = teacher.float()
    return (student.float() - goal).square().sum() / goal.square().sum()
