"""What to do to a model: every choice that changes the result, in one small object."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..calibration.curves import ERROR_SCALES
from ..calibration.statistics import INFLUENCE_METRICS
from ..calibration.windows import Calibration
from ..errors import CfspError, shown, unknown_name
from ..io.documents import read_yaml
from ..settings import FRACTION, NOT_NEGATIVE, at_least, check, positive, setting
from ..typed import Bound
from .allocation import ALLOCATORS
from .budget import FORM, check_budgets
from .choices import Choices
from .compensation import COMPENSATIONS
from .least_squares import DAMPING
from .scoring import SCORERS
from .whole.experts import EXPERT_SCORES

UNITS = ("channels", "groups", "attention", "ffn")
SPARSITY = 0.3
BLOCK_CHOICES = {
    "angle": "the stretch that turns the hidden states least, by a pass over a few windows",
    "loss": "the stretch without which the loss is least, of all that were tried; in memory",
}
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Recipe(Choices):
    """How to prune. Two runs of one recipe on the same model and machine give the same bits."""

    sparsity: float = setting(  # type: ignore[assignment] # None is replaced by a number
        None,
        "Fraction of all FFN channels to remove, in [0, 1), of the experts that stay.",
        must_be=FRACTION,
        unset=f"{SPARSITY}, or 0 where experts or blocks are removed",
    )
    budget: str | None = setting(
        None, f"Budget of the whole model, instead of a sparsity: {FORM}.", metavar="KIND=AMOUNT"
    )
    scorer: str = setting(
        "cfsp-output",
        "How channels are scored; cfsp is the published method.",
        choices={name: scorer.summary for name, scorer in SCORERS.items()},
    )
    allocator: str | None = setting(
        None,
        "How the budget is divided among blocks.",
        choices={name: known.summary for name, known in ALLOCATORS.items()},
        unset="the scorer's, as its authors use it",
    )
    compensation: str | None = setting(
        None,
        "What makes up for the removed channels.",
        choices={name: known.summary for name, known in COMPENSATIONS.items()},
        unset="the scorer's",
    )
    damping: float = setting(
        DAMPING,
        "How strongly least squares pull the kept columns towards what they were, relative to the "
        "mean square of each channel.",
        must_be=NOT_NEGATIVE,
    )
    sequential: bool = setting(
        False,
        "Refit each block once more to its dense output, on what the pruned blocks before it give.",
    )
    epochs: int = setting(
        2,
        "Passes of Adam over the calibration windows, for each block, where the compensation is "
        "blockwise.",
        must_be=at_least(1),
    )
    learning_rate: float = setting(
        0.005,
        "Step of that Adam, relative to the root mean square of each matrix.",
        must_be=positive("more than 0"),
    )
    width_windows: int = setting(
        16,
        "How many of the calibration windows widths are chosen by, where all go through the second "
        "pass too, to choose and fit channels.",
        must_be=at_least(1),
    )
    units: str = setting(
        "channels",
        f"What may be removed, of {', '.join(UNITS)}: channels of FFNs, KV groups of attentions "
        "with their query heads, and both of these whole, but in the first and the last block.",
        metavar="KIND,KIND",
    )
    experts: int | None = setting(
        None,
        "How many routed experts of each block stay; they are chosen before channels are.",
        must_be=at_least(1),
        unset="all",
    )
    expert_score: str = setting(
        "msan",
        "How experts are scored.",
        choices={name: known.summary for name, known in EXPERT_SCORES.items()},
        called="expert score",
    )
    group_multiple: int = setting(
        1,
        "Numbers of KV groups are multiples of this: of the devices that will share a layer.",
        must_be=at_least(1),
    )
    importance: str = setting(
        "angular",
        "Metric of the coarse block importance.",
        choices=INFLUENCE_METRICS,
        called="importance metric",
    )
    error_scale: str | None = setting(
        None,
        "Unit of the error curves that a knapsack adds up: the energy of the part's own output, "
        "that of the block's hidden state, or none.",
        choices=ERROR_SCALES,
        called="error scale",
        unset="output for channels alone, hidden for several kinds of units",
    )
    importance_exponent: float = setting(
        0.0,
        "In the sum of error curves a block counts times its importance to this power; 0: all "
        "blocks count the same.",
        must_be=Bound("in [-100, 100]", lambda value: abs(value) <= 100),
    )
    search_generations: int = setting(20, "Rounds of a search.", must_be=at_least(1))
    search_offspring: int = setting(4, "Candidates in each round of a search.", must_be=at_least(1))
    search_windows: int = setting(
        8,
        "How many of the calibration's last windows a search measures on; least squares hold some "
        "of these out.",
        must_be=at_least(1),
    )
    search_seed: int = setting(0, "Seed of the exchanges of width in a search.")
    uniform: bool = setting(
        False,
        "Keep the same width in all blocks: the result is of a class of transformers itself and "
        "needs no modeling file.",
    )
    blocks: int | None = setting(
        None,
        "How many blocks stay, or, if negative, go: one stretch, taken out before anything else, "
        "never the first or the last block.",
        must_be=Bound("2 or more, or below 0", lambda value: value >= 2 or value < 0),
        unset="all",
    )
    block_choice: str = setting(
        "angle", "Which blocks go.", choices=BLOCK_CHOICES, called="block choice"
    )
    width_multiple: int = setting(
        128, "Widths are multiples of this; 1 for exact widths.", must_be=at_least(1)
    )
    dtype: str = setting(
        "auto", "Type of the weights; auto: as the checkpoint stores them.", choices=DTYPES
    )
    micro_batch: int | None = setting(
        None,
        "Windows per forward call.",
        must_be=at_least(1),
        unset="about 8192 tokens on a GPU, one window on a CPU",
    )
    calibration: Calibration = Calibration()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        check(self)
        kinds = self.unit_kinds
        for kind in kinds - set(UNITS) or ({self.units} if not kinds else ()):
            raise unknown_name("unit", kind, UNITS)
        if self.cuts_attention and SCORERS[self.scorer].of_ffns:
            raise CfspError(f"scorer {self.scorer!r} is of FFNs alone: use `units=channels`")
        if self.uniform and kinds != {"channels"}:
            raise CfspError("uniform widths are of channels alone: drop `uniform` or `units`")
        budget = self.model_budget
        if self.sparsity is None:
            alone = (self.experts or self.blocks) is not None and budget is None
            object.__setattr__(self, "sparsity", 0.0 if alone else SPARSITY)
        check_budgets(self.model_budgets, self.cuts_attention, self.resolved_allocator)
        if budget is not None and self.sparsity != SPARSITY:
            raise CfspError(f"budget {self.budget} and sparsity {self.sparsity} exclude each other")
        if self.uniform and self.allocator not in (None, "uniform"):
            raise CfspError(f"uniform widths leave nothing to allocator {self.allocator!r}")
        if self.blocks is not None and budget is not None and budget.kind == "latency":
            raise CfspError("a latency table is of all blocks: prune the result of `blocks` by it")
        measures = self.searches or self.chooses_by_loss
        if measures and self.search_windows > self.calibration.samples:
            raise CfspError(
                f"search_windows {self.search_windows} is more than the calibration's "
                f"{self.calibration.samples} windows"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for YAML and JSON."""
        return dataclasses.asdict(self)


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe of a mapping such as :meth:`Recipe.to_dict` gives; missing keys are defaults.
    CfspError for an unknown key or a value out of range."""
    if not isinstance(values, dict):
        raise CfspError(f"recipe must be a mapping, got {shown(values)}")
    calibration = values.get("calibration")
    settings = _settings("calibration", Calibration, {} if calibration is None else calibration)
    return _settings("recipe", Recipe, {**values, "calibration": settings})


Kind = TypeVar("Kind", Recipe, Calibration)


def _settings(name: str, kind: type[Kind], given: Any) -> Kind:
    """Of a mapping that has keys of the dataclass alone, which checks their values."""
    if not isinstance(given, dict):
        raise CfspError(f"{name} must be a mapping, got {type(given).__name__}")
    fields = [field.name for field in dataclasses.fields(kind)]
    for key in given:
        if key not in fields:
            raise unknown_name(f"{name} key", str(key)[:80], fields)
    return kind(**given)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from YAML: a ``recipe.yaml`` of an earlier result, or its ``recipe`` part.

    Raises:
        CfspError: no such file, not YAML, an unknown key or a value out of range.
    """
    document = read_yaml(path, "recipe ")
    if not isinstance(document, dict):
        raise CfspError(f"recipe {path} must be a mapping")
    try:
        return recipe_from_dict(document.get("recipe", document))
    except CfspError as error:
        raise CfspError(f"{path}: {error}") from None
