"""The output of a job of one or several processes: claimed before anything else is done."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from ..distributed import Ranks
from ..errors import CfspError
from ..io.outputs import staged, write_errors


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
