"""How to load a pruned folder, as commands for the runtimes of docs/serving.md."""

import json
import shlex

from ..checkpoints.documents import Result
from ..checkpoints.exports.gguf_model import ARCHITECTURES
from ..vllm_plugin import NATIVE_FAMILIES


def loading_commands(result: Result, path: str) -> list[tuple[str, str]]:
    """(runtime, commands) that load the result from the folder at ``path``."""
    text, word = json.dumps(path), shlex.quote(path)
    trust = "" if result.stock else ", trust_remote_code=True"
    python = (
        f"from transformers import {result.auto_class}, AutoTokenizer\n\n"
        f"model = {result.auto_class}.from_pretrained({text}{trust})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({text})"
    )
    if not result.stock:
        python += (
            "\n\n# or, with cfsp installed, without the trust flag:\n"
            f"import cfsp\nmodel = cfsp.load({text})"
        )
    vllm = f"vllm serve {word}"
    if not result.stock:
        vllm += " --trust-remote-code"
        if result.family in NATIVE_FAMILIES:
            vllm = f"vllm serve {word}    # cfsp installed beside it: native\n{vllm}"
    commands = [("transformers", python), ("vLLM", vllm)]
    if result.auto_class != "AutoModelForCausalLM":  # which no format is exported to
        return commands
    gguf = ARCHITECTURES.get(result.family)
    if gguf and (result.stock or gguf[1]):
        llama = f"cfsp export {word} --to gguf --out model.gguf\nllama-server -m model.gguf"
    else:
        llama = (
            f"cfsp export {word} --to padded --out padded\n"
            "python convert_hf_to_gguf.py padded    # of llama.cpp"
        )
    return [*commands, ("llama.cpp", llama)]
