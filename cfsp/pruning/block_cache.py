"""What a block computes before its FFN, computed once for each window.

While an FFN is fitted, the norms and the attention before it give the same each time. Which of
their outputs the rest of the block reads differs between architectures (parallel residuals, norms
after the attention), so it is read off the autograd graph of one call, and then tried: the rest has
to give the same bits from the kept outputs, with NaN for all others. A block that does not pass is
run whole each time.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from ..models.layouts import hidden_states_of
from ..models.surgery import forward_instead

MOST_KEPT = 2
"""Outputs kept of a window, each as large as its hidden states."""

Run = Callable[[], torch.Tensor]
"""Calls a block on a window and gives its output, [1, S, D]."""


class BlockCache:
    """Runs a block over windows, the modules before its FFN once for each: in memory are at most
    :data:`MOST_KEPT` times the hidden states. Of the block only ``changing``, parameters of its
    FFNs, may change; ``run`` is of window 0."""

    def __init__(self, block: nn.Module, changing: Collection[str], run: Run) -> None:
        self.kept: tuple[nn.Module, ...] = ()
        """The modules whose outputs are kept; none where the block is run whole each time."""
        self._blanks: dict[nn.Module, Any] = {}  # outputs of the modules before the FFN, all NaN
        self._states: dict[int, tuple[torch.Tensor, ...]] = {}  # by window, of the kept modules
        expected, outputs, kept = _traced(block, changing, run)
        if 0 < len(kept) <= MOST_KEPT:
            self.kept = kept
            self._blanks = {module: _blank(output) for module, output in outputs.items()}
            states = tuple(hidden_states_of(outputs[module]).detach() for module in kept)
            self._states[0] = tuple(state.clone() for state in states)
            with torch.no_grad():
                same = torch.equal(self.run(0, run), expected)
            # a block may also change in place what it is given
            if not same or not all(map(torch.equal, self._states[0], states)):
                self.kept, self._states = (), {}

    def run(self, index: int, run: Run) -> torch.Tensor:
        """The output of ``run``, of window ``index``: the same bits as without this."""
        if index in self._states:
            outputs = dict(self._blanks)
            for module, states in zip(self.kept, self._states[index], strict=True):
                outputs[module] = _with_states(outputs[module], states)
            with forward_instead(list(outputs), list(map(_giving, outputs.values()))):
                return run()
        recorded: list[torch.Tensor] = []

        def record(module: nn.Module, args: Any, output: Any) -> None:
            recorded.append(hidden_states_of(output).detach().clone())

        hooks = [module.register_forward_hook(record) for module in self.kept]
        try:
            output = run()
        finally:
            for hook in hooks:
                hook.remove()
        if self.kept:
            self._states[index] = tuple(recorded)
        return output


def _traced(
    block: nn.Module, changing: Collection[str], run: Run
) -> tuple[torch.Tensor, dict[nn.Module, Any], tuple[nn.Module, ...]]:
    """What the block gives; the outputs of its modules before its FFN, in the order of their calls;
    and those of these modules whose outputs it reads itself: () where that is not certain.

    Followed are children with parameters that give floating point, as leaves of the block's graph.
    """
    children = [c for c in block.children() if any(True for _ in c.parameters())]
    ffns = {block.get_submodule(name.partition(".")[0]) for name in changing}
    calls: list[nn.Module] = []
    outputs: dict[nn.Module, Any] = {}

    def stand_in(module: nn.Module) -> Callable[..., Any]:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            states = hidden_states_of(output := own(*args, **kwargs))
            followed = isinstance(states, torch.Tensor) and states.is_floating_point()
            if not followed or not ffns.isdisjoint(calls):
                return output
            leaf = states.detach().clone().requires_grad_()
            outputs[module] = _with_states(output, leaf)
            return _with_states(output, leaf.clone())

        return forward

    with torch.enable_grad(), forward_instead(children, [stand_in(c) for c in children]):
        output = run()
    once = all(calls.count(module) == 1 for module in outputs)
    ids = _leaves(output) if once else set()
    read = tuple(m for m, found in outputs.items() if id(hidden_states_of(found)) in ids)
    return output, outputs, read


def _leaves(output: torch.Tensor) -> set[int]:
    """The ids of the leaves of a tensor's graph."""
    seen: set[Any] = {None}
    left: list[Any] = [output.grad_fn]
    while left:
        if (node := left.pop()) not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
    return {id(node.variable) for node in seen if hasattr(node, "variable")}


def _with_states(output: Any, states: torch.Tensor) -> Any:
    """A module's output with other hidden states."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


def _blank(output: Any) -> Any:
    """A module's output, all NaN; what comes with its hidden states takes no memory."""

    def blank(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        fill = torch.nan if value.is_floating_point() else 0
        return value.new_full((), fill).expand(value.shape)

    states = torch.full_like(hidden_states_of(output).detach(), torch.nan)
    return (states, *map(blank, output[1:])) if isinstance(output, tuple) else states


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output
