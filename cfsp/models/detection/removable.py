"""Whether parts of blocks can be taken out whole: tried without a value of the model.

In a copy of a block all of whose projections give zero, nothing is added to the hidden states. The
block has to hand them on as they are, and has to do so with the part taken out too.
"""

import copy
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...errors import CfspError, reason
from ..layouts import Layout, hidden_states_of
from ..loading import make_skeleton, quiet_loading
from ..modeling_cfsp import set_parameter
from ..parts.experts import ExpertsFFN
from ..parts.part import Part
from ..surgery import forward_instead, on_meta, set_buffers_
from .trial import block_calls, check_reloads_

UNITS = {"attention": "attention", "mlp": "ffn"}
"""What ``skip`` of a config calls a part -> what `units` of a recipe calls it whole."""


def check_removable(model: PreTrainedModel, layout: Layout, kinds: Collection[str]) -> None:
    """Raise CfspError where the attentions or FFNs of a model, those of ``kinds`` ("attention",
    "ffn"), cannot be taken out of blocks whole. Reads no values."""
    family, tried = model.config.model_type, list[tuple[int, Part]]()
    seen = set[Any]()
    for number, block, part in layout.parts_of(model):
        kind = UNITS[part.skipped_as]
        if kind not in kinds:
            continue
        if isinstance(part, ExpertsFFN):
            raise _refused(kind, family, "blocks have experts")
        if not part.path:
            raise _refused(kind, family, "it is no module of its own")
        modules = tuple((name, type(module)) for name, module in block.named_modules())
        if (part, modules) not in seen:
            seen.add((part, modules))
            tried.append((number, part))
    paths: dict[str, str] = {}
    for _, part in tried:
        if paths.setdefault(part.skipped_as, part.path) != part.path:
            raise _refused(UNITS[part.skipped_as], family, "blocks have it in different places")
    for number, part in tried:
        try:
            with quiet_loading(), torch.no_grad():
                _try(
                    make_skeleton(copy.deepcopy(model.config), torch.float32), layout, number, part
                )
        except Exception as error:  # of whatever kind a family's own code raises
            raise _refused(UNITS[part.skipped_as], family, reason(error)) from error


def _refused(kind: str, family: str, why: str) -> CfspError:
    return CfspError(f"{kind} whole: {family!r}: {why}; leave {kind!r} out of `units`")


def _try(skeleton: PreTrainedModel, layout: Layout, number: int, part: Part) -> None:
    """Raise ValueError where a block without a part does anything else than add nothing for it, or
    the model cannot be reloaded."""
    hidden, args, kwargs = block_calls(skeleton, layout)[number]
    states = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    block = _silent(layout.find_blocks(skeleton)[number], part)
    for what in ("parts that give nothing", "no such part"):
        with _nothing_given(block, layout, part):
            found = hidden_states_of(block(states, *copy.deepcopy(args), **copy.deepcopy(kwargs)))
        if not torch.allclose(found, states, rtol=1e-5, atol=1e-5):
            raise ValueError(f"a block with {what} changes its hidden states")
        part.remove_(block)
    model = on_meta(skeleton)
    part.remove_(layout.find_blocks(model)[number])
    check_reloads_(model, layout)


def _silent(block: nn.Module, part: Part) -> nn.Module:
    """A copy of a block with random values for all that is no projection."""
    silent, generator = on_meta(block).eval(), torch.Generator().manual_seed(1)
    projections = {id(p) for m in _projections(silent, part) for p in m.parameters()}
    for name, old in list(silent.named_parameters()):
        if id(old) not in projections:
            value = torch.randn(old.shape, generator=generator)
            set_parameter(silent, name, nn.Parameter(value, requires_grad=False))
    set_buffers_(silent, dict(block.named_buffers()))
    return silent


def _projections(block: nn.Module, part: Part) -> list[nn.Module]:
    """Routers are of classes of their own: what these give is no hidden state."""
    kinds = ("Linear", "Conv1D", part.projection_class)
    return [
        module
        for module in block.modules()
        if isinstance(module, nn.Linear | Conv1D) and type(module).__name__ in kinds
    ]


def _nothing_given(block: nn.Module, layout: Layout, part: Part) -> AbstractContextManager[None]:
    """While it lasts, projections and experts give zero."""

    def zeros(module: nn.Module) -> Callable[..., torch.Tensor]:
        size = getattr(module, "nf", None) or getattr(module, "out_features", None)
        return lambda x, *_, **__: x.new_zeros(*x.shape[:-1], size or x.shape[-1])

    experts = [ffn.module(block) for ffn in layout.block_ffns(block) if isinstance(ffn, ExpertsFFN)]
    silent = [*_projections(block, part), *experts]
    return forward_instead(silent, [zeros(module) for module in silent])
