"""Kernel tests run on a GPU where there is one, else under Triton's interpreter on the CPU.

``TRITON_INTERPRET`` counts when Triton is first imported. ``tests/conftest.py`` sets it before
anything else is imported; here it is set once more, for these tests on their own. Under it
everything but Triton kernels works as ever, torch.compile for the CPU included, so tests elsewhere
are not affected.
"""

import os
import sys
from collections.abc import Iterator

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "set TRITON_INTERPRET=1: triton is imported before the kernel tests"
        )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """OpenMP's waiting costs more than its threads give on a shared machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    from cfsp_kernels._triton import triton_installed

    if request.param == "triton" and not triton_installed():
        pytest.skip("triton is not installed (there is none for this system)")
    return request.param


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Uninitialised floats start as NaN, so that an element no kernel wrote can't go unnoticed.

    PyTorch does so itself in its deterministic mode (torch.empty, empty_like, new_empty and all).
    """
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    if not torch.empty(1).isnan():
        pytest.fail("torch.empty is not filled: torch.utils.deterministic changed")
    yield
    torch.set_deterministic_debug_mode(mode)
