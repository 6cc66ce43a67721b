"""Tasks of the lm-evaluation-harness on a model in memory; needs the extra ``eval``."""

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from ..errors import CfspError
from ..models.opening import OpenModel

TASK_ERRORS = (OSError, ValueError, LookupError, ImportError, TypeError)
"""What a task file or a dataset that cannot be had raises."""


def find_tasks(
    tasks: Sequence[str], folder: str | Path | None = None, *, progress: bool = True
) -> Any:
    """The harness's index of tasks, which takes some seconds, once these tasks or groups have been
    loaded from it, or the user's ``folder``, with their data; CfspError where one cannot be."""
    if folder is not None and not Path(folder).is_dir():
        raise CfspError(f"no such folder of tasks: {folder}")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise CfspError("tasks need the lm-evaluation-harness: pip install 'cfsp[eval]'") from None
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=str(folder) if folder is not None else None)
    for task in tasks:
        if task not in index.all_tasks:
            raise CfspError(f"unknown task {task!r}; `lm_eval ls tasks` lists them")
    for task in tasks:
        try:
            with _stderr(progress):
                index.load([task])
        except TASK_ERRORS as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise CfspError(f"cannot load task {task!r}: {why}") from None
    return index


def run_tasks(
    opened: OpenModel,
    tasks: Sequence[str],
    index: Any,
    *,
    limit: int | None = None,
    batch: int = 1,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Scores of a model by task and metric, such as ``acc``, ``acc_stderr`` for its standard error,
    or ``exact_match (strict-match)`` for a metric of a filter; ``index`` is of :func:`find_tasks`,
    and ``progress`` lets the harness write to stderr."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _stderr(progress):
        parts = {"pretrained": opened.model, "tokenizer": opened.tokenizer}
        model = HFLM(**parts, backend="causal", batch_size=batch)
        options = {"tasks": list(tasks), "task_manager": index, "limit": limit}
        found = simple_evaluate(model=model, **options, log_samples=False)
    return {task: _metrics(values) for task, values in found["results"].items()}


def _stderr(shown: bool) -> AbstractContextManager[object]:
    """The harness cannot switch off its bars: where they are not shown, all of stderr is hidden."""
    return nullcontext() if shown else redirect_stderr(io.StringIO())


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """``{"acc,none": 0.5}`` -> ``{"acc": 0.5}``."""
    named = ((*name.split(",", 1), value) for name, value in values.items() if "," in name)
    return {
        metric if of == "none" else f"{metric} ({of})": float(value)
        for metric, of, value in named
        if isinstance(value, int | float)
    }
