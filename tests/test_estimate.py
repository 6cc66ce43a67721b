"""Estimates against what runs do: FLOPs, bytes of memory, bytes read and written."""

import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cfsp.costs import ModelCosts, block_path, costs_of
from cfsp.shards import TensorInfo
from cfsp.stream import record_block_calls, run_block

CONFIGS = Path(__file__).resolve().parents[1] / "benchmarks" / "configs"
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
MOE = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 8,
    },
}


def build(model_type: str, attention: str = "sdpa", **overrides: object) -> PreTrainedModel:
    shape = {**SHAPE, **MOE.get(model_type, {}), **overrides}
    dtype, experts = shape.pop("dtype", torch.float32), shape.pop("experts", "eager")
    config = AutoConfig.for_model(model_type, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if model_type in MOE:
        model.set_experts_implementation(experts)
    return model.eval()


def costs(model: PreTrainedModel) -> ModelCosts:
    tensors = {n: TensorInfo(p.dtype, tuple(p.shape)) for n, p in model.named_parameters()}
    return costs_of(model.config, tensors, block_path(model), model.dtype.itemsize)


@pytest.mark.parametrize("model_type", ["llama", "gemma", "qwen3", *MOE, "gpt_neox"])
def test_flops_are_those_of_a_forward_pass(model_type: str) -> None:
    """Eager attention and experts are all that the counter of PyTorch sees on a CPU."""
    model = build(model_type, "eager")
    tokens = torch.randint(0, 500, (3, 40))
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model.base_model(input_ids=tokens, use_cache=False)
    found = costs(model)
    assert counted.get_total_flops() == found.block_flops(40) * tokens.numel()
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(input_ids=tokens, use_cache=False)
    expected = (found.block_flops(40) + found.head_flops()) * tokens.numel()
    assert counted.get_total_flops() == expected


class Live(TorchDispatchMode):
    """Bytes of storages that operations make, while they last."""

    def __init__(self, known: object) -> None:
        super().__init__()
        tensors = (x for x in tree_iter(known) if isinstance(x, torch.Tensor))
        self.known = {x.untyped_storage()._cdata for x in tensors}
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known | self.sizes.keys():
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize(
    ("model_type", "attention", "options", "slack"),
    [
        ("llama", "sdpa", {}, 0),
        ("llama", "sdpa", {"intermediate_size": 64, "num_key_value_heads": 8}, 0),
        ("llama", "sdpa", {"dtype": torch.bfloat16}, 0),
        ("llama", "eager", {"dtype": torch.bfloat16}, 0),
        ("gemma", "sdpa", {"head_dim": 16}, 0),
        ("mistral", "sdpa", {"sliding_window": 32}, 0),
        ("gpt_neox", "sdpa", {}, 0.1),
        ("mixtral", "sdpa", {"experts": "grouped_mm"}, 0.05),
        ("qwen3_moe", "sdpa", {"experts": "grouped_mm"}, 0.05),
        ("deepseek_v3", "eager", {}, 0.05),
    ],
)
def test_memory_of_a_forward_call_is_what_lives_at_its_peak(
    model_type: str, attention: str, options: dict[str, object], slack: float
) -> None:
    model = build(model_type, attention, **options)
    blocks = model.get_submodule(block_path(model))
    tokens = torch.randint(0, 500, (4, 128))
    calls = record_block_calls(model, blocks, tokens, micro_batch=2)
    peak = 0
    for number, block in enumerate(blocks):
        known = [calls.hidden, calls.arguments, list(block.parameters()), list(block.buffers())]
        with Live(known) as live:
            run_block(block, number, calls, lambda *_: None)
        peak = max(peak, live.peak)
    found = costs(model).working_bytes(2, 128, "cpu")
    assert found == pytest.approx(peak, rel=slack)
