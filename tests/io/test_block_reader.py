"""Blocks read ahead of their turns, into two buffers or one; tensors that lie in several files."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import cfsp
from cfsp.errors import CfspError
from cfsp.io import block_reader, safetensors
from cfsp.io.block_reader import LARGE_BLOCK_BYTES, Arena, aligned, buffer_count, read_ahead
from cfsp.io.memory import Room
from cfsp.io.safetensors import (
    JoinedTensor,
    StoredTensor,
    first_values,
    read_header,
    read_tensors,
    will_need,
)

from ..conftest import make_tiny, make_tokenizer, one_thread_at_a_time
from ..families.checks import OPTIONS, RECIPE, have_equal_bytes

CPU = torch.device("cpu")
Blocks = list[dict[str, StoredTensor]]


def values(number: int) -> dict[str, torch.Tensor]:
    """Of a block: each has more than the one before."""
    return {
        "weight": torch.full((number + 2, 40), float(number)),
        "bias": torch.arange(number, number + 7).to(torch.int8),
    }


@pytest.fixture
def blocks(tmp_path: Path) -> Blocks:
    """Four, each in a file of its own."""
    for number in range(4):
        save_file(values(number), tmp_path / f"{number}.safetensors")
    return [read_header(tmp_path / f"{number}.safetensors") for number in range(4)]


class Log:
    """What the reader has done, in order, and the memory that it has taken."""

    def __init__(self, blocks: Blocks) -> None:
        self.events: list[str] = []
        self.arenas: list[int] = []
        self._number = {next(iter(block.values())).file: n for n, block in enumerate(blocks)}

    def read(self, tensors: dict[str, StoredTensor], room: Room) -> dict[str, torch.Tensor]:
        found = read_tensors(tensors, room)
        self.events.append(f"read {self._number[tensors['bias'].file]}")
        return found

    def need(self, tensors: Iterable[StoredTensor]) -> None:
        (file,) = {tensor.file for tensor in tensors}
        self.events.append(f"need {self._number[file]}")

    def memory(self, nbytes: int) -> torch.Tensor:
        self.arenas.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def wait_for(self, event: str) -> None:
        end = time.monotonic() + 10
        while event not in self.events and time.monotonic() < end:
            time.sleep(0.001)
        assert event in self.events

    def turns(self, blocks: Blocks, ahead: str) -> list[str]:
        """What happens when each turn lasts until the next block is ``ahead``, "read" or "need"."""
        with read_ahead(blocks, CPU) as turns:
            for number, tensors in enumerate(turns):
                self.events.append(f"turn {number}")
                if number + 1 < len(blocks):
                    self.wait_for(f"{ahead} {number + 1}")
                expected = values(number)
                assert tensors.keys() == expected.keys()
                for name, value in tensors.items():
                    assert value.dtype == expected[name].dtype
                    assert torch.equal(value, expected[name])
                time.sleep(0.005)  # for a reader that would not wait
                self.events.append(f"end {number}")
        return self.events


@pytest.fixture
def log(blocks: Blocks, monkeypatch: pytest.MonkeyPatch) -> Log:
    found = Log(blocks)
    monkeypatch.setattr(block_reader, "read_tensors", found.read)
    monkeypatch.setattr(block_reader, "will_need", found.need)
    monkeypatch.setattr(block_reader, "mapped_bytes", found.memory)
    return found


LARGEST = aligned(5 * 40 * 4) + aligned(7)
"""Bytes that the last block takes."""


def test_the_next_block_is_read_during_a_turn(blocks: Blocks, log: Log) -> None:
    events = log.turns(blocks, "read")
    assert log.arenas == [LARGEST, LARGEST]
    assert events.index("read 1") < events.index("end 0") < events.index("read 2")
    assert events.index("read 3") > events.index("end 1")
    assert not any(event.startswith("need") for event in events)


def test_a_large_block_is_read_when_the_one_before_is_done(
    blocks: Blocks, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_reader, "LARGE_BLOCK_BYTES", 1)
    events = log.turns(blocks, "need")
    assert log.arenas == [LARGEST]
    for number in range(3):
        ended, needed = events.index(f"end {number}"), events.index(f"need {number + 1}")
        assert events.index(f"read {number}") < needed < ended < events.index(f"read {number + 1}")
    assert "need 4" not in events
    assert "need 0" not in events


def test_blocks_are_large_beyond_4_gib() -> None:
    assert buffer_count(LARGE_BLOCK_BYTES) == 2
    assert buffer_count(LARGE_BLOCK_BYTES + 1) == 1
    assert LARGE_BLOCK_BYTES == 4 * 2**30


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("harm", ["gone", "short"])
def test_what_fails_is_raised_at_the_turn_of_its_block(
    large: bool, harm: str, blocks: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(block_reader, "LARGE_BLOCK_BYTES", 1)
    file = blocks[2]["weight"].file
    if harm == "gone":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 1)
    seen = []
    message = (
        "cannot read .*2.safetensors" if harm == "gone" else "2.safetensors is corrupt: it ends"
    )

    def take_turns() -> None:
        with read_ahead(blocks, CPU) as turns:
            for number, tensors in enumerate(turns):
                seen.append(number)
                assert torch.equal(tensors["weight"], values(number)["weight"])

    with pytest.raises(CfspError, match=message):
        take_turns()
    assert seen == [0, 1]


def test_large_blocks_make_no_difference_to_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    make_tiny("mixtral", num_local_experts=4, num_hidden_layers=3).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with one_thread_at_a_time():
        cfsp.prune(folder, recipe=RECIPE, out=tmp_path / "small", **OPTIONS)
        monkeypatch.setattr(block_reader, "LARGE_BLOCK_BYTES", 1)
        cfsp.prune(folder, recipe=RECIPE, out=tmp_path / "large", **OPTIONS)
    assert have_equal_bytes(tmp_path / "small", tmp_path / "large")


def test_the_system_is_told_of_bytes_to_come_and_need_not_have_them(
    blocks: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def advise(descriptor: int, start: int, count: int, advice: int) -> None:
        told.append((os.pread(descriptor, count, start), advice))

    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    blocks[1]["weight"].file.unlink()
    two = JoinedTensor(torch.float32, (6, 40), (blocks[0]["weight"], blocks[2]["weight"]))
    will_need([blocks[1]["weight"], two, blocks[3]["bias"]])
    expected = [values(0)["weight"], values(2)["weight"], values(3)["bias"]]
    assert told == [(x.numpy().tobytes(), 3) for x in expected]
    monkeypatch.delattr(os, "posix_fadvise")
    will_need([two])
    assert len(told) == 3


@pytest.fixture
def joined(tmp_path: Path) -> JoinedTensor:
    """[3, 4, 5], 0 to 59: two halves of an expert are in two files, none in one piece."""
    whole = torch.arange(60.0)
    parts = {}
    for number, (first, last) in enumerate([(0, 10), (10, 20), (20, 20), (20, 50), (50, 60)]):
        file = tmp_path / f"part{number % 2}-{number}"
        save_file({"before": torch.ones(number), "x": whole[first:last].clone()}, file)
        parts[number] = read_header(file)["x"]
    return JoinedTensor(torch.float32, (3, 4, 5), tuple(parts.values()))


@pytest.mark.parametrize("chunk", [12, 1 << 20])
def test_parts_in_several_files_are_read_into_one_tensor(
    chunk: int, joined: JoinedTensor, blocks: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors, "READ_BYTES", chunk)
    arena = Arena(aligned(240) + aligned(7), CPU)
    found = read_tensors({"x": joined, "bias": blocks[3]["bias"]}, arena.take)
    assert torch.equal(found["x"], torch.arange(60.0).view(3, 4, 5))
    assert torch.equal(found["bias"], values(3)["bias"])
    assert found["x"].data_ptr() == arena.memory.data_ptr()
    with read_ahead([{"x": joined}], CPU) as turns:
        assert torch.equal(next(turns)["x"], found["x"])


def test_a_part_that_is_cut_short_is_named(joined: JoinedTensor) -> None:
    file = joined.parts[3].file
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(CfspError, match=rf"{file.name} is corrupt: it ends at byte"):
        read_tensors({"x": joined})


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 20, 33])
def test_first_values_go_on_from_part_to_part_to_the_end_of_the_row(
    count: int, joined: JoinedTensor
) -> None:
    os.truncate(joined.parts[3].file, 0)  # all beyond the first row is left alone
    assert torch.equal(first_values(joined, count), torch.arange(60.0)[: min(count, 20)])


def test_first_values_of_one_stored_tensor_are_of_its_first_row(blocks: Blocks) -> None:
    assert torch.equal(first_values(blocks[3]["weight"], 64), torch.full((40,), 3.0))
    assert torch.equal(first_values(blocks[3]["weight"], 3), torch.full((3,), 3.0))
    assert torch.equal(first_values(blocks[3]["bias"], 64), values(3)["bias"][:1])
