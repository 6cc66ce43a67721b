"""Greedy tokens of a model folder, by vLLM: run in an environment that holds it.

Arguments: a folder, a job (JSON: prompts, new_tokens), where the answer goes (JSON: tokens,
cache_bytes, model_class, widths). With CFSP_TRUST=1 code in the folder is run.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def inspect(model: object) -> dict:
    """Class of the model that runs, and the FFN channels of its blocks: of one expert where a block
    has several, 0 where there are none."""
    inner = getattr(model, "language_model", model).model  # type: ignore[attr-defined]
    inner = getattr(inner, "model", inner)  # one deeper behind vLLM's transformers classes
    ffns = [getattr(layer, "mlp", None) for layer in inner.layers]
    widths = [
        mlp.experts.moe_config.intermediate_size
        if hasattr(mlp, "experts")
        else mlp.down_proj.input_size
        if hasattr(mlp, "down_proj")
        else 0
        for mlp in ffns
    ]
    return {"model_class": type(model).__name__, "widths": widths}


def cache_bytes(llm: object) -> float:
    """What vLLM sets aside for the keys and values of a token."""
    core = llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    cache = core.scheduler.kv_cache_config
    (group,) = cache.kv_cache_groups
    (size,) = {tensor.size for tensor in cache.kv_cache_tensors}  # of what they all lie in
    return size / cache.num_blocks / group.kv_cache_spec.block_size


def main() -> None:
    from vllm import LLM, SamplingParams

    model, job_file, answer_file = sys.argv[1:]
    job = json.loads(Path(job_file).read_text())
    llm = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        limit_mm_per_prompt={"image": 0, "video": 0},  # no files of a processor are needed
        trust_remote_code=os.environ.get("CFSP_TRUST") == "1",
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
        SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True),
        use_tqdm=False,
    )
    answer = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cache_bytes": cache_bytes(llm),
        **llm.apply_model(inspect)[0],
    }
    Path(answer_file).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
