"""A model with other blocks in some places, perhaps with a cache that holds a context."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..errors import CfspError
from ..models.layouts import pass_on
from ..models.loading import cache_argument
from ..models.opening import OpenModel
from ..models.surgery import forward_instead

Call = Callable[..., Any]
"""Runs a model, on other tokens and with other options where some are given."""


def cache_maker(
    model: PreTrainedModel, batch: int, context: int
) -> Callable[[Call], Callable[[], DynamicCache]]:
    """Of a call -> what gives, before each, a cache of ``context`` random keys and values, of the
    shapes that the call leaves in one. Blocks that leave none have one value a token, so that all
    say the same length. It is the one that the call before has added to, without what that added,
    so that memory is reused as in generation.

    The inner functions raise CfspError for blocks that keep anything else than keys and values.
    """
    generator = torch.Generator(model.device).manual_seed(0)

    def random(like: torch.Tensor | None) -> torch.Tensor:
        heads, size = (1, 1) if like is None else (like.shape[1], like.shape[3])
        shape, device = (batch, heads, context, size), model.device
        return torch.randn(shape, generator=generator, device=device, dtype=model.dtype)

    def filled(number: int, own: Any) -> DynamicLayer:
        if not isinstance(own, DynamicLayer):
            raise CfspError(
                f"{model.config.model_type}: block {number} keeps other states than keys and "
                "values: no latency with a context"
            )
        states = (own.keys, own.values) if own.is_initialized else (None, None)
        layer: DynamicLayer = DynamicCache(config=model.config).layers[number]
        layer.update(*map(random, states))
        return layer

    def of(call: Call) -> Callable[[], DynamicCache]:
        asked = DynamicCache(config=model.config)
        word = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        call(word, **{cache_argument(model): asked}, use_cache=True)
        asked.layers = [filled(number, layer) for number, layer in enumerate(asked.layers)]
        before = {n: copy.copy(layer) for n, layer in enumerate(asked.layers) if layer.is_sliding}

        def fresh() -> DynamicCache:
            for number, layer in enumerate(asked.layers):
                if number in before:
                    asked.layers[number] = copy.copy(before[number])
                else:
                    layer.keys = layer.keys[:, :, :context]
                    layer.values = layer.values[:, :, :context]
            return asked

        return fresh

    return of


def _at(place: int, block: nn.Module) -> Callable[..., Any]:
    """A run of a block in a place, which is where it finds its keys in a cache."""
    told = [module for module in block.modules() if isinstance(vars(module).get("layer_idx"), int)]

    def run(*args: Any, **kwargs: Any) -> Any:
        for module in told:
            module.layer_idx = place  # type: ignore[assignment]
        return block(*args, **kwargs)

    return run


def forward_call(
    opened: OpenModel,
    placed: Mapping[int, nn.Module],
    tokens: torch.Tensor,
    cached: Callable[[Callable[..., Any]], Callable[[], Any]] | None,
) -> Callable[[], Any]:
    """A forward call with other blocks in some places, those in all others doing nothing; after a
    context where there is a maker of caches."""
    blocks = opened.layout.find_blocks(opened.model)
    forwards = [
        _at(place, placed[place]) if place in placed else partial(pass_on, own)
        for place, own in enumerate(blocks)
    ]

    def call(words: torch.Tensor = tokens, **options: Any) -> Any:
        with forward_instead(blocks, forwards):
            return opened.model(input_ids=words, **{"use_cache": False, **options})

    if cached is None:
        return call
    fresh, name = cached(call), cache_argument(opened.model)
    return lambda: call(**{name: fresh()}, use_cache=True)
