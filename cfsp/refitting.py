"""Blocks are fitted again after the cut, on what the pruned blocks before them give.

The calibration windows go through the dense blocks and through the pruned ones side by side, one
block at a time. The target of a pruned block is the output of its dense one, so that it also makes
up for what the blocks before it got wrong. No labels, and no gradient leaves the block.

Two ways, one after the other where both are asked for. ``sequential``: what the block's output
lacks is regressed on the input z of its down projection,

    change of W_down = R^T z (z^T z + damping mean(diag z^T z) I)^-1,  R = dense - pruned output,

in closed form. ``blockwise``: some epochs of Adam on all weights of the FFN. Either is kept only
where it lowers the error of the block's output on windows that it was not fitted on.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from .layouts import Layout, hidden_states_of
from .stream import record_block_calls, run_block

WARM_UP_STEPS = 20
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class RefitSettings:
    """How blocks are fitted again."""

    epochs: int
    """Passes of Adam over the fitting windows, one step for each window."""
    learning_rate: float
    """Step relative to the root mean square of each weight matrix."""
    seed: int
    """Of the order of the windows in each epoch."""
    held_out: int
    """The last windows, which are not fitted on and decide when to stop."""


@dataclass(frozen=True)
class BlockFit:
    """What fitting a block again did, on the held-out windows."""

    block: int
    errors: tuple[float, ...]
    """Mean square error of the block's output, relative to what the dense block adds to its
    input: before, and after each epoch."""
    epoch: int
    """The one that was kept; 0: the block as it was cut."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class Refitting:
    """Windows on their way through the dense and the pruned blocks.

    Memory: the hidden states of all windows twice; for the block at work its FFN four times over
    in fp32 (weights, gradient and the two moments of Adam) and the best weights so far.

    Args:
        model: the causal LM, with its embeddings in memory.
        layout: where its blocks and FFNs are.
        windows: [N, S] int64 calibration tokens.
        settings: how to fit.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, windows: torch.Tensor, settings: RefitSettings
    ) -> None:
        self.layout = layout
        self.blocks = layout.find_blocks(model)
        self.settings = settings
        self.dense = record_block_calls(model, self.blocks, windows, micro_batch=1)
        self.pruned = self.dense.hidden.clone()
        self.fits: list[BlockFit] = []
        self._change = 0.0

    @property
    def _fitted(self) -> range:
        return range(len(self.pruned) - self.settings.held_out)

    @property
    def _held_out(self) -> range:
        return range(len(self._fitted), len(self.pruned))

    def run_dense(self, number: int) -> None:
        """Take the dense windows through a block that is not cut yet: they are its targets."""
        change = self.pruned.new_zeros((), dtype=torch.float64)

        def observe(index: int, before: torch.Tensor, after: torch.Tensor) -> None:
            if index in self._held_out:
                change.add_((after.double() - before.double()).square().sum())

        run_block(self.blocks[number], number, self.dense, observe)
        self._change = float(change)

    def _output(
        self, number: int, index: int, values: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """[1, S, D]: the pruned block's output for a window, with these parameters."""
        block = self.blocks[number]
        args, kwargs = self.dense.arguments[number][index]
        states = self.pruned[index : index + 1]
        return hidden_states_of(functional_call(block, dict(values or {}), (states, *args), kwargs))

    def _square_error(self, number: int, index: int, values: Any = None) -> torch.Tensor:
        target = self.dense.hidden[index : index + 1]
        return (self._output(number, index, values).float() - target.float()).square()

    @torch.no_grad()
    def _held_out_error(self, number: int, values: Mapping[str, torch.Tensor]) -> float:
        total = sum(
            float(self._square_error(number, index, values).sum(dtype=torch.float64))
            for index in self._held_out
        )
        return total / self._change if self._change else 0.0

    def run_pruned_(self, number: int) -> None:
        """Fit a block that has been cut, then take the pruned windows through it."""
        if self.settings.epochs:
            self.fits.append(self._fit_(number))
        with torch.no_grad():
            for index in range(len(self.pruned)):
                self.pruned[index : index + 1] = self._output(number, index)

    def _fit_(self, number: int) -> BlockFit:
        block = self.blocks[number]
        parameters = dict(block.named_parameters())
        names = [
            name
            for ffn in self.layout.block_ffns(block)
            for name in (*ffn.channels, ffn.down_bias)
            if name in parameters
        ]
        masters = {name: _master(parameters[name]) for name in names}
        best, errors = 0, [self._held_out_error(number, _cast(masters, parameters))]
        for epoch, _ in enumerate(self._epochs(number, masters, parameters), start=1):
            errors.append(self._held_out_error(number, _cast(masters, parameters)))
            if errors[-1] < errors[best]:
                best = epoch
                for name, master in masters.items():
                    parameters[name].data.copy_(master.data)
        return BlockFit(number, tuple(errors), best)

    def _epochs(
        self,
        number: int,
        masters: Mapping[str, torch.Tensor],
        parameters: Mapping[str, torch.Tensor],
    ) -> Iterator[None]:
        """Adam with a cosine schedule; stops after each epoch."""
        settings, windows = self.settings, len(self._fitted)
        groups = [
            {"params": [master], "rate": settings.learning_rate * _root_mean_square(master)}
            for master in masters.values()
        ]
        adam = torch.optim.Adam(groups, betas=BETAS)
        steps = settings.epochs * windows
        step = 0
        for epoch in range(settings.epochs):
            seed = settings.seed + 1000 * number + epoch
            order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))
            for index in order.tolist():
                step += 1
                factor = min(1.0, step / WARM_UP_STEPS) * _cosine(step / steps)
                for group in adam.param_groups:
                    group["lr"] = group["rate"] * factor
                with torch.enable_grad():
                    values = _cast(masters, parameters)
                    self._square_error(number, index, values).mean().backward()
                adam.step()
                adam.zero_grad()
            yield


def _master(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().float().clone().requires_grad_()


def _cast(
    masters: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """As the block computes with them; gradients flow back to the masters."""
    return {name: master.to(parameters[name].dtype) for name, master in masters.items()}


def _root_mean_square(tensor: torch.Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt())


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))
