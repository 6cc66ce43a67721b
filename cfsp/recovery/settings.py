"""How to train a pruned model: every choice that changes the result, in one small object."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from ..calibration.mixtures import parse_mixture
from ..calibration.tokens import BOS_CHOICES
from ..calibration.windows import Calibration
from ..errors import CfspError
from ..models.blockwise import default_micro_batch
from ..settings import Bound, Setting, at_least, check, positive, setting

AS_PRUNED = "as the model was pruned"
COUNT, POSITIVE = at_least(1), positive()
RATES, LOW_RATES = {"lora": 3e-4, "ffn": 3e-5}, {"lora": 1e-4, "ffn": 1e-5}
DEFAULTS_BY_SIZE = ((1e9, 8, RATES), (10e9, 16, RATES), (math.inf, 32, LOW_RATES))
"""(parameters, batch size, learning rate by method): for pruned models of fewer parameters than the
first, where the user says nothing; the first row that fits."""

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


METHODS = {"lora": "low-rank adapters, merged at the end", "ffn": "all parameters of the FFNs"}
ALLOCATIONS = {
    "importance": "by the coarse importance of the block",
    "uniform": "the same in all, with as many parameters",
}


@dataclass(frozen=True)
class Recovery:
    """How to train. Two runs of the same settings on the same model and CPU give the same bits."""

    method: str = setting("lora", "What is trained.", choices=METHODS)
    allocation: str = setting("importance", "Ranks of the blocks.", choices=ALLOCATIONS)
    targets: str = setting(
        "ffn",
        "Which projections get adapters. Models with routed experts can have them in the "
        "attention alone.",
        choices=("ffn", "attention", "all"),
    )
    rank: int = setting(
        8,
        "Rank of uniform adapters; with importance, the one whose number of parameters is met.",
        must_be=COUNT,
    )
    scaling: float = setting(2.0, "LoRA's alpha over the rank, of every adapter.", must_be=POSITIVE)
    dataset: str | None = setting(
        None,
        "Text to train on, as for calibration.",
        metavar="NAME|PATH[:WEIGHT],...",
        unset=AS_PRUNED,
    )
    text_column: str | None = setting(
        None,
        "Column of the text, as for calibration.",
        metavar="NAME",
        unset=f"{AS_PRUNED}, where it is on the same dataset",
    )
    seqlen: int | None = setting(None, "Tokens per window.", must_be=at_least(2), unset=AS_PRUNED)
    bos: str | None = setting(
        None, "Whether windows start with a BOS token.", choices=BOS_CHOICES, unset=AS_PRUNED
    )
    seed: int = setting(0, "Seed of windows, adapters and dropout.")
    steps: int = setting(200, "Steps of the optimiser.", must_be=COUNT)
    batch_size: int | None = setting(
        None, "Windows per step.", must_be=COUNT, unset="by size, 8 to 32"
    )
    learning_rate: float | None = setting(
        None,
        "Peak of a cosine schedule that begins with a warm-up of a twentieth of the steps.",
        must_be=POSITIVE,
        unset="by size, 3e-4 or 1e-4; ffn: a tenth",
    )
    micro_batch: int | None = setting(
        None,
        "Windows per forward pass, a divisor of the batch size.",
        must_be=COUNT,
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
        """With a value for everything that was left open, for a pruned model of ``parameters``.
        Raises CfspError for a micro-batch that does not divide the batch."""
        batch, rates = next(row[1:] for row in DEFAULTS_BY_SIZE if parameters < row[0])
        seqlen, batch = self.seqlen or calibration.seqlen, self.batch_size or batch
        most = min(batch, default_micro_batch(device, seqlen, CPU_TOKENS))
        micro_batch = self.micro_batch or max(n for n in range(1, most + 1) if batch % n == 0)
        if batch % micro_batch:
            raise CfspError(f"micro_batch {micro_batch} does not divide batch_size {batch}")
        return dataclasses.replace(
            self,
            dataset=self.dataset or calibration.dataset,
            text_column=self.text_column or (None if self.dataset else calibration.text_column),
            seqlen=seqlen,
            bos=self.bos or calibration.bos,
            batch_size=batch,
            learning_rate=self.learning_rate or rates[self.method],
            micro_batch=micro_batch,
        )

    @property
    def text(self) -> Calibration:
        """Where the windows of all steps come from; of resolved settings."""
        if self.dataset is None or self.seqlen is None or self.bos is None:
            raise ValueError("settings that are not resolved")
        return Calibration(
            self.dataset,
            self.steps * (self.batch_size or 1),
            self.seqlen,
            self.seed,
            self.bos,
            self.text_column,
        )
