"""Prefill and decode of a model and of what is left of it, in turns, as generation runs them.

``python -m benchmarks.jobs.speed --model MODEL --sparsity 0.5 --work DIR --json RESULT.json``

The model is pruned into the work folder on a little text that ships with Python: speed depends on
the widths alone. Both are then timed in one process.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cfsp
from cfsp.evaluation.speed import Generation

from ..common import environment
from ..common.results import check_work, write_result
from ..common.timing import DEVICE

CALIBRATION = cfsp.Calibration(dataset="builtin", samples=4, seqlen=128)


def run(model: str, work: Path, recipe: cfsp.Recipe, generation: Generation) -> dict[str, Any]:
    """Prune, then time both; every figure of both, and the ratios."""
    pruned = work / "pruned"
    plan = cfsp.prune(model, recipe=recipe, out=pruned, eval_windows=0, progress=False).plan
    dense, small = cfsp.evaluate(
        (model, pruned),
        windows=0,
        speed=True,
        dtype=recipe.dtype,
        device=DEVICE,
        progress=False,
        **vars(generation),
    )
    ratios = {
        f"{what}_speedup": small["speed"][f"{what}_tokens_per_second"]
        / dense["speed"][f"{what}_tokens_per_second"]
        for what in ("prefill", "decode")
    }
    return {
        "widths": list(plan.widths),
        "ffn_channels_removed": plan.sparsity,
        "parameters": [dense["parameters"], small["parameters"]],
        "dense": dense["speed"],
        "pruned": small["speed"],
        **ratios,
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
    check_work(parser, options.work)
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
    write_result(options.json, result)
    for what in ("prefill", "decode"):
        print(f"{what}: {result[f'{what}_speedup']:.2f}x the dense model's tokens/s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
