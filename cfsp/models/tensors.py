"""What a model's checkpoint holds, and what a model says to fixed tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..io.shards import TensorInfo


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint of the model holds, in order: tied tensors once, under their first name."""
    seen: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        tensors[name] = tensor.detach()
    return tensors


def converted(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a model under the names and in the shapes of its family's checkpoints.

    Most families' are those of their modules; experts are apart there.
    """
    found = revert_weight_conversion(model, dict(tensors))
    return tensors if found.keys() == tensors.keys() else found


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


def _set_buffers(model: PreTrainedModel, buffers: dict[str, torch.Tensor]) -> None:
    for name, buffer in buffers.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, buffer)


def kept_tensors(
    tensors: Mapping[str, torch.Tensor], model: PreTrainedModel
) -> dict[str, torch.Tensor]:
    """What a checkpoint of the model holds: tied tensors once."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return {name: tensor for name, tensor in tensors.items() if name not in tied}


def tensor_infos(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """Dtypes and shapes of tensors."""
    return {name: TensorInfo(value.dtype, tuple(value.shape)) for name, value in tensors.items()}
