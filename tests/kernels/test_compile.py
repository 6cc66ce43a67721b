"""Every kernel, compiled ahead of time for every target at every configuration of the table."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from cfsp_kernels._configs import config_table
from cfsp_kernels._triton import triton_installed

pytestmark = [
    pytest.mark.skipif(not triton_installed(), reason="triton is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's compilers are for Linux"),
]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """What the gate found, in a process of its own: this one may have the interpreter."""
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.ops.compile_gate", "--json"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def test_no_spills_wide_accesses_and_shared_memory_that_fits(compiled):
    for row in compiled:
        name = f"{row['op']} {row['variant']}".strip()
        print(
            f"{name:28} {row['dtype']} {row['target']:7} {row['entry']:8} "
            f"{row['registers']:3} registers {row['shared']:6} bytes shared "
            f"{row['wide_loads']:2} wide loads {row['wide_stores']:2} wide stores"
        )
    assert [row for row in compiled if row["faults"]] == []


def test_every_entry_of_the_table_was_compiled(compiled):
    done = {(row["op"], row["entry"]) for row in compiled}
    table = config_table()
    assert done == {(op, entry) for op, entries in table.items() for entry in entries}
    defaults = Counter(row["target"] for row in compiled if row["entry"] == "default")
    assert set(defaults) == {"sm_80", "sm_90", "sm_100", "gfx942"}


def test_the_gate_sees_spills_and_narrow_loads():
    """It would not pass anything: a tile of too many elements spills, a ragged one loads narrow."""
    code = """
import dataclasses
from benchmarks.ops import compile_gate as gate
from cfsp_kernels._configs import config_table
config_table()["channel_statistics"]["big"] = {"BLOCK_T": 64, "BLOCK_C": 128, "num_warps": 1}
case = next(c for c in gate.cases() if c.op == "channel_statistics")
print(gate.faults(gate.compile_case(case, "sm_90", "big")))
ragged = dataclasses.replace(gate.unaligned(case), wide_loads=True)
print(gate.faults(gate.compile_case(ragged, "sm_90", "default")))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    big, ragged = result.stdout.splitlines()
    assert "spills" in big
    assert "no 16-byte loads" in ragged
