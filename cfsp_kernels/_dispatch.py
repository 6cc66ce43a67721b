"""Choose an op's implementation: argument, then ``$CFSP_BACKEND``, then the tensor's device."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ._triton import interpreted, triton_installed

Backend = Literal["torch", "triton"]
BACKENDS: tuple[Backend, ...] = ("torch", "triton")


def use_triton(op: str, x: torch.Tensor, backend: str | None) -> bool:
    """Whether ``op`` on ``x`` runs as a Triton kernel.

    By default a tensor on a GPU does where Triton is installed (it is not on Windows), and any
    other tensor runs in torch. "triton" is an order: it runs or it is an error.

    Raises:
        ValueError: the backend's name is unknown.
        RuntimeError: Triton was asked for where it cannot run.
    """
    source = "backend" if backend else "CFSP_BACKEND"
    requested = backend or os.environ.get("CFSP_BACKEND") or None
    if requested is not None and requested not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {requested!r}")
    if requested == "torch":
        return False
    if requested is None:
        return x.is_cuda and triton_installed()
    if not triton_installed():
        raise RuntimeError(f"{op}: {source}='triton' but triton is not installed")
    if not x.is_cuda and not interpreted():
        raise RuntimeError(
            f"{op}: {source}='triton' needs a tensor on a GPU, got one on {x.device}; its "
            "interpreter runs on the CPU, with TRITON_INTERPRET=1 set before triton is imported"
        )
    return True


def is_concrete(x: torch.Tensor) -> bool:
    """Whether ``x`` has memory to look at, and nobody traces or intercepts what is done with it."""
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not is_in_torch_dispatch_mode()
    )


def kernel_op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Decorate a function that a compiler cannot look into, its first argument a tensor.

    It is registered as the custom op ``cfsp::name``, for torch.compile, fakes and dispatch modes.
    Eager calls go straight to the function: the dispatcher would take longer than all the rest.
    """

    def decorate(launch: Callable[..., Any]) -> Any:
        registered = torch.library.custom_op(f"cfsp::{name}", launch, mutates_args=mutates_args)
        names = list(inspect.signature(launch).parameters)
        mutated = [names.index(argument) for argument in mutates_args]

        @functools.wraps(launch)
        def call(*arguments: Any) -> Any:
            if not is_concrete(arguments[0]):
                return registered(*arguments)
            result = launch(*arguments)
            for place in mutated:  # a kernel writes unseen by autograd
                increment_version(arguments[place])
            return result

        call.register_fake = registered.register_fake  # type: ignore[attr-defined]
        return call

    return decorate
