"""What a recovery will take, before it starts: memory, FLOPs, seconds. Arithmetic on shapes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group

from ..checkpoints.documents import read_pruned
from ..costs.attention import FP32
from ..costs.estimates import RunEstimate, format_count, format_seconds, make_table
from ..costs.flops import BlockCosts, ModelCosts, model_costs
from ..costs.hardware import Hardware, MemoryBudget, choose_hardware, parse_memory, resident_bytes
from ..costs.workload import TEXT_BYTES, Stage, allocator_bytes
from ..errors import CfspError
from ..evaluation.quality import EVALUATION_WINDOWS
from ..io.files import format_bytes
from ..io.safetensors import TensorInfo
from ..models.descriptions import Description, describe
from ..models.loading import check_seqlen
from ..typed import check_whole
from .settings import Recovery
from .targets import what_is_trained

ADAM_VALUES = 4
"""fp32 values of a trained parameter: itself, its gradient and two moments."""
LOSS_BYTES = 12
"""Per logit at the peak: itself in fp32, the logarithm of its softmax, and its gradient."""
LIBRARY_BYTES = 80 << 20
"""The Trainer and peft, which the process loads when training begins."""
DISTILLED_BYTES = 16
"""More per logit beside a teacher: its logit, logarithms of both softmaxes, a gradient."""


@dataclass(frozen=True)
class RecoveryEstimate(RunEstimate):
    """What a recovery will take. FLOPs count a multiplication and an addition as two."""

    model: str
    settings: Recovery
    parameters: int
    trained_parameters: int
    gradient_checkpointing: bool
    stages: tuple[Stage, ...]
    """One stage: training with both evaluations."""
    device_parts: dict[str, int]
    """Bytes that the device holds at the peak; on a CPU, the process."""
    host_parts: dict[str, int]
    """On a CPU the same; otherwise the host's memory is not estimated."""
    hardware: Hardware

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        del values["stages"], values["host_parts"]
        hardware = values.pop("hardware")
        measures = ("device_bytes", "flops", "seconds")
        return {**values, **{x: getattr(self, x) for x in measures}, "hardware": hardware}

    def _lines(self) -> Sequence[str]:
        figures = "; ".join(f"{k} {v}" for k, v in self._figures().items())
        time = f"{format_seconds(self.seconds)} ({self.flops:.2e} FLOP)"
        return self._title(), f"{self._memory()}, {time} by {figures}"

    def _title(self) -> str:
        own, counts = self.settings, (self.trained_parameters, self.parameters)
        return (
            f"{self.model}: {' of '.join(map(format_count, counts))} parameters trained, "
            f"{own.steps} steps of {own.batch_size} windows of {own.seqlen}, "
            f"{own.micro_batch} a pass"
        )

    def _memory(self) -> str:
        how = "with" if self.gradient_checkpointing else "without"
        return f"{super()._memory()} {how} gradient checkpointing"

    def _figures(self) -> dict[str, str]:
        assumed = self.hardware.assumptions()
        return {k: v for k, v in assumed.items() if k == "device" or "FLOP" in k}

    def table(self) -> Group:
        parts = {**self.device_parts, self._memory(): self.device_bytes}
        rows = ((part, format_bytes(count)) for part, count in parts.items())
        time = f"{format_seconds(self.seconds)} for {self.flops:.2e} FLOP"
        return Group(
            make_table(self._title(), ("memory at its peak", "bytes"), rows),
            make_table(time, ("figure", "value"), self._figures().items()),
        )

    def _memory_of(self, kind: str) -> str:
        return "memory"

    def _advice(self, parts: Mapping[str, int], over: int) -> str:
        hint = "" if self.gradient_checkpointing else ", or gradient checkpointing on"
        return f"lower `micro_batch` or `seqlen`{hint}"


def _costs(described: Description, dtype: torch.dtype) -> ModelCosts:
    """The costs of a model whose parameters are all of one dtype."""
    tensors = {name: TensorInfo(dtype, x.shape) for name, x in described.parameters.items()}
    return model_costs(described, tensors, dtype.itemsize)


def _activations(costs: ModelCosts, tokens: int, seqlen: int, checkpointing: bool) -> int:
    """Bytes kept for the backward pass of the blocks, or at its peak where they are recomputed.

    Per token and block: what enters and leaves the FFN's matrices, and a third more for the
    activation; queries, keys, values and what attention makes of them; hidden states beside the
    norms, twice in fp32 in these.
    """
    size, norms = costs.itemsize, 2 * costs.hidden_size * FP32

    def of_block(block: BlockCosts) -> int:
        values = math.ceil(4 / 3 * block.ffn_working_values) + 2 * costs.hidden_size
        if (attention := block.attention) is not None:
            q, k, v = attention.sizes
            values += 2 * q + k + v + 2 * attention.heads * seqlen * attention.eager
        return tokens * (values * size + norms)

    blocks = [of_block(block) for block in costs.blocks]
    if not checkpointing:
        return sum(blocks)
    return len(blocks) * tokens * costs.hidden_size * size + max(blocks)


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
    """The estimate of a recovery whose settings are resolved; "auto" gradient checkpointing is on
    if memory is too small without. ``process``: bytes that it held before it had the model."""
    on_cpu, lora = hardware.device == "cpu", settings.method == "lora"
    frozen = lora and not on_cpu
    costs = _costs(described, described.model.dtype if frozen else torch.float32)
    text, seqlen = settings.text, settings.text.seqlen
    tokens = (settings.micro_batch or 1) * seqlen
    new_values = ADAM_VALUES * trained - (0 if lora else trained)  # FFNs are in the model already
    held = {
        "model": costs.block_bytes + costs.outer_bytes,
        "trained parameters, gradients, moments": FP32 * new_values,
        "logits and their loss": tokens * costs.vocab_size * LOSS_BYTES,
    }
    taught = 0.0
    if teacher is not None:
        own = _costs(teacher, teacher.model.dtype)
        held["teacher"] = own.block_bytes + own.outer_bytes
        held["logits beside the teacher's"] = tokens * costs.vocab_size * DISTILLED_BYTES
        taught = own.flops(seqlen)
    if on_cpu:
        held["process and text"] = process + LIBRARY_BYTES + TEXT_BYTES

    def parts(checkpointing: bool) -> dict[str, int]:
        found = {**held, "activations": _activations(costs, tokens, seqlen, checkpointing)}
        return found if on_cpu else {**found, "allocator": allocator_bytes(sum(found.values()))}

    device, host = budget.limits(hardware)
    room = min(hardware.device_memory, device or host or hardware.device_memory)
    checkpointing = settings.gradient_checkpointing == "on"
    if settings.gradient_checkpointing == "auto":
        checkpointing = sum(parts(False).values()) > room
    learning = 6.0 * trained  # of adapters: forward, inputs, weights; of FFNs: weights alone
    if not lora:
        linear = sum(block.linear_flops for block in costs.blocks)
        learning = linear * trained * costs.itemsize / costs.block_bytes
    forward, again = costs.flops(seqlen), checkpointing * costs.block_flops(seqlen)
    per_token = 2 * forward + learning + again + taught  # with the inputs' gradients
    flops = text.samples * seqlen * per_token + 2 * evaluation_windows * seqlen * forward
    return RecoveryEstimate(
        model=described.name,
        settings=settings,
        parameters=costs.parameters,
        trained_parameters=trained,
        gradient_checkpointing=checkpointing,
        stages=(Stage("train", 0, 0, flops, flops / hardware.flops, "compute"),),
        device_parts=parts(checkpointing),
        host_parts=parts(checkpointing) if on_cpu else {},
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
    """What :func:`cfsp.recover` will take of a pruned folder; its weights are not read."""
    check_whole("eval_windows", eval_windows)
    process, pruned = resident_bytes(), read_pruned(Path(folder))
    described = describe(folder)
    model, layout = described.model, described.layout
    if layout is None:
        raise CfspError(described.refusal)
    machine = choose_hardware(hardware, device, model.dtype, tflops)
    calibration, where = pruned.plan.recipe.calibration, torch.device(machine.device)
    settings = settings.resolved(calibration, model.num_parameters(), where)
    check_seqlen(model, settings.text.seqlen)
    trained = what_is_trained(pruned.plan, model, layout, settings).parameters
    teacher = describe(settings.distillation.teacher) if settings.distillation is not None else None
    budget = parse_memory(max_memory)
    return estimate_training(
        described, teacher, settings, trained, eval_windows, machine, budget, process
    )
