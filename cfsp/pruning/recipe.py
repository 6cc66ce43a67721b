"""What to do to a model: every choice that changes the result, in one small object."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..calibration.curves import ERROR_SCALES
from ..calibration.statistics import INFLUENCE_METRICS
from ..calibration.windows import Calibration
from ..errors import CfspError, unknown_name
from .allocation import ALLOCATORS, NEEDS_CURVES, SEARCH
from .budget import ModelBudget, parse_model_budget
from .compensation import BLOCKWISE, COMPENSATIONS, NEEDS_GRAM
from .least_squares import DAMPING
from .refit import EPOCHS, LEARNING_RATE
from .scoring import SCORERS

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Recipe:
    """How to prune. Two runs of one recipe on the same model and machine give the same bits."""

    sparsity: float = 0.3
    """Fraction of all FFN channels to remove, in [0, 1)."""
    budget: str | None = None
    """Of the whole model, instead of a sparsity:
    see :func:`cfsp.pruning.budget.parse_model_budget`."""
    scorer: str = "cfsp-residual"
    """``cfsp`` is the published method."""
    allocator: str | None = None
    """None: the scorer's own, as its authors use it."""
    compensation: str | None = None
    """None: the scorer's own."""
    damping: float = DAMPING
    """Of least squares: how strongly the kept columns are pulled towards what they were, relative
    to the mean square of each channel."""
    sequential: bool = False
    """Fit each block once more to its dense output, on what the pruned blocks before it give."""
    epochs: int = EPOCHS
    """Of Adam over the calibration windows, for each block, where the compensation is blockwise."""
    learning_rate: float = LEARNING_RATE
    """Of Adam: its step, relative to the root mean square of each matrix."""
    importance: str = "angular"
    """Metric of the coarse block importance."""
    error_scale: str = "output"
    """Of the error curves that a knapsack adds up: in units of the energy of the FFN's own output,
    of that of the block's hidden state, or absolute."""
    importance_exponent: float = 0.0
    """In the sum of error curves a block counts times its importance to this power; 0: as any."""
    search_generations: int = 20
    """Rounds of a search."""
    search_offspring: int = 4
    """Candidates of a round."""
    search_windows: int = 8
    """The calibration's last windows, on which a search measures; least squares hold some of these
    out."""
    search_seed: int = 0
    """Of a search's exchanges."""
    uniform: bool = False
    """The same width for all blocks: the result is of a class of transformers itself."""
    width_multiple: int = 128
    """Widths are multiples of this; 1 for exact widths."""
    dtype: str = "auto"
    """auto: as the checkpoint stores it."""
    micro_batch: int | None = None
    """Windows per forward call; None: about 8192 tokens on a GPU, one window on a CPU."""
    calibration: Calibration = Calibration()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise CfspError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if self.budget is not None:
            parse_model_budget(self.budget)
            if self.sparsity != type(self).sparsity:
                raise CfspError(
                    f"budget {self.budget} and sparsity {self.sparsity} exclude each other"
                )
        if self.scorer not in SCORERS:
            raise unknown_name("scorer", self.scorer, SCORERS)
        if self.allocator is not None and self.allocator not in ALLOCATORS:
            raise unknown_name("allocator", self.allocator, ALLOCATORS)
        if self.uniform and self.allocator not in (None, "uniform"):
            raise CfspError(f"uniform widths leave nothing to allocator {self.allocator!r}")
        if self.compensation is not None and self.compensation not in COMPENSATIONS:
            raise unknown_name("compensation", self.compensation, COMPENSATIONS)
        if not 0 <= self.damping < float("inf"):
            raise CfspError(f"damping must be 0 or more, got {self.damping}")
        if self.epochs < 1:
            raise CfspError(f"epochs must be 1 or more, got {self.epochs}")
        if not 0 < self.learning_rate < float("inf"):
            raise CfspError(f"learning_rate must be more than 0, got {self.learning_rate}")
        if self.importance not in INFLUENCE_METRICS:
            raise unknown_name("importance metric", self.importance, INFLUENCE_METRICS)
        if self.error_scale not in ERROR_SCALES:
            raise unknown_name("error scale", self.error_scale, ERROR_SCALES)
        for name in ("search_generations", "search_offspring", "search_windows"):
            if getattr(self, name) < 1:
                raise CfspError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.searches and self.budget is not None and self.budget.startswith("latency"):
            raise CfspError("allocator 'search' keeps what channels cost, not seconds: use another")
        if self.searches and self.search_windows > self.calibration.samples:
            raise CfspError(
                f"search_windows {self.search_windows} is more than the calibration's "
                f"{self.calibration.samples} windows"
            )
        if not abs(self.importance_exponent) <= 100:
            raise CfspError(
                f"importance_exponent must be in [-100, 100], got {self.importance_exponent}"
            )
        if self.width_multiple < 1:
            raise CfspError(f"width_multiple must be 1 or more, got {self.width_multiple}")
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)
        if self.micro_batch is not None and self.micro_batch < 1:
            raise CfspError(f"micro_batch must be 1 or more, got {self.micro_batch}")

    @property
    def model_budget(self) -> ModelBudget | None:
        """The budget, read."""
        return parse_model_budget(self.budget) if self.budget is not None else None

    @property
    def resolved_allocator(self) -> str:
        """The allocator in force."""
        return "uniform" if self.uniform else self.allocator or SCORERS[self.scorer].allocator

    @property
    def resolved_compensation(self) -> str:
        """The compensation in force."""
        return self.compensation or SCORERS[self.scorer].compensation

    @property
    def searches(self) -> bool:
        """Whether widths are searched for by measuring pruned models."""
        return self.resolved_allocator == SEARCH

    @property
    def search_candidates(self) -> int:
        """Pruned models that a search measures at most."""
        return 1 + self.search_generations * self.search_offspring

    @property
    def blockwise(self) -> bool:
        """Whether all weights of a cut FFN are fitted again."""
        return self.resolved_compensation in BLOCKWISE

    @property
    def refits(self) -> bool:
        """Whether calibration windows go through the blocks once more, as these are cut."""
        return self.sequential or self.blockwise

    @property
    def ranks_by_gram(self) -> bool:
        """Whether scores or error curves are made from Gram matrices."""
        return SCORERS[self.scorer].needs_gram or self.resolved_allocator in NEEDS_CURVES

    def needs_gram(self, planned: bool = False) -> str | None:
        """What reads Gram matrices: a compensation; a scorer or allocator, unless all is
        ``planned``; or None."""
        if self.resolved_compensation in NEEDS_GRAM:
            return f"compensation {self.resolved_compensation!r}"
        if SCORERS[self.scorer].needs_gram and not planned:
            return f"scorer {self.scorer!r}"
        if self.resolved_allocator in NEEDS_CURVES and not planned:
            return f"allocator {self.resolved_allocator!r}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for YAML and JSON."""
        return dataclasses.asdict(self)


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe of a mapping such as :meth:`Recipe.to_dict` gives; missing keys are defaults.

    Raises:
        CfspError: an unknown key or a value out of range.
    """
    values = dict(values)
    calibration = values.pop("calibration", None) or {}
    for name, kind, given in (
        ("recipe", Recipe, values),
        ("calibration", Calibration, calibration),
    ):
        if not isinstance(given, dict):
            raise CfspError(f"{name} must be a mapping, got {type(given).__name__}")
        fields = [field.name for field in dataclasses.fields(kind)]
        for key in given:
            if key not in fields:
                raise unknown_name(f"{name} key", str(key), fields)
    try:
        return Recipe(**values, calibration=Calibration(**calibration))
    except TypeError as error:
        raise CfspError(f"recipe: {error}") from None


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from YAML: a ``recipe.yaml`` of an earlier result, or its ``recipe`` part.

    Raises:
        CfspError: no such file, not YAML, an unknown key or a value out of range.
    """
    try:
        document = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise CfspError(f"cannot read recipe {path}: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise CfspError(f"recipe {path} must be a mapping")
    return recipe_from_dict(document.get("recipe", document))
