"""What a block computes before its FFN, computed once for each window.

While an FFN is fitted, the same windows go through its block again and again, and the norms and
the attention before the FFN give the same each time. Which of their outputs the rest of the block
reads differs between architectures (parallel residuals, norms after the attention, residuals added
in it), so it is read off the autograd graph of one call, and then tried: the rest of the block has
to give the same bits from the kept outputs, with NaN for all that is not kept. A block that does
not pass is run whole each time.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
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
    """Runs a block over windows, the modules before its FFN once for each.

    Memory: at most :data:`MOST_KEPT` times the hidden states of the windows that it ran over.

    Args:
        block: a decoder block. Nothing but ``changing`` may change while this is used.
        changing: names of parameters in the block: those of its FFNs.
        run: of window 0. It runs twice here, the second time without what is kept.
    """

    def __init__(self, block: nn.Module, changing: Collection[str], run: Run) -> None:
        self.kept: tuple[nn.Module, ...] = ()
        """The modules whose outputs are kept; none where the block is run whole each time."""
        self._blanks: dict[nn.Module, Any] = {}
        """Of each module before the FFN: its output, all NaN."""
        self._states: dict[int, tuple[torch.Tensor, ...]] = {}
        """Of each window: the outputs of the modules that are kept."""
        trace = _Trace(block, changing)
        expected = trace.output(run)
        kept = trace.read(expected)
        if 0 < len(kept) <= MOST_KEPT:
            self.kept = kept
            self._blanks = {module: _blank(output) for module, output in trace.outputs.items()}
            states = tuple(hidden_states_of(trace.outputs[module]).detach() for module in kept)
            self._states[0] = tuple(state.clone() for state in states)
            with torch.no_grad():
                same = torch.equal(self.run(0, run), expected)
            # a block may also change in place what it is given
            if not same or not all(map(torch.equal, self._states[0], states)):
                self.kept, self._states = (), {}

    def run(self, index: int, run: Run) -> torch.Tensor:
        """The output of ``run``, of window ``index``: the same bits as without this."""
        if index in self._states:
            states = dict(zip(self.kept, self._states[index], strict=True))
            instead = [
                _giving(_with_states(blank, states[module]) if module in states else blank)
                for module, blank in self._blanks.items()
            ]
            with forward_instead(list(self._blanks), instead):
                return run()
        recorded: list[torch.Tensor] = []
        hooks = [
            module.register_forward_hook(
                lambda _, args, output: recorded.append(hidden_states_of(output).detach().clone())
            )
            for module in self.kept
        ]
        try:
            output = run()
        finally:
            for hook in hooks:
                hook.remove()
        if self.kept:
            self._states[index] = tuple(recorded)
        return output


@dataclass
class _Trace:
    """A call of a block, with the outputs of modules before its FFN as leaves of the graph.

    Followed are the children of the block that have parameters and give a tensor of floating point.
    """

    block: nn.Module
    changing: Collection[str]
    outputs: dict[nn.Module, Any] = field(default_factory=dict)
    """Of modules before the FFN, in the order of their calls; their tensors are the leaves."""
    _calls: list[nn.Module] = field(default_factory=list)

    def output(self, run: Run) -> torch.Tensor:
        """What the block gives."""
        children = [c for c in self.block.children() if any(True for _ in c.parameters())]
        ffns = {self.block.get_submodule(name.partition(".")[0]) for name in self.changing}
        stand_ins = [self._stand_in(child, ffns) for child in children]
        with torch.enable_grad(), forward_instead(children, stand_ins):
            return run()

    def _stand_in(self, module: nn.Module, ffns: set[nn.Module]) -> Callable[..., Any]:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._calls.append(module)
            output = own(*args, **kwargs)
            states = hidden_states_of(output)
            if not ffns.isdisjoint(self._calls) or not _is_states(states):
                return output
            leaf = states.detach().clone().requires_grad_()
            self.outputs[module] = _with_states(output, leaf)
            return _with_states(output, leaf.clone())

        return forward

    def read(self, output: torch.Tensor) -> tuple[nn.Module, ...]:
        """The modules before the FFN whose outputs the block's is made from; not those whose
        outputs only go through others of them. () where that is not certain."""
        if any(self._calls.count(module) > 1 for module in self.outputs):
            return ()
        ids = _leaves(output)
        return tuple(m for m, found in self.outputs.items() if id(hidden_states_of(found)) in ids)


def _is_states(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _leaves(output: torch.Tensor) -> set[int]:
    """The ids of the leaves of a tensor's graph."""
    leaves: set[int] = set()
    seen = set()
    left = [output.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(id(leaf))
        left += [following for following, _ in node.next_functions]
    return leaves


def _with_states(output: Any, states: torch.Tensor) -> Any:
    """A module's output with other hidden states."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


def _blank(output: Any) -> Any:
    """A module's output, all NaN; what comes with its hidden states takes no memory."""
    states = torch.full_like(hidden_states_of(output).detach(), torch.nan)
    if not isinstance(output, tuple):
        return states
    return (states, *(_small(x) if isinstance(x, torch.Tensor) else x for x in output[1:]))


def _small(tensor: torch.Tensor) -> torch.Tensor:
    value = torch.nan if tensor.is_floating_point() else 0
    return tensor.new_full((), value).expand(tensor.shape)


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output
