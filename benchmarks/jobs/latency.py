"""Latency budgets against the clock: a random model of real proportions, predicted and measured.

``python -m benchmarks.jobs.latency --threads 1 --json RESULT.json``

``python -m benchmarks.jobs.latency --threads 1 --model SMOLLM2 --shapes 1x128 8x1+1024
--units channels,groups,attention,ffn --fractions 0.25 --mixed 3`` has plans whose parts keep random
numbers too.

The table is made as ``cfsp latency`` does; then the dense and the pruned models take turns.
"""

import argparse
import copy
import dataclasses
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import cfsp
from benchmarks.common.environment import describe
from benchmarks.common.results import write_result
from cfsp.costs.budgets import even_plan, steps_of
from cfsp.costs.latency import LatencyTable
from cfsp.costs.placed_blocks import cache_maker
from cfsp.models.loading import cache_argument
from cfsp.models.opening import OpenModel, open_any
from cfsp.pruning.budget import SHAPE as FORM
from cfsp.pruning.compaction import prune_model_
from cfsp.pruning.plan import BlockPlan, PruningPlan
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


def build(device: str, dtype: str, model: Path | None = None) -> PreTrainedModel:
    """A Llama of :data:`SHAPE`, or a model as the config in a folder says; random."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(model) if model else AutoConfig.for_model("llama", **SHAPE)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval().to(device)


def mixed(opened: OpenModel, recipe: cfsp.Recipe, seed: int) -> PruningPlan:
    """A plan whose parts keep random numbers, of all that the recipe allows."""
    drawn, described = random.Random(seed), opened.described
    counts = iter(
        drawn.randrange(own.least, own.size + 1, own.multiple)
        for own in steps_of(described, recipe)
    )
    blocks = []
    for units in described.units:
        kept = tuple(torch.arange(next(counts)).expand(own.experts, -1) for own in units)
        blocks.append(BlockPlan(kept, 0.0, units))
    return PruningPlan(tuple(blocks), "", recipe)


def pruned(
    model: PreTrainedModel, recipe: cfsp.Recipe, table: LatencyTable, seed: int | None = None
) -> tuple[PreTrainedModel, float]:
    """A copy cut to a budget, or at random, and its predicted seconds."""
    left = copy.deepcopy(model)
    opened = open_any(left, attention=recipe.cuts_attention)
    even = seed is None
    plan = even_plan(opened.described, recipe, table) if even else mixed(opened, recipe, seed)
    prune_model_(left, opened.layout, plan.recipe, SecondPass(plan).turn, progress=False)
    return left, table.predicted([count for block in plan.blocks for count in block.counts])


def caller(
    model: PreTrainedModel, tokens: torch.Tensor, context: int
) -> Callable[[], Callable[[], Any]]:
    """Gives, before each call, what calls the model: after a context with its cache filled."""
    if not context:
        return lambda: lambda: model(input_ids=tokens, use_cache=False)
    name, maker = cache_argument(model), cache_maker(model, len(tokens), context)
    fresh = maker(lambda words, **more: model(input_ids=words, **more))

    def prepared() -> Callable[[], Any]:
        cache = fresh()
        return lambda: model(input_ids=tokens, use_cache=True, **{name: cache})

    return prepared


@torch.no_grad()
def seconds(
    models: list[PreTrainedModel], tokens: torch.Tensor, context: int, rounds: int
) -> list[list[float]]:
    """Of a forward call of each in every round; they take turns, there and back."""
    found: list[list[float]] = [[] for _ in models]
    callers = [caller(model, tokens, context) for model in models]
    for turn in range(rounds + 1):
        order = range(len(models)) if turn % 2 else reversed(range(len(models)))
        for number in order:
            call = callers[number]()
            started = time.perf_counter()
            call()
            if tokens.is_cuda:
                torch.cuda.synchronize()
            if turn:
                found[number].append(time.perf_counter() - started)
    return found


def compared(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """Predicted and measured seconds of the dense model, and of one for each plan."""
    batch, length, context = (int(x or 0) for x in re.fullmatch(FORM, shape).groups())
    model = build(options.device, options.dtype, options.model)
    sizes = {"batch": batch, "length": length, "context": context}
    table = cfsp.latency_table(model, **sizes, units=options.units, again=True, progress=False)
    plain = cfsp.Recipe(scorer="cfsp", allocator="uniform", units=options.units)
    asked = [
        f"latency={fraction}@{shape}" for fraction in filter(None, options.fractions.split(","))
    ]
    cut = [pruned(model, dataclasses.replace(plain, budget=budget), table) for budget in asked]
    names = [*asked, *(f"mixed {seed}" for seed in range(options.mixed))]
    cut += [pruned(model, plain, table, seed) for seed in range(options.mixed)]
    tokens = torch.randint(0, model.config.vocab_size, (batch, length), device=options.device)
    models = [model, *(left for left, _ in cut)]
    dense, *measured = seconds(models, tokens, context, options.rounds)
    found: dict[str, Any] = {
        "table": table.to_dict(),
        "dense": {"predicted": table.dense_seconds, "measured": median(dense)},
        "budgets": {},
    }
    clock = median(dense)
    print(
        f"{shape}, dense: predicted {table.dense_seconds * 1e3:.2f} ms, measured {clock * 1e3:.2f}"
    )
    for name, (_, predicted), own in zip(names, cut, measured, strict=True):
        wanted = predicted / table.dense_seconds
        if name in asked:
            wanted = 1 - float(name.partition("@")[0].removeprefix("latency="))
        row = {"wanted": wanted, "predicted": predicted, "measured": median(own)}
        pairs = zip(own, dense, strict=True)  # of one round, so that drift cancels out
        row["measured_fraction"] = median(mine / theirs for mine, theirs in pairs)
        row["off_request"] = row["measured_fraction"] / wanted - 1
        found["budgets"][name] = row
        print(
            f"{name}: wanted {wanted:.1%} of dense, measured {row['measured_fraction']:.1%} "
            f"({row['off_request']:+.1%}); predicted {predicted * 1e3:.2f} ms, measured "
            f"{row['measured'] * 1e3:.2f} ({row['measured'] / predicted - 1:+.1%})",
            flush=True,
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per budget; write all of it; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jobs.latency", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--fractions", default="0.1,0.25,0.4")
    parser.add_argument("--model", type=Path, help="folder of a config; default: a small Llama")
    parser.add_argument("--units", default="channels")
    parser.add_argument("--mixed", type=int, default=0, help="plans of random numbers of units")
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
