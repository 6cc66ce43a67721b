"""Run a decoder one block at a time over many windows; hidden states stay, in place.

The model's own forward makes everything a block is called with (masks, position embeddings,
and whatever else the architecture passes): each block is replaced for one dry run by a stand-in
that records its arguments and hands its input on.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import CfspError
from .layouts import as_block_output, hidden_states_of
from .loading import model_device, outer_weights, synchronize
from .surgery import forward_instead, headless


@dataclass(frozen=True)
class BlockCalls:
    """What every block is called with, and the hidden states on their way through."""

    hidden: torch.Tensor
    """[N, S, D] in the model's dtype; :func:`run_block` updates it in place."""
    micro_batch: int
    """Windows per call."""
    arguments: tuple[tuple[tuple[tuple[Any, ...], dict[str, Any]], ...], ...]
    """[block][micro-batch]: positional and keyword arguments after the hidden states."""

    def micro_batches(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(number, view of the hidden states [b, S, D]) of every micro-batch."""
        return enumerate(self.hidden.split(self.micro_batch) if len(self.hidden) else ())


def default_micro_batch(device: torch.device, seqlen: int, cpu_tokens: int = 1) -> int:
    """Windows per call, one at least: about 8192 tokens fill a GPU, ``cpu_tokens`` go to a CPU, by
    default one window, which keeps it in its cache."""
    return max(1, (8192 if device.type != "cpu" else cpu_tokens) // seqlen)


def _shared(new: Any, old: Any) -> Any:
    """``old`` where ``new`` equals it, so that equal masks and embeddings are kept once."""
    if isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor):
        same = new.shape == old.shape and new.dtype == old.dtype and torch.equal(new, old)
        return old if same else new
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        return tuple(_shared(a, b) for a, b in zip(new, old, strict=True))
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: _shared(value, old.get(key)) for key, value in new.items()}
    return new


@torch.no_grad()
def record_block_calls(
    model: nn.Module, blocks: Sequence[nn.Module], windows: torch.Tensor, micro_batch: int
) -> BlockCalls:
    """Embed windows [N, S] int64, perhaps none, and record what each block of a causal LM is called
    with; blocks take the hidden states first."""
    device = model_device(model)
    recorded: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in blocks]
    embedded: list[torch.Tensor] = []

    def stand_in(number: int) -> Callable[..., Any]:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if number == 0:
                embedded.append(hidden_states)
            elif hidden_states.shape != embedded[-1].shape:
                raise CfspError(
                    f"{type(blocks[number]).__name__} is not given the hidden states as the block "
                    "before returned them: blocks of this architecture cannot be run one by one"
                )
            first = recorded[number][0] if recorded[number] else None
            recorded[number].append(_shared((args, kwargs), first))
            return as_block_output(blocks[number], hidden_states)

        return forward

    hidden = torch.empty(0, device=device)
    stand_ins = [stand_in(number) for number in range(len(blocks))]
    with outer_weights(model), headless(model), forward_instead(blocks, stand_ins):
        for number, tokens in enumerate(windows.split(micro_batch) if len(windows) else ()):
            model.base_model(input_ids=tokens.to(device), use_cache=False)  # type: ignore[operator]
            states = embedded.pop()
            if number == 0:
                hidden = states.new_empty(len(windows), *states.shape[1:])
            start = number * micro_batch
            hidden[start : start + len(states)] = states
    return BlockCalls(hidden, micro_batch, tuple(tuple(calls) for calls in recorded))


@torch.no_grad()
def run_block(
    block: nn.Module,
    number: int,
    calls: BlockCalls,
    observe: Callable[[int, torch.Tensor, torch.Tensor], None],
) -> None:
    """Run one block once over every micro-batch and leave its outputs in ``calls.hidden``, whose
    input ``observe(micro-batch number, input, output)`` still sees."""
    for index, states in calls.micro_batches():
        args, kwargs = calls.arguments[number][index]
        output = hidden_states_of(block(states, *args, **kwargs)).contiguous()
        observe(index, states, output)
        states.copy_(output)


class RidingWindows:
    """Windows that go through the blocks as these come into memory, one per call: to the same
    logits as when the model is run on each alone."""

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], windows: torch.Tensor
    ) -> None:
        self.model, self.blocks, self.windows = model, blocks, windows
        self.seconds = 0.0
        """Time spent on these windows, without the loading of blocks."""
        started = time.perf_counter()
        self.calls = record_block_calls(model, blocks, windows, micro_batch=1)
        self._count(started)

    def _count(self, started: float) -> None:
        synchronize(self.calls.hidden.device)
        self.seconds += time.perf_counter() - started

    def ride(self, number: int) -> None:
        """Go through one block, whose weights are in memory."""
        started = time.perf_counter()
        run_block(self.blocks[number], number, self.calls, lambda *_: None)
        self._count(started)

    def logits(self) -> Iterator[torch.Tensor]:
        """[1, S, V] of every window, after its last block; nothing here holds them any longer when
        the next are asked for."""
        with outer_weights(self.model):
            for index, states in self.calls.micro_batches():
                started = time.perf_counter()
                tokens = self.windows[index : index + 1].to(states.device)
                ends = [as_block_output(block, states) for block in self.blocks]
                instead = [lambda *_, end=end, **__: end for end in ends]
                # As a decorator of a generator it would hold what was given last.
                with torch.no_grad(), forward_instead(self.blocks, instead):
                    logits = self.model(input_ids=tokens, use_cache=False).logits
                self._count(started)
                yield logits
                del logits
