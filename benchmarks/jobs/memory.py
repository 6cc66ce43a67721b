"""Prune a checkpoint under a hard limit of memory at which it cannot be loaded whole.

``python -m benchmarks.jobs.memory --checkpoint DIR --work DIR --limit-gib 8 --json RESULT.json``

Two processes under one limit of their address space (``RLIMIT_AS``, which nothing gets around):
one loads the checkpoint with transformers and must fail for want of memory, one prunes it. The
resident memory of the second at its peak (``VmHWM``) is set beside the estimate. With several
``--checkpoint`` it is told for each, smaller ones first.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cfsp

from ..common import environment
from ..common.results import check_work, write_result
from .synthetic import write_text

LOAD = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
"""
PRUNE = """
import json, re, sys
from pathlib import Path
from cfsp.cli.main import main
code = main(sys.argv[2:])
status = Path("/proc/self/status").read_text()
peak = {k: 1024 * int(re.search(rf"{k}:\\s+(\\d+)", status)[1]) for k in ("VmHWM", "VmPeak")}
Path(sys.argv[1]).write_text(json.dumps(peak))
raise SystemExit(code)
"""


def limited(code: str, *arguments: str, limit: int) -> tuple[int, str]:
    """(exit code, last line of stderr) of Python code under a limit of its address space."""

    def under_limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=under_limit,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    lines = run.stderr.strip().splitlines()
    return run.returncode, lines[-1] if lines else ""


def shapes(checkpoint: Path) -> dict[str, int]:
    """Bytes of the weights and of the largest block, and the number of blocks."""
    from cfsp.io.safetensors import read_index

    sizes: dict[str, int] = {}
    tensors = read_index(checkpoint)
    for name, stored in tensors.items():
        if name.startswith("model.layers."):
            block = name.split(".")[2]
            sizes[block] = sizes.get(block, 0) + stored.nbytes
    return {
        "weights_bytes": sum(stored.nbytes for stored in tensors.values()),
        "block_bytes": max(sizes.values()),
        "blocks": len(sizes),
    }


def measure(checkpoint: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What became of loading and of pruning one checkpoint."""
    limit = int(options.limit_gib * 2**30)
    work: Path = options.work
    text, out, peak = work / "calibration.txt", work / "pruned", work / "peak.json"
    tokens = options.samples * options.seqlen
    write_text(text, 4 * tokens)
    whole, message = limited(LOAD, str(checkpoint), limit=limit)
    start = time.perf_counter()
    code, error = limited(
        PRUNE,
        *(str(peak), "prune", str(checkpoint), "--out", str(out), "--dataset", str(text)),
        *("--samples", str(options.samples), "--seqlen", str(options.seqlen)),
        *("--eval-windows", "0", "--quiet"),
        limit=limit,
    )
    if code:
        raise SystemExit(f"cfsp prune ended with {code}: {error}")
    found = {
        **shapes(checkpoint),
        "loading_whole_exit": whole,
        "loading_whole_error": message.replace(f"{checkpoint}/", "")[-200:],
        "prune_seconds": time.perf_counter() - start,
        "tokens": tokens,
        "pruned_bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
        "peak_resident_bytes": json.loads(peak.read_text())["VmHWM"],
        "peak_address_space_bytes": json.loads(peak.read_text())["VmPeak"],
    }
    calibration = cfsp.Calibration(str(text), options.samples, options.seqlen)
    recipe = cfsp.Recipe(calibration=calibration)
    estimate = cfsp.estimate(checkpoint, recipe, eval_windows=0, device="cpu")
    found["estimated_resident_bytes"] = estimate.host_bytes
    shutil.rmtree(out)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jobs.memory", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--checkpoint", type=Path, required=True, nargs="+")
    parser.add_argument("--work", type=Path, required=True, help="folder to fill and to empty")
    parser.add_argument("--limit-gib", type=float, default=8)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args(arguments)
    check_work(parser, options.work)
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        runs = [measure(checkpoint, options) for checkpoint in options.checkpoint]
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
    result = {
        "limit_bytes": int(options.limit_gib * 2**30),
        "runs": runs,
        "environment": environment.describe(),
    }
    if options.json:
        write_result(options.json, result)
    print(json.dumps(runs, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
