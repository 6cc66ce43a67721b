"""How to train a pruned model: every choice that changes the result, in one small object."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from ..calibration.mixtures import parse_mixture
from ..calibration.text import BOS_CHOICES
from ..calibration.windows import Calibration
from ..errors import CfspError, unknown_name
from ..models.blockwise import default_micro_batch

METHODS = ("lora", "ffn")
ALLOCATIONS = ("importance", "uniform")
TARGETS = ("ffn", "attention", "all")
GRADIENT_CHECKPOINTING = ("auto", "on", "off")


@dataclass(frozen=True)
class SizeDefaults:
    """What suits models of a size, where the user says nothing."""

    below: float
    """Parameters of the pruned model."""
    batch_size: int
    learning_rates: dict[str, float]
    """By method."""


DEFAULTS_BY_SIZE = (
    SizeDefaults(1e9, 8, {"lora": 3e-4, "ffn": 3e-5}),
    SizeDefaults(10e9, 16, {"lora": 3e-4, "ffn": 3e-5}),
    SizeDefaults(math.inf, 32, {"lora": 1e-4, "ffn": 1e-5}),
)
"""The first row that a model is small enough for."""

CPU_TOKENS = 1024
"""Of a micro-batch that is not given, on a CPU. Shorter passes are slower per token, longer ones
take more memory and are no faster."""


@dataclass(frozen=True)
class Distillation:
    """Learning from a teacher: loss = text + logits + hidden, each times its weight.

    ``text`` is the cross entropy with the text itself, ``logits`` T² KL(teacher ‖ student) of the
    distributions at temperature T, ``hidden`` the squared distance of the hidden states after each
    block, over the squared length of the teacher's.
    """

    teacher: str
    """Hub id or folder of a model with the same vocabulary; usually the dense one."""
    temperature: float = 2.0
    text_weight: float = 1.0
    logits_weight: float = 1.0
    hidden_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise CfspError(f"temperature must be above 0, got {self.temperature}")
        weights = (self.text_weight, self.logits_weight, self.hidden_weight)
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise CfspError(f"loss weights must be 0 or more and not all 0, got {weights}")


@dataclass(frozen=True)
class Recovery:
    """How to train. Two runs of the same settings on the same model and CPU give the same bits."""

    method: str = "lora"
    """lora: low-rank adapters, merged at the end; ffn: the FFNs' own parameters, all of them."""
    allocation: str = "importance"
    """Ranks of the blocks: by their coarse importance, or uniform with as many parameters."""
    targets: str = "ffn"
    """What gets adapters: the projections of ffn, attention or all. Models with routed experts can
    have them in the attention alone."""
    rank: int = 8
    """The uniform rank; with importance, the one whose number of parameters is met."""
    scaling: float = 2.0
    """LoRA's alpha over the rank, of every adapter."""
    dataset: str | None = None
    """As in :class:`cfsp.Calibration`. None, here and in the next two: as the model was pruned."""
    seqlen: int | None = None
    bos: str | None = None
    seed: int = 0
    """Of windows, adapters and dropout."""
    steps: int = 200
    batch_size: int | None = None
    """Windows per step. None: by :data:`DEFAULTS_BY_SIZE`; so too ``learning_rate``."""
    learning_rate: float | None = None
    """Peak of a cosine schedule that begins with a warm-up of a twentieth of the steps."""
    micro_batch: int | None = None
    """Windows per forward pass, a divisor of ``batch_size``. None: as many as make about 8192
    tokens on a GPU, 1024 on a CPU, one at least."""
    gradient_checkpointing: str = "auto"
    """Recompute activations instead of keeping them. auto: where memory is too small otherwise."""
    distillation: Distillation | None = None

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("method", self.method, METHODS),
            ("allocation", self.allocation, ALLOCATIONS),
            ("targets", self.targets, TARGETS),
            ("gradient_checkpointing", self.gradient_checkpointing, GRADIENT_CHECKPOINTING),
            ("bos", self.bos or "auto", BOS_CHOICES),
        ):
            if value not in valid:
                raise unknown_name(name, value, valid)
        if self.dataset is not None:
            parse_mixture(self.dataset)
        for name in ("rank", "steps", "batch_size", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CfspError(f"{name} must be 1 or more, got {value}")
        for name in ("scaling", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise CfspError(f"{name} must be above 0, got {value}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for YAML and JSON."""
        return dataclasses.asdict(self)

    def resolved(
        self, calibration: Calibration, parameters: int, device: torch.device
    ) -> "Recovery":
        """With a value for everything that was left open.

        Args:
            calibration: of the pruning recipe.
            parameters: of the pruned model.
            device: that trains it.

        Raises:
            CfspError: a micro-batch that does not divide the batch, or too short windows.
        """
        of_size = next(row for row in DEFAULTS_BY_SIZE if parameters < row.below)
        seqlen = self.seqlen or calibration.seqlen
        batch_size = self.batch_size or of_size.batch_size
        most = min(batch_size, default_micro_batch(device, seqlen, CPU_TOKENS))
        divisor = next(count for count in range(most, 0, -1) if batch_size % count == 0)
        found = dataclasses.replace(
            self,
            dataset=self.dataset or calibration.dataset,
            seqlen=seqlen,
            bos=self.bos or calibration.bos,
            batch_size=batch_size,
            learning_rate=self.learning_rate or of_size.learning_rates[self.method],
            micro_batch=self.micro_batch or divisor,
        )
        if batch_size % (found.micro_batch or 1):
            raise CfspError(
                f"micro_batch {found.micro_batch} does not divide batch_size {batch_size}"
            )
        return found

    @property
    def text(self) -> Calibration:
        """Where the windows of all steps come from; of resolved settings."""
        if self.dataset is None or self.seqlen is None or self.bos is None:
            raise ValueError("settings that are not resolved")
        return Calibration(
            self.dataset, self.steps * (self.batch_size or 1), self.seqlen, self.seed, self.bos
        )
