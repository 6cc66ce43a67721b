"""Whether a saved model says what the pruned one said, to the last bit."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..models.blockwise import RidingWindows
from ..models.loading import model_device, quiet_loading
from ..models.opening import OpenModel, open_any
from ..models.surgery import set_buffers_
from .folder import load

PROBE_TOKENS = 16


@dataclass(frozen=True)
class Probe:
    """What a model says to fixed tokens, [1, 16, V], and the buffers with which it says so."""

    logits: torch.Tensor
    buffers: dict[str, torch.Tensor]
    """Those that no checkpoint holds, such as the rotary frequencies: made anew on loading."""
    kernels: dict[str, Any] = field(default_factory=dict)
    """The implementations with which it and its parts compute, as ``from_pretrained`` takes them:
    a config in a file does not say."""


def probe_tokens(model: PreTrainedModel) -> torch.Tensor:
    """[1, 16] fixed tokens to which a reloaded model must say the same, to the last bit."""
    return (torch.arange(PROBE_TOKENS)[None] * 7919) % model.config.get_text_config().vocab_size


@torch.no_grad()
def take_probe(model: PreTrainedModel) -> Probe:
    ids = probe_tokens(model).to(model_device(model))
    logits = model(input_ids=ids, use_cache=False).logits.cpu()
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    parts = {name: getattr(model.config, name) for name in sorted(model.config.sub_configs)}
    kernels = {
        choice: {
            name: getattr(config, f"_{choice}", None)
            for name, config in {"": model.config, **parts}.items()
            if config is not None
        }
        for choice in ("attn_implementation", "experts_implementation")
    }
    return Probe(logits, buffers, {name: own for name, own in kernels.items() if any(own.values())})


def ridden_probe(opened: OpenModel) -> torch.Tensor:
    """Logits [1, 16, V] of the probe tokens, with one block in memory at a time."""
    blocks = opened.layout.find_blocks(opened.model)
    probe = RidingWindows(opened.model, blocks, probe_tokens(opened.model))
    with opened.blocks.turns() as turns:
        for number, _ in turns:
            probe.ride(number)
    return next(probe.logits()).cpu()


def verify(folder: Path, expected: Probe, device: torch.device) -> PreTrainedModel:
    """The written model, reloaded; RuntimeError, a defect, where a bit of its logits differs.

    A live model may carry buffers that a fresh load makes otherwise (``model.to(bfloat16)`` also
    rounds the rotary frequencies). Then the comparison is repeated with them, with a warning.
    """
    with quiet_loading():
        model = load(folder, device=str(device), **expected.kernels)
    found = take_probe(model)
    if _same(found.logits, expected.logits):
        return model
    if found.buffers.keys() == expected.buffers.keys():
        set_buffers_(model, expected.buffers)
        equal = _same(take_probe(model).logits, expected.logits)
        set_buffers_(model, found.buffers)
        if equal:
            warnings.warn(
                "the live model's rotary or other unsaved buffers are not those that a fresh load "
                "makes (did .to(dtype) round them?); the saved model has the fresh ones",
                stacklevel=2,
            )
            return model
    raise _differs(found.logits, expected.logits)


def verify_streamed(folder: Path, expected: torch.Tensor, device: torch.device) -> None:
    """:func:`verify` with one block in memory at a time; ``expected``: logits [1, 16, V]."""
    with quiet_loading():
        opened = open_any(folder, device=str(device))
    found = ridden_probe(opened)
    if not _same(found, expected):
        raise _differs(found, expected)


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether all logits are the same, or NaN in both: finite weights may overflow too."""
    return torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)


def _differs(found: torch.Tensor, expected: torch.Tensor) -> RuntimeError:
    worst = float((found.double() - expected.double()).abs().max())
    return RuntimeError(f"the saved model differs from the pruned one by {worst} after reload")
