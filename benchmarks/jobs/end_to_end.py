"""Prune a synthetic Llama checkpoint of real shapes through the public API and time it.

``python -m benchmarks.jobs.end_to_end --model llama-3-8b --work DIR --json RESULT.json``

Weights are random, so quality means nothing here; time, memory and widths do.
"""

import argparse
import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..common import environment
from ..common.results import check_work, write_result
from ..common.timing import DEVICE, ON_GPU, ColdCache, median_seconds
from .synthetic import MODELS, Model, llama_config, write_checkpoint, write_text


def forward_seconds(network: Any, tokens: int, rounds: int) -> float:
    """Median seconds of one forward pass over ``tokens`` tokens."""
    ids = torch.randint(2, 200, (1, tokens), device=DEVICE)
    with torch.no_grad():
        network(ids)
        return median_seconds(lambda: network(ids, use_cache=False), ColdCache(), rounds)


def measured_step(name: str, result: dict[str, Any], call: Callable[[], object]) -> None:
    """Run ``call``; put its wall seconds and peak device memory into ``result``."""
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call()
    if ON_GPU:
        torch.cuda.synchronize()
        result[f"{name}_peak_device_bytes"] = torch.cuda.max_memory_allocated()
    result[f"{name}_seconds"] = time.perf_counter() - start
    print(f"{name}: {result[f'{name}_seconds']:.1f} s", flush=True)


def ffn_parameters(network: Any) -> int:
    """Parameters of all gate, up and down projections."""
    parts = (".gate_proj.", ".up_proj.", ".down_proj.")
    return sum(
        parameter.numel()
        for name, parameter in network.named_parameters()
        if any(part in name for part in parts)
    )


def size_of(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run(model: Model, work: Path, sparsity: float, result: dict[str, Any]) -> None:
    """Write, prune, reload, compare. Fills ``result`` as it goes, so a failure leaves a part."""
    from cfsp import Calibration, Recipe, load, prune

    source, goal, text = work / "dense", work / "pruned", work / "calibration.txt"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_text(text, 4 * model.samples * model.seqlen)
    calibration = Calibration(dataset=str(text), samples=model.samples, seqlen=model.seqlen)
    recipe = Recipe(
        sparsity=sparsity,
        width_multiple=128 if model.intermediate >= 4096 else 8,
        calibration=calibration,
    )
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    measured_step("write", result, lambda: write_checkpoint(source, llama_config(model), dtype))
    result["dense_bytes"] = size_of(source)
    measured_step("prune", result, lambda: prune(source, recipe=recipe, out=goal, eval_windows=0))
    result["pruned_bytes"] = size_of(goal)
    result["calibration_tokens"] = model.samples * model.seqlen

    from transformers import AutoModelForCausalLM

    def dense() -> Any:
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype)

    for name, make in (("dense", dense), ("pruned", lambda: load(goal))):
        network = make().to(DEVICE).eval()
        result[f"{name}_ffn_parameters"] = ffn_parameters(network)
        seconds = forward_seconds(network, min(1024, 8 * model.seqlen), 9 if ON_GPU else 3)
        result[f"{name}_forward_seconds"] = seconds
        del network
        if ON_GPU:
            torch.cuda.empty_cache()
    kept = result["pruned_ffn_parameters"] / result["dense_ffn_parameters"]
    result["kept_fraction"] = kept
    result["forward_speedup"] = result["dense_forward_seconds"] / result["pruned_forward_seconds"]
    if abs(kept - (1 - sparsity)) > 0.05:
        raise ValueError(f"kept {kept:.3f} of the FFN parameters at a sparsity of {sparsity}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jobs.end_to_end", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--blocks", type=int, help="fewer or more blocks than the model has")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--work", type=Path, required=True, help="folder to fill and to empty")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    options = parser.parse_args(arguments)
    check_work(parser, options.work)
    model = MODELS[options.model]
    if options.blocks:
        model = dataclasses.replace(model, blocks=options.blocks)
    result: dict[str, Any] = {
        "model": options.model,
        "shapes": dataclasses.asdict(model),
        "sparsity": options.sparsity,
        "environment": environment.describe(),
        "run": False,
    }
    try:
        run(model, options.work, options.sparsity, result)
        result["run"] = True
    finally:
        if not options.keep:
            shutil.rmtree(options.work, ignore_errors=True)
        write_result(options.json, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
