"""What follows from the choices of a recipe."""

from collections.abc import Sequence
from typing import Any

from ..apportion import Steps
from ..calibration.windows import Calibration
from ..models.parts.channels import Units
from .allocation import ALLOCATORS, SEARCH
from .budget import ModelBudget, parse_model_budgets
from .compensation import COMPENSATIONS
from .scoring import SCORERS


class Choices:
    """Of :class:`cfsp.pruning.recipe.Recipe`, which says what its fields are."""

    sparsity: float
    budget: str | None
    scorer: str
    allocator: str | None
    compensation: str | None
    sequential: bool
    width_windows: int
    units: str
    group_multiple: int
    error_scale: str | None
    search_generations: int
    search_offspring: int
    experts: int | None
    blocks: int | None
    block_choice: str
    uniform: bool
    width_multiple: int
    dtype: str
    calibration: Calibration

    @property
    def opening(self) -> dict[str, Any]:
        """How a model is opened for it."""
        return {"dtype": self.dtype, "attention": self.cuts_attention, "experts": self.experts}

    @property
    def cuts_channels(self) -> bool:
        """Whether more than experts and blocks goes."""
        whole = self.experts is not None or self.blocks is not None
        return not whole or self.budget is not None or self.sparsity > 0

    @property
    def model_budgets(self) -> tuple[ModelBudget, ...]:
        """The budgets, read; one of KV bytes comes last."""
        return parse_model_budgets(self.budget) if self.budget is not None else ()

    @property
    def model_budget(self) -> ModelBudget | None:
        """The first of them."""
        return next(iter(self.model_budgets), None)

    @property
    def only_blocks(self) -> bool:
        """Whether blocks go and nothing else."""
        return self.experts is None and not self.cuts_channels

    @property
    def chooses_by_loss(self) -> bool:
        """Whether blocks that go are chosen by measuring the model without them."""
        return self.blocks is not None and self.block_choice == "loss"

    @property
    def unit_kinds(self) -> frozenset[str]:
        """What may be removed, of :data:`UNITS`."""
        return frozenset(kind.strip() for kind in self.units.split(",") if kind.strip())

    @property
    def cuts_attention(self) -> bool:
        """Whether KV groups are units, some or all at once."""
        return not self.unit_kinds.isdisjoint(("groups", "attention"))

    @property
    def removes_ffns(self) -> bool:
        """Whether FFNs may go whole."""
        return "ffn" in self.unit_kinds

    @property
    def adds_kinds(self) -> bool:
        """Whether errors of several kinds of parts are compared, or whole parts may go."""
        return self.unit_kinds != {"channels"}

    def steps(self, parts: Sequence[tuple[int, Units]], blocks: int) -> tuple[Steps, ...]:
        """The numbers of units that may stay of parts, each with the number of its block, of which
        there are so many: nothing goes whole in the first and the last."""
        ends = (0, blocks - 1)
        return tuple(self._steps(units, protected=number in ends) for number, units in parts)

    def _steps(self, units: Units, *, protected: bool) -> Steps:
        """The numbers of these units that may stay; ``protected``: some have to."""
        some, whole = ("channels", "ffn") if units.are_channels else ("groups", "attention")
        budget = self.model_budget
        no_ffn = units.are_channels and budget is not None and budget.kind == "kv"  # none has keys
        if not self.cuts_channels or no_ffn:
            return Steps(units.count, units.count)
        multiple = self.width_multiple if units.are_channels else self.group_multiple
        removable = whole in self.unit_kinds and not protected and units.experts == 1
        return Steps(units.count, multiple if some in self.unit_kinds else units.count, removable)

    @property
    def resolved_allocator(self) -> str:
        """The allocator in force."""
        if self.uniform or self.allocator:
            return self.allocator or "uniform"
        own = SCORERS[self.scorer].allocator
        return "knapsack" if self.adds_kinds and own != "global" else own

    @property
    def resolved_error_scale(self) -> str:
        """The unit of error curves in force."""
        return self.error_scale or ("hidden" if self.adds_kinds else "output")

    @property
    def resolved_compensation(self) -> str:
        """The compensation in force."""
        if not self.cuts_channels:
            return "none"
        return self.compensation or SCORERS[self.scorer].compensation

    @property
    def cuts_evenly(self) -> bool:
        """Whether all FFNs are left the same share of their channels."""
        return self.resolved_allocator == "uniform"

    @property
    def searches(self) -> bool:
        """Whether widths are searched for by measuring pruned models."""
        return self.resolved_allocator == SEARCH and not self.only_blocks

    @property
    def search_candidates(self) -> int:
        """Pruned models that a search measures at most."""
        return 1 + self.search_generations * self.search_offspring

    @property
    def blockwise(self) -> bool:
        """Whether all weights of a cut FFN are fitted again."""
        return COMPENSATIONS[self.resolved_compensation].blockwise

    @property
    def fits(self) -> bool:
        """Whether the kept columns are fitted to calibration windows in the pass that cuts."""
        return COMPENSATIONS[self.resolved_compensation].needs_gram

    @property
    def refits(self) -> bool:
        """Whether pruned blocks are fitted again to what the dense ones give."""
        return (self.sequential or self.blockwise) and not self.only_blocks

    @property
    def makes_curves(self) -> bool:
        """Whether a calibration makes error curves: an allocator reads them, or a search begins
        with them."""
        return ALLOCATORS[self.resolved_allocator].needs_curves or self.searches

    @property
    def ranks_by_gram(self) -> bool:
        """Whether scores, or curves that the allocator needs, are made from Gram matrices."""
        return SCORERS[self.scorer].needs_gram or ALLOCATORS[self.resolved_allocator].needs_curves

    @property
    def sums_grams(self) -> bool:
        """Whether a calibration makes Gram matrices, for scores or error curves."""
        return self.ranks_by_gram or self.makes_curves

    @property
    def selects_again(self) -> bool:
        """Whether the pass that cuts scores and selects channels once more, by what it sees."""
        return self.fits and not self.ranks_by_gram

    @property
    def statistics_windows(self) -> int:
        """Calibration windows of a first pass that a second follows: a few where all of them go
        through that one, which scores again."""
        samples = self.calibration.samples
        again = self.selects_again and not self.searches
        return min(self.width_windows, samples) if again else samples
