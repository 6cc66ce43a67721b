"""Measured generation: prefill and decode in tokens/s, and the memory that it took."""

import gc
import inspect
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import CfspError
from ..models.loading import cache_argument, check_seqlen, model_device, synchronize
from ..typed import check_whole


@dataclass(frozen=True)
class Generation:
    """What is generated: random prompts, continued greedily."""

    batch: int = 1
    prompt_tokens: int = 512
    new_tokens: int = 32
    rounds: int = 5

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_whole(name, value, 1)


@dataclass(frozen=True)
class Speed:
    """Medians over the rounds of a generation."""

    prefill_tokens_per_second: float
    """Prompt tokens of the whole batch, logits of the last position only."""
    decode_tokens_per_second: float
    """New tokens of the whole batch, one position after the other with a key-value cache."""
    peak_memory_bytes: int | None
    """What :class:`PeakMemory` measured; None where it was not measured."""
    workload: Generation

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class PeakMemory:
    """The most memory held at a time since this was made, beyond what was held then.

    On a GPU, what torch allocates there. On a CPU, the resident memory of the process: memory that
    was freed earlier but not returned to the system hides part of the growth.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self.device = device
        self.cuda = device.type == "cuda"
        self.before = torch.cuda.memory_allocated(device) if self.cuda else _resident("VmRSS")

    def restart(self) -> None:
        """Forget the peak so far, such as that of loading, but not what was held before it."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.before is not None:
            try:
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            except OSError:
                self.before = None

    def measure(self) -> int | None:
        """Bytes; None where the system does not tell."""
        peak = torch.cuda.max_memory_allocated(self.device) if self.cuda else _resident("VmHWM")
        return None if self.before is None or peak is None else max(0, peak - self.before)


def _resident(key: str) -> int | None:
    """A line of /proc/self/status in bytes, None where there is none; psutil lacks the peak."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = status.partition(f"{key}:")[2].split()
    return int(found[0]) * 1024 if found else None


def random_prompts(model: PreTrainedModel, generation: Generation) -> torch.Tensor:
    """[batch, prompt_tokens] int64 on the model's device, the same for equal vocabularies;
    CfspError for more tokens than the model has positions."""
    prompt, new = generation.prompt_tokens, generation.new_tokens
    try:
        check_seqlen(model, prompt + new)
    except CfspError as error:
        raise CfspError(f"prompt_tokens {prompt} and new_tokens {new}: {error}") from None
    generator = torch.Generator().manual_seed(0)
    shape = (generation.batch, generation.prompt_tokens)
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, shape, generator=generator).to(model_device(model))


@torch.no_grad()
def time_round(model: PreTrainedModel, generation: Generation) -> tuple[float, float]:
    """(seconds of the prefill, seconds of the decoding)."""
    prompts = random_prompts(model, generation)
    known = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    cache = cache_argument(model)
    started = _clock(prompts.device)
    output = model(input_ids=prompts, use_cache=True, **last)
    prefilled = _clock(prompts.device)
    for _ in range(generation.new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, use_cache=True, **{cache: output[cache]})
    return prefilled - started, _clock(prompts.device) - prefilled


def _clock(device: torch.device) -> float:
    """Seconds, read once the device has finished its work."""
    synchronize(device)
    return time.perf_counter()


def measure_speed(
    models: Sequence[PreTrainedModel], generation: Generation, *, peak_memory: Sequence[int | None]
) -> list[Speed]:
    """Speeds of causal LMs in eval mode that can be compared: they take turns, so that each sees
    the same machine. The caller has run each once, or their first round is slow."""
    rounds = [[time_round(model, generation) for model in models] for _ in range(generation.rounds)]
    return [
        Speed(
            generation.batch * generation.prompt_tokens / median(prefill for prefill, _ in turns),
            generation.batch * generation.new_tokens / median(decode for _, decode in turns),
            taken,
            generation,
        )
        for turns, taken in zip(zip(*rounds, strict=True), peak_memory, strict=True)
    ]
