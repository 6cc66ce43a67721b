"""Tasks of the lm-evaluation-harness on a model in memory; needs the extra ``eval``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import CfspError
from .models import OpenModel


def require_harness() -> Any:
    """The module ``lm_eval``.

    Raises:
        CfspError: it is not installed; says how to.
    """
    try:
        import lm_eval
    except ImportError:
        raise CfspError("tasks need the lm-evaluation-harness: pip install 'cfsp[eval]'") from None
    return lm_eval


def check_tasks(tasks: Sequence[str], folder: str | Path | None = None) -> None:
    """Raise CfspError for a task that neither the harness nor ``folder`` has."""
    if folder is not None and not Path(folder).is_dir():
        raise CfspError(f"no such folder of tasks: {folder}")
    known = _manager(folder).all_tasks
    for task in tasks:
        if task not in known:
            raise CfspError(f"unknown task {task!r}; `lm_eval ls tasks` lists them")


def _manager(folder: str | Path | None) -> Any:
    require_harness()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder) if folder is not None else None)


def run_tasks(
    opened: OpenModel,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    batch: int = 1,
) -> dict[str, dict[str, float]]:
    """Scores of a model in tasks, by task and metric.

    Args:
        opened: a causal LM with its tokenizer, where it is.
        tasks: names of tasks or groups.
        folder: of task files of one's own.
        limit: only the first examples of each task.
        batch: examples at a time.

    Returns:
        Of every task its metrics, such as ``acc``; a standard error is ``acc_stderr``, a metric of
        a filter ``exact_match (strict-match)``.

    Raises:
        CfspError: the harness is not installed.
    """
    harness = require_harness()
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=batch)
    found = harness.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=_manager(folder), limit=limit
    )
    return {task: _metrics(values) for task, values in found["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """``{"acc,none": 0.5}`` -> ``{"acc": 0.5}``."""
    metrics = {}
    for name, value in values.items():
        metric, _, of = name.partition(",")
        if of and isinstance(value, int | float):
            metrics[metric if of == "none" else f"{metric} ({of})"] = float(value)
    return metrics
