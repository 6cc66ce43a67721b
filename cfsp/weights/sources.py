"""The tensors of a model, each with the stored ones that it is made of.

Most are stored as they are. Experts that are stored apart are read to their places in the one
parameter that a model has of them, where their types allow it. Quantised weights are decoded one at
a time, and what transformers converts otherwise is converted by it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ..io.safetensors import (
    JoinedTensor,
    Readable,
    StoredTensor,
    TensorInfo,
    first_values,
    read_tensors,
)
from .quantised import QuantisedTensor

Weight = StoredTensor | QuantisedTensor
Convert = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
"""Takes weights by their stored names, gives tensors by their names in the model."""


@dataclass(frozen=True, eq=False)
class Source:
    """Weights of a checkpoint, and what a model has of them together; equal to itself alone."""

    targets: dict[str, TensorInfo]
    """By their names in the model, as it has them."""
    weights: dict[str, Weight]
    """By stored names. Without ``convert`` they lie one behind the other in the one target."""
    convert: Convert | None = field(default=None, repr=False)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """All that is read of it."""
        weights = self.weights.items()
        return tuple(part for name, weight in weights for part in _parts(name, weight).values())

    @cached_property
    def is_quantised(self) -> bool:
        """Whether weights have to be decoded."""
        return any(isinstance(weight, QuantisedTensor) for weight in self.weights.values())

    @cached_property
    def in_place(self) -> bool:
        """Whether what is read is the tensor itself, but for its dtype."""
        dtypes = {weight.dtype for weight in self.weights.values()}
        return self.convert is None and not self.is_quantised and len(dtypes) == 1

    @cached_property
    def is_cast(self) -> bool:
        """Whether its tensors take memory of their own beside what is read."""
        ((target, *_), (weight, *_)) = self.targets.values(), self.weights.values()
        return not self.in_place or weight.dtype != target.dtype

    @cached_property
    def reads(self) -> dict[str, Readable]:
        """What :meth:`make` takes the values of."""
        if self.in_place:
            ((name, info),), (first, *_) = self.targets.items(), self.weights.values()
            return {name: JoinedTensor(first.dtype, info.shape, self.stored)}
        return {
            key: stored
            for name, weight in self.weights.items()
            for key, stored in _parts(name, weight).items()
        }

    def make(
        self, read: Mapping[str, torch.Tensor], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """The tensors by their names in the model, on a device, of what was read; ``read`` itself
        where that is possible."""
        if self.in_place:
            found = {name: read[name].to(device, non_blocking=True) for name in self.targets}
        elif self.convert is None:
            ((name, info),) = self.targets.items()
            found = {name: torch.empty(info.shape, dtype=info.dtype, device=device)}
            left = found[name].view(-1)
            for key, weight in self.weights.items():
                place, left = left[: weight.numel], left[weight.numel :]
                place.view(weight.shape).copy_(_value(key, weight, read, info.dtype, device))
        else:
            dtype = next(iter(self.targets.values())).dtype
            found = self.convert(
                {k: _value(k, weight, read, dtype, device) for k, weight in self.weights.items()}
            )
        return {name: found[name].to(info.dtype) for name, info in self.targets.items()}

    def first_values(self, name: str, count: int) -> torch.Tensor:
        """The first values of the first row of a target, with as little read as it takes."""
        if self.in_place:
            return first_values(self.reads[name], count).to(self.targets[name].dtype)
        source, cpu = self, torch.device("cpu")
        if self.convert is None:  # the first weight has them
            key, weight = next(iter(self.weights.items()))
            info = TensorInfo(self.targets[name].dtype, weight.shape)
            source = Source({name: info}, {key: weight})
            row = self.targets[name].numel // self.targets[name].shape[0]
            return source.make(read_tensors(source.reads), cpu)[name].flatten()[: min(count, row)]
        return source.make(read_tensors(source.reads), cpu)[name][0].flatten()[:count]


def _parts(name: str, weight: Weight) -> dict[str, StoredTensor]:
    """What is read of a weight."""
    if isinstance(weight, QuantisedTensor):
        return {f"{name} {role}": part for role, part in weight.parts.items()}
    return {name: weight}


def _value(
    name: str,
    weight: Weight,
    read: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    if not isinstance(weight, QuantisedTensor):
        return read[name].to(device, non_blocking=True)
    parts = {role: read[f"{name} {role}"].to(device, non_blocking=True) for role in weight.parts}
    return weight.decode(parts, dtype)
