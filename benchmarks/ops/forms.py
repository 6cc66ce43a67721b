"""Which forms of gram can be launched here."""

import os

import torch

from cfsp_kernels.gram import FORMS

from ..common.timing import ON_GPU


def forms(dtype: torch.dtype) -> list[str]:
    """Names of :data:`cfsp_kernels.gram.FORMS`; that for TMA last, lest the others wait for it.

    That one takes 16-bit inputs on sm_90 and later, and whatever the interpreter is given. The
    libraries of CPUs have no fp32 product of 16-bit factors, which the panels are made of.
    """
    wide = dtype == torch.float32
    has_tma = ON_GPU and not torch.version.hip and torch.cuda.get_device_capability() >= (9, 0)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    runs = {"tma": interpreted or (has_tma and not wide), "panels": ON_GPU or wide}
    return [form for form in sorted(FORMS, key=lambda form: form == "tma") if runs.get(form, True)]
