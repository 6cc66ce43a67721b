"""Greedy tokens of a GGUF file, by llama.cpp: run in an environment that holds xllamacpp.

Arguments: a .gguf file, a job (JSON: prompts, new_tokens, texts), where the answer goes (JSON:
tokens, tokenized).
"""

import json
import sys
import urllib.request
from pathlib import Path

import xllamacpp


def main() -> None:
    model, job_file, answer_file = sys.argv[1:]
    job = json.loads(Path(job_file).read_text())
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = 512
    params.n_parallel = 1
    params.cpuparams.n_threads = 2
    params.warmup = False
    # In F32 throughout: flash attention computes in F16 on a CPU, and near-ties would tip.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)

    def post(path: str, body: dict) -> dict:
        request = urllib.request.Request(
            server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.loads(response.read())

    tokens = [
        post(
            "/completion",
            {
                "prompt": prompt,
                "n_predict": job["new_tokens"],
                "temperature": 0,
                "return_tokens": True,
                "cache_prompt": False,
                "ignore_eos": True,
            },
        )["tokens"]
        for prompt in job["prompts"]
    ]
    tokenized = [
        post("/tokenize", {"content": text, "add_special": True})["tokens"] for text in job["texts"]
    ]
    Path(answer_file).write_text(json.dumps({"tokens": tokens, "tokenized": tokenized}))


if __name__ == "__main__":
    main()
