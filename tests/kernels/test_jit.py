"""Every kernel, compiled as every specialisation that Triton's JIT makes of it at a launch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cfsp_kernels._triton import triton_installed

pytestmark = [
    pytest.mark.skipif(not triton_installed(), reason="triton is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's compilers are for Linux"),
]
SWEEP = Path(__file__).with_name("jit_sweep.py")
ROOT = SWEEP.parents[2]


def run(*arguments: str, path: Path = SWEEP.parent) -> subprocess.CompletedProcess:
    """A process of its own, as this one may have the interpreter, with the checkout importable."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, SWEEP.parent, path))),
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_every_kernel_compiles_whatever_its_arguments_are():
    result = run(str(SWEEP))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


FAULTY = """
from __future__ import annotations

from typing import no_type_check

from cfsp_kernels._triton import Kernel, tl


@Kernel
@no_type_check
def faulty_kernel(x_ptr, x_stride, BLOCK: tl.constexpr):
    stride = x_stride.to(tl.int64)  # there is no such method of a Python int, which 1 is
    tl.store(x_ptr + tl.arange(0, BLOCK) * stride, 0.0)


@Kernel
@no_type_check
def sound_kernel(x_ptr, x_stride, BLOCK: tl.constexpr):
    stride = tl.cast(x_stride, tl.int64)
    tl.store(x_ptr + tl.arange(0, BLOCK) * stride, 0.0)
"""
PROGRAM = """
import functools
import torch
import faulty
from benchmarks.ops.fake_device import fake_device
from jit_sweep import FAR, check_fit, gaps, launch

values = torch.zeros(65)


def sweep(kernel, *strides, never={}):
    calls = [(x, stride) for x, stride in zip((values, values[1:], values, values), strides)]
    errors, seen = launch(
        (str(stride), functools.partial(kernel[(1,)], x, stride, BLOCK=16)) for x, stride in calls
    )
    print(len(errors), *sorted(gaps(seen, [kernel.function.__name__], never)), sep="; ")


sweep(faulty.faulty_kernel, 16, 3, FAR)
sweep(faulty.faulty_kernel, 16, 3, FAR, 1)
sweep(faulty.sound_kernel, 16, 3, FAR, 1)
sweep(faulty.sound_kernel, 16, 1, never={("sound_kernel", "", "x_stride"): {"1"}})
print(*gaps(set(), ["sound_kernel"], {("gone_kernel", "", "x"): {"1"}}), sep="; ")
with fake_device() as device:
    faulty.sound_kernel[(1,)](values, 16, BLOCK=16)
fits = []
for arguments in (values, 32, 16), (values[1:], 16, 16), (values, 3, 16), (values, 16, 32):
    try:
        check_fit(device.variants[0], arguments)
        fits.append(True)
    except ValueError:
        fits.append(False)
print(*fits)
"""


def test_the_sweep_sees_what_fails_for_a_stride_of_1_and_what_was_left_out(tmp_path):
    """Such a fault gram once had; neither the interpreter nor the compile gate can see it."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    (tmp_path / "program.py").write_text(PROGRAM)
    result = run(str(tmp_path / "program.py"), path=tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.splitlines() == [
        "0; faulty_kernel (): x_stride was never 1",
        "1; faulty_kernel (): x_stride was never 1",
        "0",
        "0; sound_kernel (): x_stride was 1; sound_kernel (): x_stride was never an int64; "
        "sound_kernel (): x_stride was never not a multiple of 16",
        "sound_kernel was never launched; gone_kernel (): no x was seen",
        "True False False False",
    ]
