"""Blocks are fitted again after the cut, on what the pruned blocks before them give.

The calibration windows go through the dense and the pruned blocks side by side. The target of a
pruned block is the output of its dense one, so that it also makes up for what the blocks before it
got wrong. No labels, and no gradient leaves the block.

Two ways, one after the other where both are asked for. ``sequential``: what the block's output
lacks is regressed on the input z of its down projection, in closed form,

    change of W_down = R^T z (z^T z + damping diag(z^T z))^-1,  R = dense - pruned output.

``blockwise``: some epochs of Adam on all weights of the FFN. Either is kept only where it lowers
the error of the block's output on windows that it was not fitted on.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from cfsp_kernels import gram

from ..calibration.collect import DensePass
from ..calibration.grams import held_out_windows, mirror_
from ..calibration.statistics import BlockStatistics
from ..errors import CfspError
from ..models.blockwise import record_block_calls
from ..models.layouts import Layout, hidden_states_of
from ..models.parts.ffn import FFN
from .block_cache import BlockCache
from .least_squares import solve_damped
from .recipe import Recipe

WARM_UP_STEPS = 20
BETAS = (0.9, 0.95)
SEEDS_PER_BLOCK = 1000  # more than anyone's epochs

Values = Mapping[str, torch.Tensor]
"""Values of parameters of a block, by name."""


@dataclass(frozen=True)
class BlockRefit:
    """What fitting a block again did, on the held-out windows."""

    block: int
    way: str
    """``sequential`` or ``blockwise``."""
    errors: tuple[float, ...]
    """Mean square error of the block's output, relative to what the dense block adds to its
    input: before, and after each epoch (after the closed form). () where nothing is held out."""
    kept: int
    """Which of them is that of the weights that were kept; 0: those from before."""


class Refitting:
    """The windows of a dense pass, of which the last are held out, on their way through the pruned
    blocks beside it.

    Memory: the hidden states of all windows, and once or twice more what the block at work
    computes of them before its FFN; of that block its FFN four times over in fp32 (weights,
    gradient and the two moments of Adam), or in closed form z^T z of one FFN; the embeddings.
    """

    def __init__(self, model: nn.Module, dense: DensePass, recipe: Recipe) -> None:
        self.layout, self.blocks, self.recipe = dense.layout, dense.blocks, recipe
        self.calls = record_block_calls(model, self.blocks, dense.windows, micro_batch=1)
        self.dense, self.pruned, self.targets = dense, self.calls.hidden, dense.calls.hidden
        self.refits: list[BlockRefit] = []
        count = len(dense.windows)
        fitted = count - held_out_windows(count)
        self.fitted, self.held_out = range(fitted), range(fitted, count)
        self._change = 0.0
        self._cache: BlockCache

    def run(self, number: int) -> BlockStatistics:
        """Take the dense windows through a block that is not cut yet: they are its targets."""
        held_out = self.targets[self.held_out.start :]
        before = held_out.double()
        found = self.dense.run(number)
        self._change = float((held_out.double() - before).square().sum())
        return found

    @torch.no_grad()
    def run_pruned(self, number: int) -> None:
        """Fit a block that has been cut, in place, then take the pruned windows through it."""
        parameters = self._parameters(number)
        self._cache = BlockCache(self.blocks[number], parameters, lambda: self._run(number, 0))
        if parameters:
            self._fit_(number, parameters)
        for index in range(len(self.pruned)):
            self.pruned[index : index + 1] = self._output(number, index)
        del self._cache

    def _fit_(self, number: int, parameters: Values) -> None:
        errors = [self._error(number, parameters)] if self.held_out else []
        if self.recipe.sequential:
            solved = self._solve_(number, parameters, errors)
            self.refits.append(solved)
            errors = list(solved.errors[solved.kept :][:1])
        if self.recipe.blockwise:
            self.refits.append(self._train_(number, parameters, errors))

    def _output(self, number: int, index: int, values: Values | None = None) -> torch.Tensor:
        """[1, S, D]: the pruned block's output for a window, with these parameters."""
        return self._cache.run(index, lambda: self._run(number, index, values))

    def _run(self, number: int, index: int, values: Values | None = None) -> torch.Tensor:
        block = self.blocks[number]
        args, kwargs = self.calls.arguments[number][index]
        states = self.pruned[index : index + 1]
        return hidden_states_of(functional_call(block, dict(values or {}), (states, *args), kwargs))

    def _lack(self, number: int, index: int, values: Values | None = None) -> torch.Tensor:
        """[1, S, D] fp32: what the pruned block's output lacks of the dense one's."""
        target = self.targets[index : index + 1]
        return target.float() - self._output(number, index, values).float()

    def _error(self, number: int, values: Values) -> float:
        """Over the held-out windows."""
        lacks = (self._lack(number, index, values) for index in self.held_out)
        total = sum(lack.square().sum(dtype=torch.float64) for lack in lacks)
        return float(total) / self._change if self._change else 0.0

    def _parameters(self, number: int) -> dict[str, nn.Parameter]:
        """Those of the FFNs of a block."""
        named = dict(self.blocks[number].named_parameters())
        ffns = self.layout.block_ffns(self.blocks[number])
        names = [name for ffn in ffns for name in (*ffn.channels, ffn.down_bias)]
        return {name: named[name] for name in names if name in named}

    def _solve_(self, number: int, parameters: Values, before: Sequence[float]) -> BlockRefit:
        """Change the down projections in closed form, each after the ones before it; ``before``:
        the error, where it is judged by any."""
        errors, old = list(before), {}
        for ffn in self.layout.block_ffns(self.blocks[number]):
            down, change = parameters[f"{ffn.down}.weight"], self._regressed(number, ffn)
            old[down] = down.data.clone()
            if change is not None:
                transposed = ffn.channels[f"{ffn.down}.weight"].dimension == 0
                down.data += (change.T if transposed else change).to(down.dtype)
        if before:
            errors.append(self._error(number, parameters))
        better = not before or errors[1] < errors[0]
        if not better:
            for down, values in old.items():
                down.data.copy_(values)
        return BlockRefit(number, "sequential", tuple(errors), int(better))

    def _regressed(self, number: int, ffn: FFN) -> torch.Tensor | None:
        """[D, width] fp32: what a down projection lacks; None where its input is all zero."""
        block, device = self.blocks[number], self.pruned.device
        width, down = ffn.units(block).count, ffn.projection(block, ffn.down)
        seen: list[torch.Tensor] = []
        hook = down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        product = torch.zeros(width, width, dtype=torch.float32, device=device)
        across = product.new_zeros(self.pruned.shape[-1], width)
        try:
            for index in self.fitted:
                lack = self._lack(number, index)[0]
                inner = seen.pop().reshape(-1, width)
                gram(inner, out=product)
                torch.addmm(across, lack.T, inner.float(), out=across)
        finally:
            hook.remove()
        solved = solve_damped(mirror_(product), across, self.recipe.damping)
        return solved[0] if solved is not None else None

    def _train_(self, number: int, parameters: Values, before: Sequence[float]) -> BlockRefit:
        """Adam on copies in fp32; ``before`` as for the closed form."""
        masters = {k: p.detach().float().clone().requires_grad_() for k, p in parameters.items()}
        errors, kept = list(before), 0
        for epoch in self._epochs(number, masters, parameters):
            if before:
                errors.append(self._error(number, _cast(masters, parameters)))
            if not before or errors[epoch] < errors[kept]:
                kept = epoch
                for name, master in masters.items():
                    parameters[name].data.copy_(master.data)
        return BlockRefit(number, "blockwise", tuple(errors), kept)

    def _epochs(self, number: int, masters: Values, parameters: Values) -> Iterator[int]:
        """Adam with a cosine schedule; hands over after each epoch, 1, 2, ..."""
        recipe, windows = self.recipe, len(self.fitted)
        groups = []
        for master in masters.values():
            root_mean_square = float(master.detach().square().mean().sqrt())
            groups.append({"params": [master], "rate": recipe.learning_rate * root_mean_square})
        adam = torch.optim.Adam(groups, betas=BETAS)
        frozen = {name: p.detach() for name, p in self.blocks[number].named_parameters()}
        step, steps = 0, recipe.epochs * windows
        for epoch in range(1, recipe.epochs + 1):
            seed = recipe.calibration.seed + SEEDS_PER_BLOCK * number + epoch
            order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))
            for index in order.tolist():
                cosine = 0.5 * (1 + math.cos(math.pi * (step / steps)))
                step += 1
                factor = min(1.0, step / WARM_UP_STEPS) * cosine
                for group in adam.param_groups:
                    group["lr"] = group["rate"] * factor
                with torch.enable_grad():
                    values = {**frozen, **_cast(masters, parameters)}
                    self._lack(number, index, values).square().mean().backward()
                adam.step()
                adam.zero_grad()
            yield epoch


def check_refits(model: nn.Module, layout: Layout, ranks: int) -> None:
    """Raise CfspError where blocks cannot be fitted again: by several ranks, or with experts."""
    ways = "sequential and blockwise fitting"
    if ranks > 1:
        raise CfspError(f"{ways} run in one process, not {ranks}")
    if any(ffn.units(block).experts > 1 for _, block, ffn in layout.parts_of(model)):
        raise CfspError(f"{ways} know no experts: use compensation 'least-squares' alone")


def _cast(masters: Values, parameters: Values) -> dict[str, torch.Tensor]:
    """As the block computes with them; gradients flow back to the masters."""
    return {name: master.to(parameters[name].dtype) for name, master in masters.items()}
