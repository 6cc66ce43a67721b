"""What a model's checkpoint holds."""

from collections.abc import Mapping

import torch
from torch import nn

from ..io.safetensors import TensorInfo


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint of the model holds, in order: tied tensors once, known by their memory, and
    on meta, where there is none, by what the model says."""
    tied = getattr(model, "all_tied_weights_keys", {})
    seen: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        memory = tensor.data_ptr()
        if not (memory in seen if memory else name in tied):
            seen.add(memory)
            tensors[name] = tensor.detach()
    return tensors


def tensor_infos(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """Dtypes and shapes of tensors."""
    return {name: TensorInfo(value.dtype, tuple(value.shape)) for name, value in tensors.items()}


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters, tied ones under each of their names."""
    return {k: tuple(p.shape) for k, p in model.named_parameters(remove_duplicate=False)}
