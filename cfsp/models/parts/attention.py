"""The attention of a block: its units are KV groups, each with the query heads that read it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..modeling_cfsp import set_heads
from .channels import UnitAxis
from .part import Part


@dataclass(frozen=True)
class Attention(Part):
    """A KV group with its query heads is so many columns, side by side, of the output projection: a
    single head where each has keys of its own, or where one head of keys serves all.

    All paths are those of modules in a block.
    """

    path: str
    down: str
    axes: tuple[tuple[str, UnitAxis], ...]
    """Every parameter with units in it, by its name in the block, those of ``down`` among them."""
    heads: int
    """Query heads of a unit."""
    keys: int
    """KV heads of a unit; 0 where one serves all units."""
    heads_name: str = "num_attention_heads"
    keys_name: str | None = "num_key_value_heads"
    """What the config calls the numbers of heads; None where it has one number for both."""
    projection_class: str = "Linear"
    skipped_as: ClassVar[str] = "attention"

    @property
    def channels(self) -> Mapping[str, UnitAxis]:
        return dict(self.axes)

    @property
    def head_size(self) -> int:
        """Values of a query head."""
        return sum(self.channels[f"{self.down}.weight"].sections) // self.heads

    @property
    def count_name(self) -> str:
        return self.keys_name if self.keys and self.keys_name else self.heads_name

    def config_sizes(self, count: int) -> dict[str, int]:
        keys = {self.keys_name: count} if self.keys and self.keys_name else {}
        return {self.heads_name: count * self.heads, **keys}

    def set_count(self, block: nn.Module, count: int) -> None:
        set_heads(block.get_submodule(self.path), count * self.heads, count * self.keys or 1)
