"""About a minute of `python -m tests.fuzz`, and that the harness finds what it is there to find."""

import random
import time
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import CfspError

from . import runner
from .mutation import mutate_bytes, mutate_json, mutate_text
from .runner import outcome_of, run, table, told
from .targets import Target, WrongAccepted, every_target


def test_no_reader_trips_over_damaged_input(tmp_path: Path) -> None:
    rows = run(inputs=4000, seed=0, jobs=1)
    assert told(rows, 0) == "", table(rows)
    assert {target.name for target in every_target(tmp_path)} == rows.keys()
    assert sum(row.inputs for row in rows.values()) >= 3900
    for name, row in rows.items():
        assert row.refused + row.accepted == row.inputs > 0, name


def test_equal_seeds_damage_equally(tmp_path: Path) -> None:
    for target in every_target(tmp_path):
        first, again, other = (runner.input_of(target, 1, number) for number in (5, 5, 6))
        assert first == again, target.name
        assert first != other, target.name
    for mutate, seed in ((mutate_bytes, b"abc"), (mutate_json, {"a": [1]}), (mutate_text, "abc")):
        assert len({mutate(random.Random(n), seed) for n in range(50)}) > 25  # type: ignore[operator]


def reader(read: Any, judge: Any = lambda *_: None) -> Target:
    return Target("x", 1, lambda rng: b"", read, judge)


def raises(error: BaseException) -> Any:
    def read(*_: object) -> None:
        raise error

    return read


@pytest.mark.parametrize(
    ("target", "what", "trace"),
    [
        (reader(lambda *_: 5), "accepted", ""),
        (reader(raises(CfspError("no"))), "refused", ""),
        (reader(raises(SystemExit(2))), "refused", ""),
        (reader(raises(SystemExit(1))), "traceback", "SystemExit 1"),
        (reader(raises(CfspError("a\nb"))), "wrong", "an error of several"),
        (reader(raises(CfspError("a" * 10**4))), "wrong", "an error of several"),
        (reader(raises(KeyError("k"))), "traceback", "KeyError in read"),
        (reader(raises(MemoryError())), "traceback", "MemoryError in read"),
        (reader(raises(RecursionError())), "traceback", "RecursionError in read"),
        (reader(lambda *_: 5, raises(WrongAccepted("five"))), "wrong", "five"),
        (reader(lambda *_: time.sleep(9)), "traceback", "Hang in"),
    ],
)
def test_every_kind_of_fault_is_one(
    target: Target, what: str, trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "MOST_SECONDS", 0.3)
    for found in (outcome_of, runner.isolated):
        kind, text = found(target, b"", tmp_path)
        assert kind == what
        assert text.startswith(trace)
        assert bool(text) == bool(trace)


def test_a_fault_is_shown_by_its_smallest_input(tmp_path: Path) -> None:
    def read(data: bytes, _: Path) -> None:
        if b"!" in data:
            raise KeyError("!")
        raise CfspError("no")

    target = Target("x", 1, lambda rng: rng.choice((b"good" * 30, b"bad!" + b"x" * 90)), read)
    row = runner.run_share(target, range(20), 0, tmp_path)
    assert row.tracebacks + row.refused == row.inputs == 20
    (fault,) = row.faults.values()
    assert fault.data == b"!"
    assert "KeyError in read" in told({"x": row}, 0)
    assert "x, seed 0, input" in told({"x": row}, 0)
