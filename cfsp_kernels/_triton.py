"""Triton kernels that are imported and compiled when first launched.

Importing this package leaves Triton alone: a machine without it has the torch backend, and
``TRITON_INTERPRET=1``, which must be set before Triton is first imported, can still be set.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import triton.language as tl
else:
    tl = None  # a kernel binds it to triton.language in its own module when it is first used

__all__ = ["Kernel", "ceil_div", "interpreted", "next_power_of_2", "tl", "triton_installed"]

COUNTS = ("tokens", "rows", "partials", "segments")
"""Arguments that differ from call to call. Triton would compile a kernel again where one is 1 or a
multiple of 16 for the first time, in the middle of a calibration, and gain nothing."""

LAUNCHED: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}
"""What was compiled for a kernel, device and kinds of arguments that were launched before, and the
constants to hand it."""


class Kernel:
    """A function in Triton's language; a decorator like ``triton.jit``, but lazy.

    Its module has ``from __future__ import annotations``, so that defining the function
    evaluates no ``tl.constexpr``. ``no_type_check`` under the decorator: Triton's types are its
    own.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        parameters = inspect.signature(function).parameters
        self.constants = [n for n, p in parameters.items() if p.annotation == "tl.constexpr"]
        names = [name for name in parameters if name not in self.constants]
        self.pointers = sum(name.endswith("_ptr") for name in names)
        self.counts = [i for i, name in enumerate(names) if name in COUNTS]
        self.sizes = [i for i in range(self.pointers, len(names)) if i not in self.counts]

    @functools.cached_property
    def jitted(self) -> Any:
        """The kernel as ``triton.jit`` returns it."""
        import triton
        import triton.language

        scope = self.function.__globals__
        scope["tl"] = triton.language
        for name in self.function.__code__.co_names:  # device functions that it calls
            if isinstance(scope.get(name), Kernel):
                scope[name] = scope[name].jitted
        self.function.__annotations__ = inspect.get_annotations(self.function, eval_str=True)
        return triton.jit(self.function, do_not_specialize=self.counts)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        """What launches that many programs. It takes tensors and integers by position, constants
        and options by name."""
        return functools.partial(self._launch, grid[0])

    def _launch(self, programs: int, *arguments: Any, **constants: Any) -> None:
        # Triton's own way from here to the driver asks anew, on each launch, for all that decides
        # what to compile; that takes as long as everything around it. This key tells apart at least
        # what Triton does: pointers by dtype and alignment, integers by value.
        tensors = arguments[: self.pointers]
        key: tuple[Any, ...] = (
            self,
            tensors[0].device,
            *[tensor.dtype for tensor in tensors],
            *[tensor.data_ptr() % 16 for tensor in tensors],
            *[arguments[i] for i in self.sizes],
            *[arguments[i] >> 31 for i in self.counts],
            *constants,
            *constants.values(),
        )
        if torch.version.hip:  # offsets have 32 bits where a tensor's memory allows it
            key += tuple(tensor.untyped_storage().nbytes() >> 31 for tensor in tensors)
        known = LAUNCHED.get(key)
        if known is None:
            compiled = self.run(programs, *arguments, **constants)
            if compiled is not None:  # as it is under the interpreter
                LAUNCHED[key] = compiled, [constants[name] for name in self.constants]
        else:
            compiled, rest = known
            compiled[programs, 1, 1](*arguments, *rest)

    def run(self, programs: int, *arguments: Any, **constants: Any) -> Any:
        """Launch by Triton's own way, which takes tensor descriptors as well; what it compiled."""
        # Multiply-adds are fused on every version of Triton, whose default is to change.
        return self.jitted.run(
            *arguments, grid=(programs,), warmup=False, enable_fp_fusion=True, **constants
        )


INSTALLED = importlib.util.find_spec("triton") is not None  # not asked where a compiler looks on


def triton_installed() -> bool:
    """Whether Triton can be imported. It was looked for without importing it."""
    return INSTALLED


@functools.cache
def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on any device.

    Asked of Triton itself: the variable counts when Triton is imported, not after.
    """
    import triton.language

    return not isinstance(triton.language.zeros, triton.runtime.JITFunction)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least ``n``; 1 for 0."""
    return 1 << max(0, n - 1).bit_length()
