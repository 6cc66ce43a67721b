"""vLLM's way to know pruned models: loaded by vLLM itself, through the entry point of the wheel."""

NATIVE_FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
"""A family, and module of vLLM -> its class, which :mod:`cfsp.models.vllm` gives sizes per block;
vLLM runs others through transformers."""
NO_HEADS_PER_BLOCK = ("phi3", "qwen2")
"""Families that vLLM cannot run with other heads in every block: it crashes on Phi-3, and takes the
size of a head of Qwen2 to be the hidden size divided by their number."""


def register() -> None:
    """Name the classes to vLLM, which imports them when a model asks for one.

    That this module was imported has registered the configs with transformers already.
    """
    from vllm import ModelRegistry

    for stock in NATIVE_FAMILIES.values():
        ModelRegistry.register_model(f"CFSP{stock}", f"cfsp.models.vllm:CFSP{stock}")
