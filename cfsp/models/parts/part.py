"""A part of a block that units are cut from: where they lie in its weights, how it is observed."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import nn

from cfsp_kernels import channel_statistics

from ...errors import CfspError
from ...io.memory import Room
from ..modeling_cfsp import set_parameter, skip
from ..surgery import forward_instead, parameter
from .channels import Compensate, Observer, PartWeights, UnitAxis, Units, in_place


class Part:
    """Units, side by side in the input of a projection ``down``, whose output the part adds.

    All paths are those of modules in a block.
    """

    path: str
    """The module that is the part."""
    down: str
    projection_class: str
    """Of transformers' Conv1D, weights are [in, out]."""
    skipped_as: ClassVar[str]
    """What ``skip`` of the config calls the part."""

    @property
    def is_transposed(self) -> bool:
        """Whether weights are [in, out]."""
        return self.projection_class == "Conv1D"

    @property
    def channels(self) -> Mapping[str, UnitAxis]:
        """Every parameter of a block with units in it; those that may be absent included."""
        raise NotImplementedError

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The parameters that a block with this part has."""
        return tuple(name for name in self.channels if name.endswith(".weight"))

    @property
    def down_bias(self) -> str | None:
        """The parameter that a compensation may add to or create; None where there can be none."""
        return f"{self.down}.bias"

    @property
    def count_name(self) -> str:
        """What the config calls the number of units."""
        raise NotImplementedError

    def config_sizes(self, count: int) -> dict[str, int]:
        """What the config says of a block with so many units."""
        return {self.count_name: count}

    def set_count(self, block: nn.Module, count: int) -> None:
        """Tell the modules of a block, whose parameters were cut, what they keep of their sizes."""
        raise NotImplementedError

    def projection(self, block: nn.Module, path: str) -> nn.Linear:
        """The projection at ``path``. Raises CfspError for a module of another class."""
        module = block.get_submodule(path)
        kind = type(module)
        known = kind.__module__.startswith(("torch.nn.", "transformers."))
        if kind.__name__ != self.projection_class or not known:
            raise CfspError(
                f"{path} is a {kind.__name__}, expected {self.projection_class} "
                "(quantised models and adapters: prune the plain model first)"
            )
        return module  # type: ignore[return-value]

    def units(self, block: nn.Module) -> Units:
        """Read from the shapes of the weights, which may be on meta."""
        axis = self.channels[f"{self.down}.weight"]
        size = self.projection(block, self.down).weight.shape[axis.dimension]
        return Units(axis.count(size), columns=sum(axis.sections))

    def weights(self, parameters: Mapping[str, torch.Tensor]) -> tuple[PartWeights, ...]:
        """The matrices of every expert (of the part itself, where it has none), from a block's
        parameters by name; no copies, unless they are transposed."""
        down = parameters[f"{self.down}.weight"]
        return (PartWeights(None, None, down.T.contiguous() if self.is_transposed else down),)

    def observed(
        self, block: nn.Module, observer: Observer, fused: bool = True
    ) -> AbstractContextManager[None]:
        """While it lasts, each run of the block hands the input of down and its statistics over.
        ``fused`` takes a fused op for both where there is one: the same numbers."""
        down = self.projection(block, self.down)
        down_forward = down.forward

        def observing(product: torch.Tensor) -> torch.Tensor:
            channel_statistics(product, totals=observer.totals())
            observer.add(product)
            return down_forward(product)

        return forward_instead([down], [observing])

    def remove_(self, block: nn.Module) -> None:
        """Take the part out of a block, in place: what is there instead adds nothing."""
        skip(block, self.skipped_as, self.path)

    def cut_(
        self, block: nn.Module, kept: torch.Tensor, compensate: Compensate, room: Room | None
    ) -> None:
        """Cut the part of a block in place to ``kept`` units [experts, count] int64, ascending;
        ``room`` gives the memory of new matrices, None: it is new."""
        room = None if room is in_place else room
        parameters = dict(block.named_parameters())
        (weights,) = self.weights(parameters)
        down, count = f"{self.down}.weight", kept.shape[1]
        out, own = None, self.channels[down]
        if room is not None and not self.is_transposed:
            out = room((len(weights.down), own.size(count)), weights.down.dtype)
        weight, added_bias = compensate(0, weights.down, out)
        if self.is_transposed:
            weight = weight.T.contiguous()
        set_parameter(block, down, parameter(weight, parameters[down]))
        for name, axis in self.channels.items():
            if name == down or name not in parameters:
                continue
            old = parameters[name]
            shape = list(old.shape)
            shape[axis.dimension] = axis.size(count)
            out = room(tuple(shape), old.dtype) if room is not None and len(shape) > 1 else None
            set_parameter(block, name, parameter(axis.cut(old.data, kept[0], out), old))
        self.set_count(block, count)
        if added_bias is not None:
            bias = parameters.get(f"{self.down}.bias")
            total = added_bias if bias is None else bias.data + added_bias
            set_parameter(block, f"{self.down}.bias", parameter(total, parameters[down]))
