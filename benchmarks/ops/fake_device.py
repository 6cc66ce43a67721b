"""Triton's JIT as on a GPU, on a machine without one: all of it but loading and launching.

    with fake_device("sm_90") as device:
        cfsp_kernels.channel_statistics(torch.zeros(300, 128))  # CPU tensors stand in for GPU ones
    print(device.variants)

``JITFunction.run`` binds, specialises, compiles down to machine code and caches as on the target,
with the target's launch configurations. Launches do nothing: results are what memory held.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from cfsp_kernels import _configs, _dispatch, _triton

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Target -> bytes of shared memory that a program may use there."""
BEFORE_ARGUMENTS = 9
"""What Triton passes to a launcher before a kernel's own arguments: grid, stream and so on."""
OnLaunch = Callable[[ASTSource, tuple[Any, ...]], None]
"""Called with a variant of a kernel and the arguments that it is launched with."""


class FakeDriver:
    """What Triton asks of a driver, answered for ``target``."""

    def __init__(self, target: str, on_launch: OnLaunch | None = None) -> None:
        self.target = target
        self.on_launch = on_launch
        self.variants: list[ASTSource] = []
        """Every specialisation of every kernel that was launched, in order of its first launch."""

    @property
    def utils(self) -> "FakeDriver":
        return self

    def get_current_target(self) -> GPUTarget:
        if self.target.startswith("sm_"):
            return GPUTarget("cuda", int(self.target.removeprefix("sm_")), 32)
        return GPUTarget("hip", self.target, 64 if self.target.startswith("gfx9") else 32)

    def get_current_device(self) -> str:
        return self.target  # Triton's caches are by device: one for every target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT[device]}

    def load_binary(self, *binary: Any) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads at most

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: ASTSource, metadata: Any) -> Any:
        """Called once for every variant, when it is first launched."""
        self.variants.append(source)
        if self.on_launch is None:
            return lambda *arguments: None
        return lambda *arguments: self.on_launch(source, arguments[BEFORE_ARGUMENTS:])

    def forget(self) -> None:
        """Drop what was compiled, while there is a driver to unload it."""
        for variant in self.variants:
            variant.fn.device_caches.pop(self.target, None)


@contextlib.contextmanager
def fake_device(target: str = "sm_90", on_launch: OnLaunch | None = None) -> Iterator[FakeDriver]:
    """Within it the ops take tensors on the CPU for tensors on a ``target``.

    Raises:
        RuntimeError: kernels are interpreted in this process.
    """
    if _triton.interpreted():
        raise RuntimeError("a fake device compiles: start without TRITON_INTERPRET")
    device = FakeDriver(target, on_launch)

    def architecture(device: torch.device) -> str:  # a plain function: a mock takes microseconds
        return target

    def interpreted() -> bool:  # asked by the dispatch, on a CPU; kernels ask _triton itself
        return True

    with (
        mock.patch.object(driver, "_active", device),
        mock.patch.object(torch.version, "hip", "fake" if target.startswith("gfx") else None),
        mock.patch.object(_configs, "architecture", architecture),
        mock.patch.object(_dispatch, "interpreted", interpreted),
        mock.patch.dict(os.environ, CFSP_BACKEND="triton"),
        mock.patch.dict(getattr(_triton, "LAUNCHED", {}), clear=True),
    ):
        try:
            yield device
        finally:
            device.forget()
