"""How to train a pruned model: every choice that changes the result, in one small object."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from ..calibration.mixtures import parse_mixture
from ..calibration.text import BOS_CHOICES
from ..calibration.windows import Calibration
from ..errors import CfspError
from ..models.blockwise import default_micro_batch
from ..settings import Bound, Setting, at_least, check, positive, setting

AS_PRUNED = "as the model was pruned"


DEFAULTS_BY_SIZE = (
    (1e9, 8, {"lora": 3e-4, "ffn": 3e-5}),
    (10e9, 16, {"lora": 3e-4, "ffn": 3e-5}),
    (math.inf, 32, {"lora": 1e-4, "ffn": 1e-5}),
)
"""(Parameters that a model has fewer than, its batch size, its learning rate by method)."""
CPU_TOKENS = 1024
"""Tokens of a micro-batch that is not given, on a CPU. Shorter passes are slower per token, longer
ones take more memory and are no faster."""


@dataclass(frozen=True)
class Distillation:
    """Learning from a teacher: loss = text + logits + hidden, each times its weight.

    ``text`` is the cross entropy with the text itself, ``logits`` T² KL(teacher ‖ student) of the
    distributions at temperature T, ``hidden`` the squared distance of the hidden states after each
    block, over the squared length of the teacher's.
    """

    teacher: str = dataclasses.field(
        metadata=Setting(
            "Hub id or folder of a model with the same vocabulary to learn from too, usually the "
            "dense one.",
            metavar="MODEL",
        ).metadata()
    )
    temperature: float = setting(
        2.0, "Temperature of both distributions.", must_be=Bound("above 0", lambda value: value > 0)
    )
    text_weight: float = setting(1.0, "Weight of the cross entropy with the text.")
    logits_weight: float = setting(
        1.0, "Weight of the KL divergence from the teacher's distributions."
    )
    hidden_weight: float = setting(
        1.0, "Weight of the squared distance from the teacher's hidden states."
    )

    def __post_init__(self) -> None:
        check(self)
        weights = (self.text_weight, self.logits_weight, self.hidden_weight)
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise CfspError(f"loss weights must be 0 or more and not all 0, got {weights}")


@dataclass(frozen=True)
class Recovery:
    """How to train. Two runs of the same settings on the same model and CPU give the same bits."""

    method: str = setting(
        "lora",
        "What is trained.",
        choices={
            "lora": "low-rank adapters, merged at the end",
            "ffn": "all parameters of the FFNs",
        },
    )
    allocation: str = setting(
        "importance",
        "Ranks of the blocks.",
        choices={
            "importance": "by the coarse importance of the block",
            "uniform": "the same in all, with as many parameters",
        },
    )
    targets: str = setting(
        "ffn",
        "Which projections get adapters. Models with routed experts can have them in the "
        "attention alone.",
        choices=("ffn", "attention", "all"),
    )
    rank: int = setting(
        8,
        "Rank of uniform adapters; with importance, the one whose number of parameters is met.",
        must_be=at_least(1),
    )
    scaling: float = setting(
        2.0, "LoRA's alpha over the rank, of every adapter.", must_be=positive()
    )
    dataset: str | None = setting(
        None,
        "Text to train on, as for calibration.",
        metavar="NAME|PATH[:WEIGHT],...",
        unset=AS_PRUNED,
    )
    seqlen: int | None = setting(None, "Tokens per window.", unset=AS_PRUNED)
    bos: str | None = setting(
        None, "Whether windows start with a BOS token.", choices=BOS_CHOICES, unset=AS_PRUNED
    )
    seed: int = setting(0, "Seed of windows, adapters and dropout.")
    steps: int = setting(200, "Steps of the optimiser.", must_be=at_least(1))
    batch_size: int | None = setting(
        None, "Windows per step.", must_be=at_least(1), unset="by size, 8 to 32"
    )
    learning_rate: float | None = setting(
        None,
        "Peak of a cosine schedule that begins with a warm-up of a twentieth of the steps.",
        must_be=positive(),
        unset="by size, 3e-4 or 1e-4; ffn: a tenth",
    )
    micro_batch: int | None = setting(
        None,
        "Windows per forward pass, a divisor of the batch size.",
        must_be=at_least(1),
        unset=f"about 8192 tokens on a GPU, {CPU_TOKENS} on a CPU",
    )
    gradient_checkpointing: str = setting(
        "auto",
        "Recompute activations instead of keeping them; auto: where memory is too small otherwise.",
        choices=("auto", "on", "off"),
    )
    distillation: Distillation | None = None
    """Learning from a teacher too."""

    def __post_init__(self) -> None:
        check(self)
        if self.dataset is not None:
            parse_mixture(self.dataset)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for YAML and JSON."""
        return dataclasses.asdict(self)

    def resolved(
        self, calibration: Calibration, parameters: int, device: torch.device
    ) -> "Recovery":
        """With a value for everything that was left open, for a pruned model of so many parameters;
        raises CfspError for a micro-batch that does not divide the batch, or too short windows."""
        _, windows, rates = next(row for row in DEFAULTS_BY_SIZE if parameters < row[0])
        seqlen = self.seqlen or calibration.seqlen
        batch_size = self.batch_size or windows
        most = min(batch_size, default_micro_batch(device, seqlen, CPU_TOKENS))
        divisor = next(count for count in range(most, 0, -1) if batch_size % count == 0)
        micro_batch = self.micro_batch or divisor
        if batch_size % micro_batch:
            raise CfspError(f"micro_batch {micro_batch} does not divide batch_size {batch_size}")
        return dataclasses.replace(
            self,
            dataset=self.dataset or calibration.dataset,
            seqlen=seqlen,
            bos=self.bos or calibration.bos,
            batch_size=batch_size,
            learning_rate=self.learning_rate or rates[self.method],
            micro_batch=micro_batch,
        )

    @property
    def text(self) -> Calibration:
        """Where the windows of all steps come from; of resolved settings."""
        if self.dataset is None or self.seqlen is None or self.bos is None:
            raise ValueError("settings that are not resolved")
        return Calibration(
            self.dataset, self.steps * (self.batch_size or 1), self.seqlen, self.seed, self.bos
        )
