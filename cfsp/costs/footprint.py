"""What a model takes before and after pruning: channels, parameters, FLOPs, KV bytes and, measured,
time."""

from dataclasses import asdict, dataclass
from typing import Any

from ..io.safetensors import Tensors
from ..models.descriptions import Description
from ..pruning.budget import BATCH, LENGTH
from ..pruning.compaction import planned_tensors
from ..pruning.plan import PruningPlan
from .flops import model_costs
from .latency import LatencyTable


@dataclass(frozen=True)
class Footprint:
    """What one model takes."""

    channels: int
    """Channels of all FFNs and experts."""
    experts: int
    """Routed experts of all blocks."""
    parameters: int
    """Parameters, tied ones once."""
    flops: float
    """FLOPs of a forward call; a multiplication and an addition are two."""
    blocks: int
    """Decoder blocks."""
    seconds: float | None = None
    """Seconds of a forward call by a measured table; None: there was none."""
    kv_bytes: int | None = None
    """Bytes of a token's keys and values in a cache, in or out of a sliding window; None: not
    known, as where they are made of a latent, or there are none."""


@dataclass(frozen=True)
class Footprints:
    """A model before and after, in the units that budgets have."""

    before: Footprint
    after: Footprint
    batch: int
    length: int
    """FLOPs and seconds are of a forward call over [batch, length] tokens."""
    context: int = 0
    """Tokens that are in the cache before it."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, str, str]]:
        """(title, before, after with what is left of it) for tables."""
        shape = f"{self.batch} x {self.length} tokens"
        shape += f" after {self.context}" if self.context else ""
        before, after = self.before, self.after
        fewer = before.experts > after.experts
        rows = [
            *(
                [_row("blocks", before.blocks, after.blocks)]
                if before.blocks > after.blocks
                else []
            ),
            _row("FFN channels", before.channels, after.channels, "{:,}"),
            *([_row("experts", before.experts, after.experts, "{:,}")] if fewer else []),
            _row("parameters", before.parameters, after.parameters, "{:,}"),
            _row(f"FLOPs, {shape}", before.flops, after.flops, "{:.4g}"),
        ]
        if before.kv_bytes:
            title = "KV cache, bytes per token"
            rows.append(_row(title, before.kv_bytes, after.kv_bytes or 0, "{:,}"))
        if before.seconds is None or after.seconds is None:
            return [*rows, (f"latency, {shape}", "not measured", "not measured")]
        return [*rows, _row(f"latency, {shape}", before.seconds, after.seconds, "{:.4g} s")]


def _row(title: str, before: float, after: float, form: str = "{:,}") -> tuple[str, str, str]:
    return title, form.format(before), f"{form.format(after)} ({after / before:.1%})"


def footprints(
    described: Description, plan: PruningPlan, table: LatencyTable | None = None
) -> Footprints:
    """What a plan makes of a model, at the batch and length of the table or else the budget."""
    limit = (
        getattr(described.model.config.get_text_config(), "max_position_embeddings", None) or LENGTH
    )
    shaped = table or plan.recipe.model_budget
    batch, length, context = shaped.shape if shaped else (BATCH, min(LENGTH, limit), 0)

    def footprint(
        of: Description, channels: int, experts: int, held: Tensors, seconds: float | None
    ) -> Footprint:
        costs = model_costs(of, held)
        flops = costs.flops(length + context) * batch * length
        sizes = channels, experts, costs.parameters, flops, len(of.units)
        return Footprint(*sizes, seconds, costs.kv_bytes)

    dense = described.dense or described
    pruned = planned_tensors(described.parameters, described.parts, plan)
    channels = sum(own.total for block in dense.units for own in block if own.are_channels)
    widths = [width for block in plan.blocks for width in block.counts]
    routed = [placed for placed in dense.parts if placed.units.experts > 1]
    left = sum(placed.experts for placed in described.parts if placed.units.experts > 1)
    # A table is of all experts.
    seconds = table.predicted(widths) if table and plan.recipe.experts is None else None
    before = footprint(
        dense,
        channels,
        sum(placed.units.experts for placed in routed),
        dense.parameters,
        table.dense_seconds if table else None,
    )
    after = footprint(described, sum(plan.widths), left, pruned, seconds)
    return Footprints(before, after, batch, length, context)
