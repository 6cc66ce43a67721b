"""Skeletons: models as they will be loaded, without the memory that these take."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from cfsp.models.blockwise import record_block_calls
from cfsp.models.detection.trial import checked_layout
from cfsp.models.loading import auto_class, make_skeleton, quiet_loading

from ..families.tiny import FAMILIES


class NothingLarge(TorchDispatchMode):
    """Fails where a tensor of more than 16 Mi values comes into memory."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                assert value.untyped_storage().nbytes() <= 2**24 * value.itemsize, func
        return made


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "llama4_text"])
def test_a_model_of_any_size_is_known_without_memory(name: str) -> None:
    config = AutoConfig.for_model(name, num_hidden_layers=4)
    with NothingLarge():
        skeleton = make_skeleton(config, torch.bfloat16)
        checked_layout(skeleton)
    assert sum(parameter.numel() for parameter in skeleton.parameters()) > 10e9


@pytest.mark.parametrize(
    "name", ["minimax", "gemma3_text", "gpt_oss", "deepseek_v3", "nemotron_h", "qwen3_vl"]
)
def test_buffers_are_those_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].model().to(torch.bfloat16)
    with quiet_loading():
        model.save_pretrained(tmp_path)
        loaded = auto_class(model.config).from_pretrained(tmp_path, dtype=torch.bfloat16)
    skeleton = make_skeleton(loaded.config, torch.bfloat16)
    buffers = dict(skeleton.named_buffers())
    assert {name: (b.dtype, b.shape) for name, b in loaded.named_buffers()} == {
        name: (b.dtype, b.shape) for name, b in buffers.items()
    }
    kept = dict(loaded.named_non_persistent_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in kept.items())


def test_no_logits_are_made_where_only_blocks_are_run() -> None:
    """The base model of Llama 4's text is the model itself."""
    model, windows = FAMILIES["llama4_text"].model(), torch.zeros(1, 4, dtype=torch.int64)
    assert model.base_model is model
    model.lm_head.weight.data = torch.empty(260, 1)  # would not fit the hidden states
    assert record_block_calls(model, model.model.layers, windows, 1).hidden.shape == (1, 4, 32)
