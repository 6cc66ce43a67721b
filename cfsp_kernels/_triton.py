"""Triton kernels that are imported and compiled when first launched.

Importing this package leaves Triton alone: a machine without it has the torch backend, and
``TRITON_INTERPRET=1``, which must be set before Triton is first imported, can still be set.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton.language as tl
else:
    tl = None  # a kernel binds it to triton.language in its own module when it is first used

__all__ = ["Kernel", "ceil_div", "interpreted", "next_power_of_2", "tl", "triton_installed"]


class Kernel:
    """A function in Triton's language; a decorator like ``triton.jit``, but lazy.

    Its module has ``from __future__ import annotations``, so that defining the function
    evaluates no ``tl.constexpr``. ``no_type_check`` under the decorator: Triton's types are its
    own.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

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
        return triton.jit(self.function)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        # Multiply-adds are fused on every version of Triton, whose default is to change.
        return functools.partial(self.jitted[grid], enable_fp_fusion=True)


def triton_installed() -> bool:
    """Whether Triton can be imported. Looks for it without importing it."""
    return importlib.util.find_spec("triton") is not None


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
