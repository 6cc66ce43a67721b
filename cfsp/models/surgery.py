"""Changes to a module in place: its parameters, and for a while its ``forward``."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


@contextmanager
def forward_instead(modules: Sequence[nn.Module], forwards: Sequence[Callable]) -> Iterator[None]:
    """Give each module instance another ``forward`` for a while."""
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own


def headless(model: nn.Module) -> AbstractContextManager[None]:
    """Have a causal LM make no logits for a while: the base model of some is the whole of it."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    heads = [] if head is None else [head]
    return forward_instead(heads, [lambda states: states] * len(heads))


def set_buffers_(module: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Give a module these buffers, as they are, without a copy."""
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, buffer)


def set_parameters_(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a module these parameters, frozen, without a copy."""
    set_buffers_(module, {k: nn.Parameter(t, requires_grad=False) for k, t in tensors.items()})


def empty_(module: nn.Module) -> None:
    """Drop the values of a module's parameters; their shapes stay, on meta."""
    for part in module.modules():
        for name, value in part.named_parameters(recurse=False):
            empty = torch.empty_like(value, device="meta")
            setattr(part, name, nn.Parameter(empty, requires_grad=False))


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of a module without values."""
    own = [*module.parameters(), *module.buffers()]
    meta: dict[int, torch.Tensor] = {id(t): t.detach().to("meta") for t in own}
    for parameter in module.parameters():
        meta[id(parameter)] = nn.Parameter(meta[id(parameter)], requires_grad=False)
    return copy.deepcopy(module, meta)


def parameter(data: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    """A parameter that is trained where the other is."""
    return nn.Parameter(data, requires_grad=like.requires_grad)
