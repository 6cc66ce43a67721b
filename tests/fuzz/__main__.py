"""python -m tests.fuzz --inputs 100000 --jobs 2: damage what cfsp reads, and see what it does.

Exits with 1 for any traceback, hang, memory beyond bounds or wrong value that was accepted.
"""

import argparse
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from .runner import main

parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
parser.add_argument("--inputs", type=int, default=100_000)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--jobs", type=int, default=2)
parser.add_argument("--target", action="append", help="only this one; may be given again")
sys.exit(main(parser.parse_args()))
