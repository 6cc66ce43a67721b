"""vLLM's way to know pruned models: loaded by vLLM itself, through the entry point of the wheel."""

NATIVE_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Those with a class in :mod:`cfsp.models.vllm`; vLLM runs others through transformers."""


def register() -> None:
    """Name the classes to vLLM, which imports them when a model asks for one.

    That this module was imported has registered the configs with transformers already.
    """
    from vllm import ModelRegistry

    for family in NATIVE_FAMILIES:
        name = f"CFSP{family}ForCausalLM"
        ModelRegistry.register_model(name, f"cfsp.models.vllm:{name}")
