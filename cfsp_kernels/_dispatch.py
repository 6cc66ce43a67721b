"""Choose an op's implementation: argument, then ``$CFSP_BACKEND``, then the tensor's device."""

import os
from typing import Literal

import torch

Backend = Literal["torch", "triton"]
BACKENDS: tuple[Backend, ...] = ("torch", "triton")


def use_triton(op: str, x: torch.Tensor, backend: str | None) -> bool:
    """Whether ``op`` on ``x`` runs as a Triton kernel.

    Raises:
        ValueError: the backend's name is unknown.
        RuntimeError: Triton was asked for where it cannot run.
    """
    requested = backend or os.environ.get("CFSP_BACKEND") or None
    if requested is not None and requested not in BACKENDS:
        source = "backend" if backend else "CFSP_BACKEND"
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {requested!r}")
    if requested == "triton":
        raise RuntimeError(f"{op} has no triton kernel in this version; use backend='torch'")
    return False
