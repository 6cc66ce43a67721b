"""What each rank of ``torchrun`` runs in test_ranks.py: commands one after another.

    torchrun ... rank_driver.py FOLDER

reads FOLDER/commands.json, a list of {"name", "arguments"} with what else is to happen, and adds
a line {"name", "code", "out", "err"} to FOLDER/rank-N.jsonl for each.

* "{rank}" in an argument is the rank.
* "event" {"rank", "module", "function", "call", "signal", "to"}: when that rank calls a function of
  cfsp for the nth time it sends a signal to itself or to its parent, torchrun.
* "full": that rank finds the disk full.
* "live": a live model is pruned into this folder instead; "dataset" is what it is calibrated on.
* "exchange": the ranks sum and gather ROWS instead; what each has then goes to this file, with "-N"
  behind. "initialised": by a program that uses torch.distributed itself.
"""

import errno
import importlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import cfsp
from cfsp.cli.main import main
from cfsp.distributed import joined
from tests.conftest import make_tiny, make_tokenizer

SHARD_BYTES = 20_000
ROWS = torch.randn(11, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def small_shards(patch: pytest.MonkeyPatch) -> None:
    """Several shards of a tiny model."""
    for module in ("checkpoints.folder", "pruning.compaction_streamed"):
        patch.setattr(f"cfsp.{module}.MAX_SHARD_BYTES", SHARD_BYTES)


def _signalling(event: dict[str, object], function: Callable[..., object]) -> Callable[..., object]:
    left = iter(range(int(event["call"]) - 1))

    def call(*arguments: object) -> object:
        if next(left, None) is None and not sent:
            sent.append(True)
            process = os.getppid() if event["to"] == "torchrun" else os.getpid()
            os.kill(process, getattr(signal, str(event["signal"])))
            if event["to"] == "torchrun":
                time.sleep(2)  # until it has handed the signal on
        return function(*arguments)

    sent: list[bool] = []
    return call


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def prune_live(dataset: str, out: str) -> None:
    """Prune a live model, by all ranks that there are."""
    recipe = cfsp.Recipe(width_multiple=1, calibration=cfsp.Calibration(dataset, 5, 32))
    options = {"eval_dataset": dataset, "eval_windows": 3, "progress": False}
    with joined() as ranks:
        cfsp.prune(make_tiny(), make_tokenizer(), recipe, out, ranks=ranks, **options)


def exchange(file: str, initialised: bool) -> None:
    """Sum the rows over ranks, and gather them, where each begins with its share."""
    if initialised:
        dist.init_process_group("gloo")
    with joined() as ranks:
        own = ranks.share(len(ROWS))
        rows = torch.zeros_like(ROWS)
        rows[own] = ROWS[own]
        found = {
            "sum": ranks.ordered_sum(list(ROWS[own]), ROWS[0]),
            "rows": ranks.fill_(rows),
            "others": [ranks.of_first(lambda: ranks.rank), ranks.most(ranks.rank), ranks.total(1)],
        }
    torch.save(found, f"{file}-{ranks.rank}")
    assert dist.is_initialized() == initialised
    if initialised:
        dist.destroy_process_group()


def _run(command: dict[str, object], rank: int) -> int | str | None:
    try:
        if "live" in command:
            prune_live(str(command["dataset"]), str(command["live"]))
            return 0
        if "exchange" in command:
            exchange(str(command["exchange"]), "initialised" in command)
            return 0
        return main([str(argument).format(rank=rank) for argument in command["arguments"]])
    except SystemExit as stop:
        return stop.code


def _drive(folder: Path, rank: int) -> None:
    for command in json.loads((folder / "commands.json").read_text()):
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            small_shards(patch)
            event = command.get("event", {})
            if event.get("rank") == rank:
                module = importlib.import_module(f"cfsp.{event['module']}")
                function = getattr(module, event["function"])
                patch.setattr(module, event["function"], _signalling(event, function))
            if command.get("full") == rank:
                patch.setattr(os, "posix_fallocate", _full)
            with redirect_stdout(out), redirect_stderr(err):
                code = _run(command, rank)
        line = {"name": command["name"], "code": code, "out": out.getvalue(), "err": err.getvalue()}
        with (folder / f"rank-{rank}.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    _drive(Path(sys.argv[1]), int(os.environ["RANK"]))
