"""Time the second pass, disk to disk, against ``cp`` of the same checkpoint in the same run.

``python -m benchmarks.jobs.second_pass --checkpoint DIR --work DIR --json RESULT.json [--cold]``

Each round copies the checkpoint's shards with ``cp`` and then cuts them, both to the same disk,
each from the page cache, or with ``--cold`` (needs root) from a disk whose cache was dropped. Both
are timed until the call returns, and until ``sync`` says that the disk has all of it: the second
pass does not return before, cp does. Ratios are of one round's pair; medians are reported.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..common import environment
from ..common.results import check_work, write_result


def random_plan(opened: Any, sparsity: float) -> Any:
    """A plan that keeps random channels of every block."""
    from cfsp import Recipe
    from cfsp.models.parts.channels import Units
    from cfsp.pruning.plan import BlockPlan, PruningPlan

    generator = torch.Generator().manual_seed(0)
    blocks = []
    for size in opened.layout.intermediate_sizes(opened.model):
        order = torch.randperm(size, generator=generator)
        kept = order[: round(size * (1 - sparsity))].sort().values
        blocks.append(BlockPlan((kept[None],), 1.0, (Units(size),)))
    recipe = Recipe(sparsity=sparsity, scorer="cfsp")
    return PruningPlan(tuple(blocks), opened.blocks.fingerprint(), recipe)


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def drop_caches() -> None:
    """Forget every clean page that the system holds; needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def copy(shards: Sequence[Path], goal: Path) -> None:
    """``cp``, as anyone would."""
    subprocess.run(["cp", *map(str, shards), str(goal)], check=True)


def cut(checkpoint: Path, goal: Path, sparsity: float) -> None:
    """The second pass alone: no windows are measured."""
    from cfsp.models.blocks import StoredBlocks
    from cfsp.models.opening import open_streamed
    from cfsp.pruning.compaction_streamed import prune_to_shards_
    from cfsp.pruning.second_pass import SecondPass

    opened = open_streamed(checkpoint)
    if opened is None or not isinstance(opened.blocks, StoredBlocks):
        raise SystemExit(f"{checkpoint} cannot be streamed")
    plan = random_plan(opened, sparsity)
    prune_to_shards_(opened, opened.blocks, plan, SecondPass(plan).turn, goal, progress=False)


def one_round(checkpoint: Path, work: Path, sparsity: float, cold: bool) -> dict[str, float]:
    """Seconds of both, each into an empty folder."""
    shards = sorted(checkpoint.glob("*.safetensors"))
    found = {}
    calls: dict[str, Callable[[Path], None]] = {
        "cp": lambda goal: copy(shards, goal),
        "second_pass": lambda goal: cut(checkpoint, goal, sparsity),
    }
    for name, call in calls.items():
        goal = work / name
        goal.mkdir(parents=True)
        if cold:
            drop_caches()
        os.sync()
        found[name] = seconds_of(lambda call=call, goal=goal: call(goal))  # type: ignore[misc]
        found[f"{name}_and_sync"] = found[name] + seconds_of(os.sync)
        found[f"{name}_bytes"] = sum(path.stat().st_size for path in goal.iterdir())
        shutil.rmtree(goal)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jobs.second_pass", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder to fill and to empty")
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each")
    options = parser.parse_args(arguments)
    check_work(parser, options.work)
    one = (options.checkpoint, options.work, options.sparsity, options.cold)
    try:
        if not options.cold:
            one_round(*one)  # both now read from the page cache
        rounds = [one_round(*one) for _ in range(options.rounds)]
    finally:
        shutil.rmtree(options.work, ignore_errors=True)

    def ratio(suffix: str) -> float:
        return statistics.median(r[f"cp{suffix}"] / r[f"second_pass{suffix}"] for r in rounds)

    result = {
        "cold": options.cold,
        "sparsity": options.sparsity,
        "speed_over_cp": ratio(""),
        "speed_over_cp_synced": ratio("_and_sync"),
        "rounds": rounds,
        "environment": environment.describe(),
    }
    if options.json:
        write_result(options.json, result)
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
