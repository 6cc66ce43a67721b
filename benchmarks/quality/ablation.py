"""Prune one model by many recipes, and measure each on text of two domains.

``python -m benchmarks.quality.ablation MODEL --calibration FILE --in-domain FILE
--json RESULT.json``

A cell is a recipe (scorer, allocator, compensation and whatever else it says) at a budget. The
second pass over a calibration text, with the Gram matrices of all blocks, is kept in memory and
serves all its cells. A cell is planned, cut out of a copy of the model in memory, and its
perplexity is measured on consecutive windows of both texts. The JSON is written anew, whole, after
every cell; a rerun goes on with the cells that it lacks, and refuses where model or texts are
others. A cell that cannot be pruned is kept with its message. ``python -m
benchmarks.quality.ablation_report`` makes the tables and the picture, and so does this command at
its end.
"""

import argparse
import copy
import gc
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

import cfsp
from cfsp import Calibration, CfspError, PruningPlan, Recipe, Statistics
from cfsp.calibration.collect import DensePass
from cfsp.calibration.statistics import BlockStatistics
from cfsp.calibration.text import EVALUATE, SEPARATORS, load_text
from cfsp.calibration.tokens import BOS_CHOICES, bos_token, consecutive_windows, tokenize
from cfsp.calibration.windows import calibration_windows
from cfsp.costs.footprint import footprints
from cfsp.distributed import ALONE
from cfsp.io.files import write_json
from cfsp.models.blockwise import default_micro_batch
from cfsp.models.fingerprints import tokens_fingerprint
from cfsp.models.loading import check_seqlen, model_device, quiet_loading
from cfsp.models.opening import OpenModel, open_any
from cfsp.pruning.compaction import prune_model_
from cfsp.pruning.compensation import FitRecord
from cfsp.pruning.recipe import DTYPES, recipe_from_dict
from cfsp.pruning.refit import Refitting
from cfsp.pruning.second_pass import SecondPass
from cfsp.run.job import Run

from ..common import environment
from . import ablation_report
from .ablation_grid import BUDGETS, RECIPES, calibration_kind, grid, public, read_recipes

TOPICS = "builtin-topics"
DOMAINS = ("in_domain", "out_of_domain")
SECOND_PASS = "second pass"
"""Whose seconds they are, beside those of first passes by :func:`calibration_kind`."""
T = TypeVar("T")


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What a call gives, and its wall seconds, those of the GPU included."""
    start = time.perf_counter()
    value = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return value, time.perf_counter() - start


def read_text(name: str) -> str:
    """All of ``pydoc_data.topics`` in sorted order for :data:`TOPICS`, else as cfsp evaluates."""
    if name != TOPICS:
        return load_text(name, EVALUATE)
    from pydoc_data.topics import topics

    return SEPARATORS[EVALUATE].join(topics[topic] for topic in sorted(topics))


def text_windows(opened: OpenModel, options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Domain -> the first windows [N, S] of its text."""
    check_seqlen(opened.model, options.seqlen)
    bos = bos_token(opened.tokenizer, options.bos)
    found = {}
    for domain in DOMAINS:
        tokens = tokenize(opened.tokenizer, read_text(getattr(options, domain)))
        count = getattr(options, f"{domain}_windows")
        found[domain] = consecutive_windows(tokens, options.seqlen, count, bos)
    return found


def perplexities(model: Any, texts: dict[str, torch.Tensor]) -> dict[str, Any]:
    """On the texts of both domains, and the seconds that took."""
    found: dict[str, Any] = {"evaluation_seconds": 0.0}
    for domain, windows in texts.items():
        measured = cfsp.perplexity(model, windows, progress=False)
        found[domain] = measured.perplexity
        found["evaluation_seconds"] += measured.seconds
    return found


class Results:
    """The JSON of an ablation, whole after every addition.

    Raises:
        CfspError: there is one of another model or other texts, or it cannot be written.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path = path
        self.values: dict[str, Any] = {
            "asked": asked,
            "dense": None,
            "calibrations": {},
            "cells": [],
            "environments": {},
        }
        if path.exists():
            self.values = ablation_report.load(path)
            for key, value in asked.items():
                if self.values["asked"][key] != value:
                    raise CfspError(f"{path} has results of another {key}; choose another --json")
        described = {**environment.describe(), "sources": environment.sources_digest("cfsp")}
        text = json.dumps(described, sort_keys=True)
        self.environment = hashlib.sha256(text.encode()).hexdigest()[:8]
        self.values["environments"][self.environment] = described

    def _now(self) -> dict[str, str]:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return {"environment": self.environment, "date": date}

    def save(self) -> None:
        """Write all, whole or not at all."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.values)
        except OSError as error:
            raise CfspError(f"cannot write {self.path}: {error}") from None

    def cell(self, recipe: Recipe, tokens: str) -> dict[str, Any] | None:
        """What is known of a recipe on these calibration tokens."""
        wanted = recipe_from_dict(public(recipe))
        for cell in self.values["cells"]:
            try:
                same = recipe_from_dict(cell["recipe"]) == wanted
            except CfspError:  # of a version whose recipes had other keys
                continue
            if same and cell["calibration"] == tokens:
                return cell
        return None

    def add(self, cell: dict[str, Any], instead_of: dict[str, Any] | None = None) -> None:
        """Add a cell and write."""
        cells = [known for known in self.values["cells"] if known is not instead_of]
        self.values["cells"] = [*cells, {**cell, **self._now()}]
        self.save()


class Passes:
    """What the two passes over one calibration text give, each made when a cell first asks.

    Their seconds are kept with the results. The second is kept in memory whole, so that it serves
    all cells: the Gram matrices of all blocks.
    """

    def __init__(self, opened: OpenModel, settings: Calibration, seconds: dict[str, float]) -> None:
        self.opened, self.layout, self.seconds = opened, opened.layout, seconds
        self.windows = calibration_windows(opened.model, opened.tokenizer, settings)
        self.micro_batch = default_micro_batch(model_device(opened.model), settings.seqlen)
        self._statistics: dict[str, Statistics] = {}
        self._blocks: list[BlockStatistics] = []

    def statistics(self, recipe: Recipe) -> Statistics:
        """Of the first pass for a recipe."""
        kind = calibration_kind(recipe)
        if kind not in self._statistics:
            run = Run(
                opened=self.opened,
                recipe=recipe,
                windows=self.windows,
                first_windows=recipe.statistics_windows,
                micro_batch=self.micro_batch,
                progress=False,
                ranks=ALONE,
            )
            self._statistics[kind], self.seconds[kind] = timed(run.calibrated)
        return self._statistics[kind]

    def run(self, number: int) -> BlockStatistics:
        """What the second pass shows of a block: as :meth:`DensePass.run`."""
        if not self._blocks:
            dense = DensePass(self.opened.model, self.layout, self.windows, gram=True)
            self._blocks, self.seconds[SECOND_PASS] = timed(
                lambda: [dense.run(number) for number in range(len(dense.blocks))]
            )
        return self._blocks[number]


def measured(
    opened: OpenModel, recipe: Recipe, passes: Passes, texts: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Plan, cut a copy of the model, measure it.

    Raises:
        CfspError: the recipe cannot be followed on this model.
    """
    statistics = passes.statistics(recipe)
    plan, plan_seconds = timed(
        lambda: cfsp.plan(statistics, opened.model, recipe, opened.tokenizer)
    )
    model = copy.deepcopy(opened.model)
    cut, fits, cut_seconds = _cut(model, opened, plan, statistics, passes)
    refits = cut.refitting.refits if cut.refitting is not None else []
    applied = [fit.applied for block in fits for fit in block]
    return {
        "plan_seconds": plan_seconds,
        "cut_seconds": cut_seconds,
        **perplexities(model, texts),
        "sparsity": plan.sparsity,
        "widths": list(plan.widths),
        **({"groups": [block.counts[-1] for block in plan.blocks]} if plan.groups else {}),
        "sizes": footprints(opened.described, plan).to_dict(),
        "fits": {"applied": sum(applied), "of": len(applied)},
        "refits": {"kept": sum(r.kept > 0 for r in refits), "of": len(refits)},
    }


def _cut(
    model: PreTrainedModel,
    opened: OpenModel,
    plan: PruningPlan,
    statistics: Statistics,
    passes: Passes,
) -> tuple[SecondPass, Sequence[tuple[FitRecord, ...]], float]:
    """Cut a copy of the model: what it was cut by, what came of fits, and the seconds, those of
    the second pass included."""
    recipe, dense, refitting = plan.recipe, None, None
    if recipe.fits:
        passes.run(0)
        dense = passes
    if recipe.refits:  # its windows go through the dense blocks beside the pruned ones
        dense = DensePass(model, opened.layout, passes.windows, gram=recipe.fits)
        refitting = Refitting(model, dense, recipe)
    cut = SecondPass(plan, statistics, dense, refitting, selects=recipe.selects_again)
    fits, seconds = timed(
        lambda: prune_model_(model, opened.layout, recipe, cut.turn, cut.visits, progress=False)
    )
    known = passes.seconds[SECOND_PASS] if dense is passes else 0.0
    return cut, fits, seconds + known


def run(opened: OpenModel, recipes: Sequence[Recipe], options: argparse.Namespace) -> Results:
    """Measure what is not measured yet; results as they are kept.

    Raises:
        CfspError: bad input; what a single recipe cannot do is kept with its cell.
    """
    texts = text_windows(opened, options)
    asked = {
        "model": opened.name,
        "model_fingerprint": opened.blocks.fingerprint(),
        "dtype": str(opened.model.dtype).removeprefix("torch."),
        **{
            domain: {
                "text": Path(getattr(options, domain)).name,
                "windows": len(windows),
                "seqlen": options.seqlen,
                "tokens": tokens_fingerprint(windows),
            }
            for domain, windows in texts.items()
        },
    }
    fingerprints = {
        settings: tokens_fingerprint(calibration_windows(opened.model, opened.tokenizer, settings))
        for settings in dict.fromkeys(recipe.calibration for recipe in recipes)
    }
    results = Results(options.json, asked)
    if results.values["dense"] is None:
        results.values["dense"] = perplexities(opened.model, texts)
        results.save()
    missing: dict[tuple[Calibration, bool], list[Recipe]] = {}
    for recipe in recipes:
        known = results.cell(recipe, fingerprints[recipe.calibration])
        if known is None or (options.retry and "error" in known):
            missing.setdefault((recipe.calibration, recipe.cuts_attention), []).append(recipe)
    for (settings, attention), wanted in missing.items():
        own = open_any(opened.model, opened.tokenizer, attention=attention)
        tokens = fingerprints[settings]
        record = results.values["calibrations"].setdefault(
            tokens, {**public(wanted[0])["calibration"], "seconds": {}}
        )
        passes = Passes(own, settings, record["seconds"])
        for recipe in wanted:
            cell = {"recipe": public(recipe), "calibration": tokens}
            try:
                cell.update(measured(own, recipe, passes, texts))
            except CfspError as error:
                cell["error"] = str(error)
            results.add(cell, instead_of=results.cell(recipe, tokens))
            print(ablation_report.line(cell), flush=True)
            gc.collect()  # a model has cycles
    return results


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.ablation", description=(__doc__ or "").split("\n")[0]
    )
    default = Calibration(samples=160)
    parser.add_argument("model", help="hub id, folder or .gguf file")
    parser.add_argument("--calibration", required=True, help="file or dataset to calibrate on")
    parser.add_argument("--in-domain", required=True, help="file or dataset, held out")
    parser.add_argument(
        "--out-of-domain",
        default=TOPICS,
        help=f"file or dataset of another domain; {TOPICS}: the text that ships with Python",
    )
    parser.add_argument("--in-domain-windows", type=int, default=32)
    parser.add_argument("--out-of-domain-windows", type=int, default=24)
    parser.add_argument("--recipes", type=Path, help="YAML list; default: the grid of the project")
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), help="0.3 or params=0.25")
    parser.add_argument("--samples", type=int, default=default.samples, help="of calibration")
    parser.add_argument("--seqlen", type=int, default=default.seqlen, help="of every window")
    parser.add_argument("--seed", type=int, default=default.seed, help="of calibration")
    parser.add_argument("--bos", choices=BOS_CHOICES, default=default.bos)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, required=True, help="the results, and where to go on")
    parser.add_argument("--retry", action="store_true", help="try cells that failed again")
    ablation_report.add_outputs(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        own = read_recipes(options.recipes) if options.recipes else RECIPES
        calibration = Calibration(
            options.calibration, options.samples, options.seqlen, options.seed, options.bos
        )
        recipes = grid(own, options.budgets, calibration, options.dtype)
        with quiet_loading():
            opened = cfsp.open_model(options.model, options.dtype, options.device)
        results = run(opened, recipes, options)
        ablation_report.write(results.values, options)
    except CfspError as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
