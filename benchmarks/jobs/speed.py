"""Prefill and decode of a model and of what is left of it, in turns, as generation runs them.

``python -m benchmarks.jobs.speed --model MODEL --sparsity 0.5 --work DIR --json RESULT.json``

The model is pruned into the work folder on a little text that ships with Python: speed depends on
the widths alone. Both are then timed in one process.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cfsp
from cfsp.evaluation.speed import Generation, PeakMemory, measure_speed, time_round
from cfsp.models.loading import pick_device
from cfsp.models.opening import open_model

from ..common import environment
from ..common.timing import DEVICE

CALIBRATION = cfsp.Calibration(dataset="builtin", samples=4, seqlen=128)


def run(model: str, work: Path, recipe: cfsp.Recipe, generation: Generation) -> dict[str, Any]:
    """Prune, then time both; every figure of both, and the ratios."""
    pruned = work / "pruned"
    plan = cfsp.prune(model, recipe=recipe, out=pruned, eval_windows=0, progress=False).plan
    opened, peaks = [], []
    for name in (model, pruned):
        memory = PeakMemory(pick_device(DEVICE))
        opened.append(open_model(name, recipe.dtype, DEVICE).model)
        memory.restart()
        time_round(opened[-1], generation)
        peaks.append(memory.measure())
    dense, small = measure_speed(opened, generation, peak_memory=peaks)
    return {
        "widths": list(plan.widths),
        "ffn_channels_removed": plan.sparsity,
        "parameters": [network.num_parameters() for network in opened],
        "dense": dense.to_dict(),
        "pruned": small.to_dict(),
        "prefill_speedup": small.prefill_tokens_per_second / dense.prefill_tokens_per_second,
        "decode_speedup": small.decode_tokens_per_second / dense.decode_tokens_per_second,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jobs.speed", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--width-multiple", type=int, default=128)
    parser.add_argument("--work", type=Path, required=True, help="folder to fill and to empty")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    for name, value in vars(Generation()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    options = parser.parse_args(arguments)
    if options.work.exists() and any(options.work.iterdir()):
        parser.error(f"--work {options.work} is not empty, and it would be removed")
    recipe = cfsp.Recipe(
        sparsity=options.sparsity, width_multiple=options.width_multiple, calibration=CALIBRATION
    )
    generation = Generation(**{name: getattr(options, name) for name in vars(Generation())})
    try:
        result = run(options.model, options.work, recipe, generation)
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
    result = {
        "model": Path(options.model).name,
        "sparsity": options.sparsity,
        "environment": environment.describe(),
        **result,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    for what in ("prefill", "decode"):
        print(f"{what}: {result[f'{what}_speedup']:.2f}x the dense model's tokens/s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
