"""The command line of ``cfsp evaluate``: models side by side."""

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from ..calibration.text import BOS_CHOICES
from ..calibration.windows import Calibration
from ..distributed import Ranks
from ..errors import CfspError
from ..evaluation.quality import evaluation_windows, perplexity
from ..evaluation.speed import Generation, PeakMemory, measure_speed, random_prompts, time_round
from ..evaluation.tasks import find_tasks, run_tasks
from ..models.loading import check_seqlen, pick_device
from ..models.opening import OpenModel, open_model
from ..pruning.recipe import DTYPES
from ..report.tables import evaluation_table
from .options import print_json


def add_evaluate(commands: Any) -> argparse.ArgumentParser:
    """``cfsp evaluate``; returns its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "evaluate", help="perplexity, speed and tasks of models, side by side"
    )
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="hub id, local folder or .gguf file"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument("--dtype", default="auto", metavar="|".join(DTYPES))
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    text = parser.add_argument_group("perplexity")
    text.add_argument("--dataset", default="wikitext2", help="(default: %(default)s)")
    text.add_argument("--seqlen", type=int, default=1024, help="(default: %(default)s)")
    text.add_argument("--windows", type=int, help="only the first N; 0: none (default: all)")
    text.add_argument("--bos", default="auto", metavar="|".join(BOS_CHOICES))
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--speed",
        action="store_true",
        help="time prefill and decode, the models taking turns; holds all of them in memory",
    )
    for name, value in vars(Generation()).items():
        option = f"--{name.replace('_', '-')}"
        speed.add_argument(option, type=int, default=value, help="(default: %(default)s)")
    tasks = parser.add_argument_group("tasks of the lm-evaluation-harness, extra `eval`")
    tasks.add_argument("--tasks", metavar="NAME,NAME", help="tasks or groups")
    tasks.add_argument("--task-path", metavar="DIR", help="folder of task files of your own")
    tasks.add_argument("--limit", type=int, help="only the first N examples of each")
    parser.set_defaults(run=evaluate, shared=True)
    return parser


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure every model, then print all beside each other."""
    ranks: Ranks = arguments.group
    generation = Generation(**{name: getattr(arguments, name) for name in vars(Generation())})
    tasks = [name for name in (arguments.tasks or "").split(",") if name]
    if ranks.size > 1 and (arguments.speed or tasks):
        raise CfspError("--speed and --tasks are for one process; start it without torchrun")
    if arguments.windows == 0 and not arguments.speed and not tasks:
        raise CfspError("nothing to measure: --windows 0 leaves out the perplexity")
    if arguments.limit is not None and arguments.limit < 1:
        raise CfspError(f"limit must be 1 or more, got {arguments.limit}")
    progress = not arguments.quiet
    index = find_tasks(tasks, arguments.task_path, progress=progress) if tasks else None
    kept: list[OpenModel] = []
    found: list[dict[str, Any]] = []
    peaks: list[int | None] = []
    for name in arguments.models:
        memory = PeakMemory(pick_device(ranks.device(arguments.device)))
        opened = open_model(name, arguments.dtype, ranks.device(arguments.device))
        values = {"model": name, "parameters": opened.model.num_parameters()}
        if arguments.speed:
            random_prompts(opened.model, generation)
            memory.restart()
            time_round(opened.model, generation)
            peaks.append(memory.measure())
            kept.append(opened)
        if arguments.windows != 0:
            values |= _perplexity(arguments, opened)
        if tasks:
            values["tasks"] = run_tasks(
                opened,
                tasks,
                index,
                limit=arguments.limit,
                batch=generation.batch,
                progress=progress,
            )
        found.append(values)
        del opened
    speeds = measure_speed([o.model for o in kept], generation, peak_memory=peaks) if kept else []
    for values, speed in zip(found, speeds, strict=False):
        values["speed"] = speed.to_dict()
    if ranks.first:
        _print(arguments, found)


def _perplexity(arguments: argparse.Namespace, opened: OpenModel) -> dict[str, Any]:
    ranks: Ranks = arguments.group
    settings = Calibration(seqlen=arguments.seqlen, bos=arguments.bos)
    check_seqlen(opened.model, settings.seqlen)
    windows = evaluation_windows(
        opened.tokenizer, arguments.dataset, settings.seqlen, arguments.windows, settings.bos
    )
    return perplexity(
        opened.model,
        windows,
        dataset=arguments.dataset,
        progress=ranks.first and not arguments.quiet,
        ranks=ranks,
    ).to_dict()


def _print(arguments: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    """One JSON object, a line for the perplexity of one model, or a table."""
    first = found[0]
    if print_json(arguments, first if len(found) == 1 else {"models": found}):
        return
    if len(found) == 1 and not {"speed", "tasks"} & first.keys() and "perplexity" in first:
        print(
            f"perplexity {first['perplexity']:.4f} over {first['windows']} windows of "
            f"{first['seqlen']} ({first['tokens']:,} predicted tokens, {first['seconds']:.1f} s)"
        )
    else:
        Console().print(_table(found))


def _table(found: list[dict[str, Any]]) -> Table:
    """A row for every measure, a column for every model; speeds with their ratio to the first."""
    shown = evaluation_table(found, ())
    table = Table()
    table.add_column("")
    for label in shown["labels"]:
        table.add_column(label, justify="right", overflow="fold")
    for measure in shown["measures"]:
        table.add_row(measure["title"], *measure["texts"])
    return table
