"""Whether a saved model says what the pruned one said, to the last bit."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..models.blockwise import RidingWindows
from ..models.loading import quiet_loading
from ..models.opening import OpenModel, open_streamed

PROBE_TOKENS = 16


def probe_tokens(model: PreTrainedModel) -> torch.Tensor:
    """[1, 16] fixed tokens to which a reloaded model must say the same, to the last bit."""
    return (torch.arange(PROBE_TOKENS)[None] * 7919) % model.config.vocab_size


@torch.no_grad()
def probe_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits [1, 16, V] of the probe tokens."""
    ids = probe_tokens(model).to(next(model.parameters()).device)
    return model(input_ids=ids, use_cache=False).logits.cpu()


def unsaved_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Buffers that no checkpoint holds, such as the rotary frequencies: made anew on loading."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


@dataclass(frozen=True)
class Probe:
    """What a model says to fixed tokens, and the buffers with which it says so."""

    logits: torch.Tensor
    buffers: dict[str, torch.Tensor]


def take_probe(model: PreTrainedModel) -> Probe:
    """The probe of a model that is about to be saved."""
    return Probe(probe_logits(model), unsaved_buffers(model))


def differs(found: torch.Tensor, expected: torch.Tensor) -> RuntimeError:
    """The error for a saved model with other logits than the pruned one had."""
    worst = float((found.double() - expected.double()).abs().max())
    return RuntimeError(f"the saved model differs from the pruned one by {worst} after reload")


def ridden_probe(opened: OpenModel) -> torch.Tensor:
    """Logits [1, 16, V] of the probe tokens, with one block in memory at a time."""
    blocks = opened.layout.find_blocks(opened.model)
    probe = RidingWindows(opened.model, blocks, probe_tokens(opened.model))
    with opened.blocks.turns() as turns:
        for number, _ in turns:
            probe.ride(number)
    return next(probe.logits()).cpu()


def verify_streamed(folder: Path, expected: torch.Tensor, device: torch.device) -> None:
    """Open a written model anew, block by block, and compare its logits of the probe tokens, bit
    for bit, with those [1, 16, V] that the pruned blocks gave before they were written.

    Raises:
        RuntimeError: any logit differs. Nothing that a user can mend: a defect.
    """
    with quiet_loading():
        opened = open_streamed(folder, device=str(device))
    if opened is None:
        raise RuntimeError(f"{folder} does not hold its parameters under their own names")
    found = ridden_probe(opened)
    if not torch.equal(found, expected):
        raise differs(found, expected)
