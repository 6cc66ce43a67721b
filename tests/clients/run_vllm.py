"""Greedy tokens of a model folder, by vLLM: run in an environment that holds it.

Arguments: a folder, a job (JSON: prompts, new_tokens), where the answer goes (JSON: tokens,
model_class, widths). With CFSP_TRUST=1 code in the folder is run.
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
    has several."""
    inner = getattr(model, "language_model", model).model  # type: ignore[attr-defined]
    inner = getattr(inner, "model", inner)  # one deeper behind vLLM's transformers classes
    widths = [
        layer.mlp.experts.moe_config.intermediate_size
        if hasattr(layer.mlp, "experts")
        else layer.mlp.down_proj.input_size
        for layer in inner.layers
    ]
    return {"model_class": type(model).__name__, "widths": widths}


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
        **llm.apply_model(inspect)[0],
    }
    Path(answer_file).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
