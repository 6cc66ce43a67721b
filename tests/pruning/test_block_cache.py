"""What is before a block's FFN runs once, and the block gives the same bits, in every family."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from cfsp.calibration.collect import DensePass
from cfsp.models.blockwise import record_block_calls
from cfsp.models.layouts import LAYOUTS, hidden_states_of
from cfsp.pruning import block_cache
from cfsp.pruning.block_cache import MOST_KEPT, BlockCache
from cfsp.pruning.recipe import Recipe
from cfsp.pruning.refit import Refitting

from ..models.test_families import ALL, make

DENSE = [name for name in ALL if name not in ("mixtral", "qwen3_moe", "deepseek_v3")]
BLOCK = 1


def runs_of(name: str) -> tuple[nn.Module, list[str], list[Callable[[], torch.Tensor]]]:
    """A block, the parameters of its FFN, and what calls it on each of two windows."""
    model, layout = make(name).to(torch.bfloat16), LAYOUTS[name]
    blocks = layout.find_blocks(model)
    calls = record_block_calls(model, blocks, torch.randint(0, 256, (2, 24)), 1)
    block = blocks[BLOCK]

    def run(index: int) -> torch.Tensor:
        args, kwargs = calls.arguments[BLOCK][index]
        return hidden_states_of(block(calls.hidden[index : index + 1], *args, **kwargs))

    names = [name for ffn in layout.block_parts(block) for name in ffn.channels]
    return block, names, [partial(run, index) for index in range(2)]


@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_in_every_family_the_bits_are_those_of_the_whole_block(name: str) -> None:
    block, names, runs = runs_of(name)
    whole = [run() for run in runs]
    cache = BlockCache(block, names, runs[0])
    attention = next(m for n, m in block.named_modules() if n.endswith(("attn", "attention")))
    inner = next(m for m in attention.modules() if m is not attention and not list(m.children()))
    times = []
    inner.register_forward_hook(lambda *_: times.append(1))
    assert 1 <= len(cache.kept) <= MOST_KEPT
    for index in (0, 1, 1, 0):
        assert torch.equal(cache.run(index, runs[index]), whole[index])
    assert len(times) == 1  # that of window 1
    for parameter in dict(block.named_parameters()).keys() & set(names):
        block.get_parameter(parameter).mul_(1.5)
    changed = [run() for run in runs]
    assert not torch.equal(changed[0], whole[0])
    for index in (0, 1):
        assert torch.equal(cache.run(index, runs[index]), changed[index])


class Toy(nn.Module):
    """x -> x + attention(norm(x)) + mlp(attention(norm(x))), or a variant of it."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = (nn.Linear(8, 8) for _ in range(3))
        self.variant = variant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of x [1, S, 8]."""
        if self.variant == "nothing before the FFN":
            return x + self.attention(self.norm(self.mlp(x)))
        normed = self.norm(x)
        a = self.attention(normed)
        if self.variant == "called twice":
            a = a + self.attention(a)
        if self.variant == "changed in place":
            a.mul_(2)
        if self.variant == "not in the graph":
            x = x + normed.detach()
        if self.variant == "two read and kept":
            x = x + normed
        return x + a + self.mlp(a)


@pytest.mark.parametrize(
    ("variant", "kept"),
    [
        ("plain", ["attention"]),
        ("two read and kept", ["norm", "attention"]),
        ("nothing before the FFN", []),
        ("called twice", []),
        ("changed in place", []),
        ("not in the graph", []),
    ],
)
@torch.no_grad()
def test_a_block_that_cannot_be_split_is_run_whole(variant: str, kept: list[str]) -> None:
    torch.manual_seed(0)
    block, windows = Toy(variant), torch.randn(2, 5, 8)
    runs = [partial(block, window[None]) for window in windows]
    whole = [run() for run in runs]
    cache = BlockCache(block, ["mlp.weight", "mlp.bias"], runs[0])
    assert [n for n, child in block.named_children() if child in cache.kept] == kept
    for index in (0, 1, 0, 1):
        assert torch.equal(cache.run(index, runs[index]), whole[index])


def test_more_than_may_be_kept_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_cache, "MOST_KEPT", 1)
    block, window = Toy("two read and kept"), torch.randn(1, 5, 8)
    assert not BlockCache(block, ["mlp.weight"], lambda: block(window)).kept


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", torch.float32), ("gemma2", torch.bfloat16), ("gpt2", torch.float32)],
)
def test_fitting_gives_the_bits_that_whole_blocks_give(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    windows = torch.randint(0, 256, (12, 24), generator=torch.Generator().manual_seed(1))
    for most in (MOST_KEPT, 0):
        monkeypatch.setattr(block_cache, "MOST_KEPT", most)
        model, layout = make(name).to(dtype), LAYOUTS[name]
        recipe = Recipe(
            compensation="blockwise", sequential=True, damping=0.1, epochs=2, learning_rate=0.01
        )
        refits = Refitting(model, DensePass(model, layout, windows), recipe)
        for number in range(2):
            refits.run(number)
            with torch.no_grad():
                for ffn in layout.block_parts(refits.blocks[number]):
                    down = refits.blocks[number].get_parameter(f"{ffn.down}.weight")
                    down[::2] *= 0.5  # as if something had been cut
            refits.run_pruned(number)
        found.append((refits.refits, refits.pruned, dict(model.named_parameters())))
    (fits, states, parameters), (expected, whole_states, whole_parameters) = found
    assert fits == expected
    assert any(fit.kept for fit in fits)
    assert torch.equal(states, whole_states)
    assert all(torch.equal(parameters[name], whole_parameters[name]) for name in parameters)
