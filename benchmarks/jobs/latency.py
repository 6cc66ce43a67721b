"""Latency budgets against the clock: a random model of real proportions, predicted and measured.

``python -m benchmarks.jobs.latency --threads 1 --json RESULT.json``

The table is made as ``cfsp latency`` does; then the dense and the pruned models take turns.
"""

import argparse
import copy
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import cfsp
from benchmarks.common.environment import describe
from benchmarks.common.results import write_result
from cfsp.costs.budgets import even_plan
from cfsp.costs.latency import LatencyTable
from cfsp.models.opening import adopt
from cfsp.pruning.compaction import prune_model_
from cfsp.pruning.second_pass import SecondPass

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
}


def build(device: str, dtype: str) -> PreTrainedModel:
    """A Llama of :data:`SHAPE`, random."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPE)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval().to(device)


def pruned(model: PreTrainedModel, budget: str, table: LatencyTable) -> tuple[Any, float]:
    """A copy cut to a budget, and its predicted seconds."""
    left = copy.deepcopy(model)
    opened = adopt(left, None)
    recipe = cfsp.Recipe(scorer="cfsp", budget=budget)
    plan = even_plan(opened.described, recipe, table)
    prune_model_(left, opened.layout, plan.recipe, SecondPass(plan).turn, progress=False)
    return left, table.predicted(plan.widths)


@torch.no_grad()
def seconds(models: list[PreTrainedModel], tokens: torch.Tensor, rounds: int) -> list[float]:
    """Median of a forward call of each; they take turns, there and back."""
    found: list[list[float]] = [[] for _ in models]
    for turn in range(rounds + 1):
        order = range(len(models)) if turn % 2 else reversed(range(len(models)))
        for number in order:
            started = time.perf_counter()
            models[number](input_ids=tokens, use_cache=False)
            if tokens.is_cuda:
                torch.cuda.synchronize()
            if turn:
                found[number].append(time.perf_counter() - started)
    return [median(times) for times in found]


def compared(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """Predicted and measured seconds of the dense model, and of one for each budget."""
    batch, length = map(int, shape.split("x"))
    model = build(options.device, options.dtype)
    table = cfsp.latency_table(model, batch=batch, length=length, again=True, progress=False)
    budgets = [f"latency={fraction}@{shape}" for fraction in options.fractions.split(",")]
    cut = [pruned(model, budget, table) for budget in budgets]
    tokens = torch.randint(0, SHAPE["vocab_size"], (batch, length), device=options.device)
    measured = seconds([model, *(left for left, _ in cut)], tokens, options.rounds)
    found: dict[str, Any] = {
        "table": table.to_dict(),
        "dense": {"predicted": table.dense_seconds, "measured": measured[0]},
        "budgets": {},
    }
    print(f"dense: predicted {table.dense_seconds * 1e3:.2f} ms, measured {measured[0] * 1e3:.2f}")
    for budget, (_, predicted), own in zip(budgets, cut, measured[1:], strict=True):
        wanted = 1 - float(budget.partition("@")[0].removeprefix("latency="))
        row = {"wanted": wanted, "predicted": predicted, "measured": own}
        row["measured_fraction"] = own / measured[0]
        row["off_request"] = row["measured_fraction"] / wanted - 1
        found["budgets"][budget] = row
        print(
            f"{budget}: wanted {wanted:.0%} of dense, measured {row['measured_fraction']:.1%} "
            f"({row['off_request']:+.1%}); predicted {predicted * 1e3:.2f} ms, measured "
            f"{own * 1e3:.2f} ({own / predicted - 1:+.1%})",
            flush=True,
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per budget; write all of it; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jobs.latency", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--fractions", default="0.1,0.25,0.4")
    parser.add_argument("--shapes", nargs="+", default=["1x128", "1x512"])
    parser.add_argument("--repeat", type=int, default=1, help="times that all is done")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    runs = [compared(shape, options) for _ in range(options.repeat) for shape in options.shapes]
    off = [abs(row["off_request"]) for run in runs for row in run["budgets"].values()]
    print(f"off the request by {max(off):.1%} at most, {median(off):.1%} in the middle")
    result = {
        "environment": describe(),
        "malloc": {name: value for name, value in os.environ.items() if "MALLOC_" in name},
        "most_off": max(off),
        "median_off": median(off),
        "runs": runs,
    }
    if options.json:
        write_result(options.json, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
