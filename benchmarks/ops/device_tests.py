"""The kernel tests, a process for each file: ``python -m benchmarks.ops.device_tests --logs DIR``.

A kernel that faults takes the CUDA context of its process along, and with it every later test
there. And most of their time goes into compiling, which several processes do side by side.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from ..common.environment import ROOT, anonymous

LONGEST = "test_compile.py"


def run(file: Path, log: Path) -> int:
    """The exit code of the tests in ``file``; their output goes to ``log`` as it comes."""
    command = (sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider")
    with log.open("w") as output:
        return subprocess.run(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops.device_tests", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--logs", type=Path, required=True, help="folder for the tests' output")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--folder", type=Path, default=ROOT / "tests" / "kernels")
    options = parser.parse_args(arguments)
    options.logs.mkdir(parents=True, exist_ok=True)
    files = sorted(options.folder.glob("test_*.py"), key=lambda file: file.name != LONGEST)
    failed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        logs = [options.logs / f"{file.stem}.log" for file in files]
        running = {pool.submit(run, *pair): pair[1] for pair in zip(files, logs, strict=True)}
        for ended in as_completed(running):
            log, code = running[ended], ended.result()
            text = anonymous(log.read_text(errors="replace"), options.logs)
            log.write_text(text)
            lines = text.splitlines()
            told = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
            print("\n".join([f"{log.stem}: {lines[-1] if lines else code}", *told]), flush=True)
            failed += code != 0
    print(f"{len(files) - failed} of {len(files)} files passed")
    return 1 if failed or not files else 0


if __name__ == "__main__":
    raise SystemExit(main())
