"""Whether a detected architecture can be pruned: tried on meta, without a value of the model.

An architecture that is written down in :mod:`models.layouts` is tested; one that only shows its
layout may still hand its blocks something else than hidden states, or build no class of uneven
widths. Both would otherwise be found after the work.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from ...errors import CfspError, reason
from ..layouts import Layout, as_block_output, hidden_states_of, known_layout, unsupported
from ..loading import make_skeleton, model_device, quiet_loading
from ..modeling_cfsp import set_parameter
from ..parts.experts import ExpertsFFN
from ..pruned_classes import become_pruned_
from ..surgery import forward_instead, headless, on_meta, set_buffers_, set_parameters_
from ..tensors import parameter_shapes
from .ffns import layout_of

TOKENS, PROBE_TOKENS = 2, 16


def checked_layout(model: PreTrainedModel) -> Layout:
    """The layout of a model, live or a skeleton. Raises CfspError where it has none, or where that
    was detected and its blocks cannot be run one by one, or have no widths of their own."""
    layout = layout_of(model)
    if not len(layout.find_blocks(model)):
        raise unsupported(model.config.model_type, "its config says that it has no blocks")
    if not any(map(layout.block_ffns, layout.find_blocks(model))):
        raise unsupported(
            model.config.model_type, "none of its blocks has an FFN of two or three Linear"
        )
    if known_layout(model.config.model_type) is None:
        _check_family(make_skeleton(model.config, model.dtype), layout)
    return layout


def check_as_configured(model: PreTrainedModel) -> None:
    """Raise CfspError for a live model that is not what its config says: whose class, made anew and
    given its weights and buffers, has other parameters or says something else to a few tokens."""
    with quiet_loading(), torch.no_grad():
        fresh = make_skeleton(copy.deepcopy(model.config), model.dtype)
        problem = "its config describes other parameters"
        if parameter_shapes(fresh) == parameter_shapes(model):
            set_parameters_(fresh, dict(model.named_parameters(remove_duplicate=False)))
            set_buffers_(fresh, dict(model.named_buffers(remove_duplicate=False)))
            problem = "a new model of its config and weights says something else"
            ids = torch.arange(PROBE_TOKENS, device=model_device(model))[None]
            ids %= model.get_input_embeddings().weight.shape[0]
            training = model.training
            model.eval()
            own, anew = (m(input_ids=ids, use_cache=False).logits for m in (model, fresh))
            model.train(training)
            if torch.allclose(own, anew, rtol=0, atol=0, equal_nan=True):
                return
    raise CfspError(f"the live {type(model).__name__} cannot be saved and reloaded: {problem}")


def _check_family(skeleton: PreTrainedModel, layout: Layout) -> None:
    tries: tuple[tuple[Callable[..., None], str], ...] = (
        (_run_blocks, "its blocks cannot be run one by one"),
        (rebuild, "its classes cannot have a width for every block"),
    )
    for attempt, failure in tries:
        try:
            with quiet_loading(), torch.no_grad():
                attempt(skeleton, layout)
        except Exception as error:  # of whatever kind a family's own code raises
            why = f"{failure} ({reason(error)})"
            raise unsupported(skeleton.config.model_type, why) from error


def _run_blocks(skeleton: PreTrainedModel, layout: Layout) -> None:
    """Record what the blocks are called with, as a calibration does, and run each on it."""
    blocks = layout.find_blocks(skeleton)
    given, others = (block_calls(skeleton, layout, added) for added in (0, 1))
    for block, call, (_, *other) in zip(blocks, given, others, strict=True):
        if not _equal(call[1:], tuple(other)):
            raise ValueError("they are given more of each other than the hidden states")
        hidden, args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), call)
        output = hidden_states_of(_without_routing(on_meta(block), layout)(hidden, *args, **kwargs))
        _check_shape(output, hidden, "giving")


def block_calls(
    skeleton: PreTrainedModel, layout: Layout, added: int = 0
) -> list[tuple[torch.Tensor, Any, Any]]:
    """What each block of a skeleton is called with, where all of them only add a number to the
    hidden states; its parameters outside of blocks become zeros."""
    blocks = layout.find_blocks(skeleton)
    outer = {name: p for name, p in skeleton.named_parameters() if layout.place_of(name) is None}
    zeros = {name: torch.zeros((), dtype=p.dtype).expand(p.shape) for name, p in outer.items()}
    set_parameters_(skeleton, zeros)  # of no size in memory
    given: list[tuple[torch.Tensor, Any, Any]] = []

    def stand_in(number: int, block: nn.Module) -> Callable[..., Any]:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if number != len(given):
                raise ValueError(f"block {number} is run after {len(given)} others")
            _check_shape(hidden_states, given[0][0] if given else hidden_states, "given")
            given.append((hidden_states, args, kwargs))
            return as_block_output(block, hidden_states + added)

        return forward

    stand_ins = [stand_in(*numbered) for numbered in enumerate(blocks)]
    with headless(skeleton), forward_instead(blocks, stand_ins):
        skeleton.base_model(input_ids=torch.zeros(1, TOKENS, dtype=torch.int64), use_cache=False)
    return given


def _equal(a: Any, b: Any) -> bool:
    """Whether two calls have the same arguments, as far as these are tensors."""
    values, others = (
        [x for x in tree_leaves(call) if isinstance(x, torch.Tensor)] for call in (a, b)
    )
    return len(values) == len(others) and all(map(torch.equal, values, others))


def _without_routing(block: nn.Module, layout: Layout) -> nn.Module:
    """The block, on meta, whose experts give something without looking at the numbers of theirs."""
    for ffn in layout.block_ffns(block):
        if isinstance(ffn, ExpertsFFN):
            ffn.module(block).forward = lambda states, *args, **kwargs: torch.empty_like(states)
    return block


def _check_shape(states: torch.Tensor, others: torch.Tensor, how: str) -> None:
    if states.shape != others.shape or states.shape[:-1] != (1, TOKENS):
        raise ValueError(f"{how} {list(states.shape)} for {TOKENS} tokens")


def rebuild(skeleton: PreTrainedModel, layout: Layout) -> None:
    """Cut a copy to uneven widths and build the class that would reload it. Raises ValueError where
    that has other shapes."""
    model = on_meta(skeleton)
    for number, block in enumerate(layout.find_blocks(model)):
        parameters = dict(block.named_parameters())
        for ffn in layout.block_parts(block):
            width = max(1, ffn.units(block).count // (2 + number % 2))
            for name, axis in ffn.channels.items():
                if name in parameters:
                    shape = list(parameters[name].shape)
                    shape[axis.dimension] = axis.size(width)
                    set_parameter(block, name, nn.Parameter(parameters[name].new_empty(shape)))
            ffn.set_count(block, width)
    check_reloads_(model, layout)


def check_reloads_(model: PreTrainedModel, layout: Layout) -> None:
    """Give a model on meta, whose blocks were cut, the class that reloads it. Raises ValueError
    where that builds other shapes."""
    become_pruned_(model, layout, {})
    if parameter_shapes(make_skeleton(model.config, model.dtype)) != parameter_shapes(model):
        raise ValueError("a reloaded model has other shapes")
