"""What a recovery will take, before it starts: memory, FLOPs, seconds. Arithmetic on shapes."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from ..checkpoints.documents import read_pruned
from ..costs.dry_run import choose_hardware
from ..costs.estimates import format_count, format_seconds
from ..costs.flops import FP32, ModelCosts, costs_of
from ..costs.hardware import Hardware, resident_bytes
from ..costs.workload import SLACK, TEXT_BYTES, WORKSPACE_BYTES
from ..errors import CfspError
from ..evaluation.quality import EVALUATION_WINDOWS
from ..io.files import format_bytes
from ..io.memory import MemoryBudget, parse_budget
from ..io.safetensors import TensorInfo
from ..models.descriptions import Description, describe
from ..models.layouts import unsupported
from ..models.loading import check_seqlen
from ..models.tensors import saved_parameters
from .lora_ranks import what_is_trained
from .settings import Recovery

ADAM_VALUES = 4
"""fp32 values of a trained parameter: itself, its gradient and two moments."""
LOSS_BYTES = 12
"""Of a logit at the peak: itself in fp32, the logarithm of its softmax, and its gradient."""
LIBRARY_BYTES = 80 << 20
"""Of the process: the Trainer and peft, loaded when training begins."""
DISTILLED_BYTES = 16
"""More beside a teacher: its logit, the logarithms of both softmaxes at temperature, a gradient."""


@dataclass(frozen=True)
class RecoveryEstimate:
    """What a recovery will take. FLOPs count a multiplication and an addition as two."""

    model: str
    settings: Recovery
    """Resolved."""
    parameters: int
    trained_parameters: int
    gradient_checkpointing: bool
    parts: dict[str, int]
    """Bytes that the device holds at the peak; on a CPU, the process."""
    flops: float
    hardware: Hardware

    @property
    def device_bytes(self) -> int:
        """Peak of the device's memory."""
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        """Of training and both evaluations."""
        return self.flops / self.hardware.flops

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "model": self.model,
            "settings": self.settings.to_dict(),
            "parameters": self.parameters,
            "trained_parameters": self.trained_parameters,
            "gradient_checkpointing": self.gradient_checkpointing,
            "device_parts": self.parts,
            "device_bytes": self.device_bytes,
            "flops": self.flops,
            "seconds": self.seconds,
            "hardware": {
                **dataclasses.asdict(dataclasses.replace(self.hardware, sources={})),
                "sources": dict(self.hardware.sources),
            },
        }

    def summary(self) -> str:
        """Two lines for a terminal."""
        figures = "; ".join(f"{k} {v}" for k, v in self._figures().items())
        return (
            f"estimate: {self._title()}\nestimate: {self._memory()}, "
            f"{format_seconds(self.seconds)} ({self.flops:.2e} FLOP) by {figures}"
        )

    def _title(self) -> str:
        settings = self.settings
        return (
            f"{self.model}: {format_count(self.trained_parameters)} of "
            f"{format_count(self.parameters)} parameters trained, {settings.steps} steps of "
            f"{settings.batch_size} windows of {settings.seqlen}, {settings.micro_batch} a pass"
        )

    def _memory(self) -> str:
        how = "with" if self.gradient_checkpointing else "without"
        kind = "host" if self.hardware.device == "cpu" else "device"
        return (
            f"{kind} memory {format_bytes(self.device_bytes)} of "
            f"{format_bytes(self.hardware.device_memory)} {how} gradient checkpointing"
        )

    def _figures(self) -> dict[str, str]:
        assumed = self.hardware.assumptions()
        return {k: v for k, v in assumed.items() if k == "device" or "FLOP" in k}

    def table(self) -> Group:
        """Memory and time as tables for a terminal."""
        memory = Table(title=self._title())
        memory.add_column("memory at its peak")
        memory.add_column("bytes", justify="right")
        for part, count in self.parts.items():
            memory.add_row(part, format_bytes(count))
        memory.add_row(self._memory(), format_bytes(self.device_bytes))
        time = Table(title=f"{format_seconds(self.seconds)} for {self.flops:.2e} FLOP")
        time.add_column("figure")
        time.add_column("value")
        for figure, value in self._figures().items():
            time.add_row(figure, value)
        return Group(memory, time)

    def check(self, budget: MemoryBudget) -> None:
        """Raise CfspError where it needs more than it may take, or than a GPU has free; says what
        to lower."""
        limits = [size for size in (budget.device, budget.host) if size is not None]
        if self.hardware.device != "cpu":
            limits = [self.hardware.device_memory, *([budget.device] if budget.device else [])]
        if limits and self.device_bytes > min(limits):
            hint = "" if self.gradient_checkpointing else ", or gradient checkpointing on"
            raise CfspError(
                f"memory: about {format_bytes(self.device_bytes)} needed, "
                f"{format_bytes(min(limits))} to be had; lower --micro-batch or --seqlen{hint}"
            )


def _costs(described: Description, dtype: torch.dtype) -> ModelCosts:
    """Of a model whose parameters are of one dtype."""
    model = described.model
    tensors = {
        name: TensorInfo(dtype, tuple(value.shape))
        for name, value in saved_parameters(model).items()
    }
    return costs_of(model.config, tensors, described.blocks, dtype.itemsize)


def _activations(costs: ModelCosts, tokens: int, seqlen: int, checkpointing: bool) -> int:
    """Bytes kept for the backward pass of the blocks, or at its peak where they are recomputed.

    Per token and block: what enters and leaves the FFN's matrices, and a third more for the
    activation; queries, keys, values and what attention makes of them; hidden states beside the
    norms, twice in fp32 in these.
    """
    attention, size = costs.attention, costs.itemsize
    q, k, v = (
        heads * each
        for heads, each in (
            (attention.heads, attention.key_size),
            (attention.key_heads, attention.key_size),
            (attention.key_heads, attention.value_size),
        )
    )
    scores = 2 * attention.heads * seqlen * attention.eager
    outside = (2 * costs.hidden_size + 2 * q + k + v + scores) * size
    norms = 2 * costs.hidden_size * FP32
    blocks = [
        tokens * (math.ceil(4 / 3 * block.ffn_working_values()) * size + outside + norms)
        for block in costs.blocks
    ]
    if not checkpointing:
        return sum(blocks)
    return len(blocks) * tokens * costs.hidden_size * size + max(blocks)


def _parts(
    costs: ModelCosts,
    teacher: ModelCosts | None,
    settings: Recovery,
    trained: int,
    hardware: Hardware,
    process: int,
) -> dict[str, int]:
    """Bytes at the peak, without activations of blocks."""
    tokens = (settings.micro_batch or 1) * (settings.seqlen or 1)
    own = 0 if settings.method == "lora" else trained  # counted with the model
    parts = {
        "model": costs.block_bytes + costs.outer_bytes,
        "trained parameters, gradients, moments": FP32 * (ADAM_VALUES * trained - own),
        "logits and their loss": tokens * costs.vocab_size * LOSS_BYTES,
    }
    if teacher is not None:
        parts["teacher"] = teacher.block_bytes + teacher.outer_bytes
        parts["logits beside the teacher's"] = tokens * costs.vocab_size * DISTILLED_BYTES
    if hardware.device == "cpu":
        parts["process and text"] = process + LIBRARY_BYTES + TEXT_BYTES
    return parts


def _flops(
    costs: ModelCosts,
    teacher: ModelCosts | None,
    settings: Recovery,
    trained: int,
    checkpointing: bool,
    windows: int,
) -> float:
    """Of all steps and of both evaluations of ``windows``.

    Backward is a product with each weight again; for each weight that is trained, one more.
    """
    seqlen = settings.seqlen or 1
    blocks, head = costs.block_flops(seqlen), costs.head_flops()
    learning = 6.0 * trained  # of adapters: forward, inputs, weights
    if settings.method == "ffn":
        linear = sum(block.linear_flops() for block in costs.blocks)
        learning = linear * trained * costs.itemsize / costs.block_bytes
    per_token = 2 * (blocks + head) + learning + checkpointing * blocks
    if teacher is not None:
        per_token += teacher.block_flops(seqlen) + teacher.head_flops()
    text = settings.text
    return text.samples * seqlen * per_token + 2 * windows * seqlen * (blocks + head)


def estimate_training(
    described: Description,
    teacher: Description | None,
    settings: Recovery,
    trained: int,
    evaluation_windows: int,
    hardware: Hardware,
    budget: MemoryBudget,
    process: int,
) -> RecoveryEstimate:
    """The estimate of a recovery whose settings are resolved.

    Gradient checkpointing, where it is "auto", is on if the memory is too small without.

    Args:
        described: the pruned model.
        teacher: the same of its teacher.
        settings: resolved.
        trained: parameters that learn.
        evaluation_windows: measured on before and after.
        hardware: that trains.
        budget: what the run may take at most.
        process: bytes that the process held before it had the model.
    """
    frozen = hardware.device != "cpu" and settings.method == "lora"
    costs = _costs(described, described.model.dtype if frozen else torch.float32)
    goal = _costs(teacher, teacher.model.dtype) if teacher is not None else None
    tokens = (settings.micro_batch or 1) * (settings.seqlen or 1)
    parts = _parts(costs, goal, settings, trained, hardware, process)

    def with_activations(checkpointing: bool) -> dict[str, int]:
        kept = _activations(costs, tokens, settings.seqlen or 1, checkpointing)
        found = {**parts, "activations": kept}
        if hardware.device != "cpu":
            found["allocator"] = WORKSPACE_BYTES + math.ceil(SLACK * sum(found.values()))
        return found

    limits = (budget.device, budget.host if hardware.device == "cpu" else None)
    room = min([hardware.device_memory, *(size for size in limits if size is not None)])
    checkpointing = settings.gradient_checkpointing == "on" or (
        settings.gradient_checkpointing == "auto" and sum(with_activations(False).values()) > room
    )
    return RecoveryEstimate(
        model=described.name,
        settings=settings,
        parameters=costs.parameters,
        trained_parameters=trained,
        gradient_checkpointing=checkpointing,
        parts=with_activations(checkpointing),
        flops=_flops(costs, goal, settings, trained, checkpointing, evaluation_windows),
        hardware=hardware,
    )


def estimate_recovery(
    folder: str | Path,
    settings: Recovery = Recovery(),  # noqa: B008 - frozen
    *,
    eval_windows: int = EVALUATION_WINDOWS,
    max_memory: str | None = None,
    device: str = "auto",
    hardware: Hardware | str | None = None,
    tflops: float | None = None,
) -> RecoveryEstimate:
    """What :func:`cfsp.recover` will take of a pruned folder; its weights are not read.

    Args:
        folder: what ``cfsp prune`` wrote.
        settings: how to train.
        eval_windows: windows to measure perplexity on, before and after.
        max_memory: see :func:`cfsp.recover`.
        device: of this machine; its speed is measured for a moment.
        hardware: another machine instead, or the name of one in ``cfsp.costs.hardware.HARDWARE``.
        tflops: 1e12 FLOP/s that the device sustains, instead.

    Raises:
        CfspError: no pruned folder, settings that do not fit the model.
    """
    process, pruned = resident_bytes(), read_pruned(Path(folder))
    described = describe(folder)
    if described.layout is None:
        raise unsupported(described.model.config.model_type)
    machine = choose_hardware(hardware, device, described.model.dtype, tflops)
    calibration = pruned.plan.recipe.calibration
    costs = _costs(described, torch.float32)
    where = torch.device(machine.device)
    settings = settings.resolved(calibration, costs.parameters, where)
    check_seqlen(described.model, settings.text.seqlen)
    trained = what_is_trained(pruned.plan, described.model, described.layout, settings)
    teacher = None
    if settings.distillation is not None:
        teacher = describe(settings.distillation.teacher)
    return estimate_training(
        described,
        teacher,
        settings,
        trained.parameters,
        eval_windows,
        machine,
        parse_budget(max_memory),
        process,
    )
