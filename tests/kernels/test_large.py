"""Offsets past 2^31 elements: a few rows, 2^30 elements apart, of a mapping that the system fills
with pages only where they are touched."""

import subprocess
import sys

import pytest
import torch

STRIDE = (1 << 30) + 64
PROGRAM = f"""
import mmap
import sys
import torch
import cfsp_kernels as k

STRIDE, ROWS, COLUMNS = {STRIDE}, 4, 40
NORESERVE = 0x4000  # of Linux; the module names it from Python 3.13 on
backend = sys.argv[1]
torch.set_num_threads(1)

def spread(values):
    # [ROWS, COLUMNS] bf16 whose last row starts past 2^31 elements
    size = ((ROWS - 1) * STRIDE + COLUMNS) * 2
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    whole = torch.frombuffer(memory, dtype=torch.bfloat16)
    view = whole.as_strided((ROWS, COLUMNS), (STRIDE, 1))
    return view.copy_(values)

generator = torch.Generator().manual_seed(0)
compact, other = torch.randn(2, ROWS, COLUMNS, generator=generator).bfloat16()
x, y = spread(compact), spread(other)
index = torch.arange(0, COLUMNS, 3)

def same(a, b):
    if not torch.equal(a, b):
        raise SystemExit(f"{{a}} is not {{b}}")

for a, b in zip(k.channel_statistics(x, backend=backend)[1:],
                k.channel_statistics(compact, backend=backend)[1:]):
    same(a, b)
for a, b in zip(k.swiglu_statistics(x, y, backend=backend)[1][1:],
                k.swiglu_statistics(compact, other, backend=backend)[1][1:]):
    same(a, b)
for a, b in zip(k.block_influence(x, y, backend=backend)[1:],
                k.block_influence(compact, other, backend=backend)[1:]):
    same(a, b)
for name in ("up", "down"):
    norms = torch.rand(ROWS if name == "up" else COLUMNS, generator=generator)
    same(k.channel_importance("balanced", **{{name: x}}, norms=norms, backend=backend),
         k.channel_importance("balanced", **{{name: compact}}, norms=norms, backend=backend))
same(k.gram(x, backend=backend), k.gram(compact, backend=backend))
same(k.gather_columns(x, index, backend=backend), compact[:, index])
out = spread(torch.zeros(ROWS, COLUMNS))[:, : index.numel()]
same(k.gather_columns(compact, index, out=out, backend=backend), compact[:, index])
rows = torch.tensor([3, 0])
same(k.gather_rows(x, rows, backend=backend), compact[rows])
print("the same")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does")
@pytest.mark.skipif(torch.cuda.is_available(), reason="maps memory of the CPU")
def test_offsets_past_2_to_31(backend):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, backend],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "the same\n"
