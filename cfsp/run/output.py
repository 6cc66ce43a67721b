"""The output of a job of one or several processes: claimed before anything else is done."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from ..calibration.mixtures import dataset_paths
from ..distributed import Ranks
from ..errors import CfspError
from ..io.outputs import new_folder, staged, write_errors

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


@contextmanager
def shared_output(out: Path, output: AbstractContextManager[Path], ranks: Ranks) -> Iterator[Path]:
    """``output``, of :mod:`cfsp.io.outputs`, which the first rank makes for all; what it cannot
    make it refuses on all."""
    with write_errors(out), ExitStack() as stack:
        problem = None
        if ranks.first:
            try:
                stack.enter_context(output)
            except CfspError as error:
                problem = str(error)
        ranks.check(problem)
        yield staged(out)
    ranks.barrier()


def into_new_folder(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """A function with the parameters of :func:`cfsp.prune`: its ``out``, if any, is claimed before
    it does anything, and published once it has returned."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def claiming(*args: Parameters.args, **options: Parameters.kwargs) -> Returned:
        given = signature.bind(*args, **options)
        given.apply_defaults()
        value = given.arguments
        if value["out"] is None:
            return function(*args, **options)
        out, texts = (
            Path(value["out"]),
            (value["recipe"].calibration.dataset, value["eval_dataset"]),
        )
        inputs = [value[name] for name in ("model", "statistics", "latency_table")]
        folder = new_folder(
            out, value["overwrite"], value["resume"], [*inputs, *dataset_paths(*texts)]
        )
        with shared_output(out, folder, value["ranks"]):
            return function(*args, **options)

    return claiming
