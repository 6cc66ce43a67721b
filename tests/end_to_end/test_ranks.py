"""Several processes of torchrun: the bytes of one, whatever ends which of them."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import cfsp
from cfsp import distributed
from cfsp.calibration.text import load_text
from cfsp.calibration.windows import calibration_windows
from cfsp.cli.main import main
from cfsp.distributed import ALONE, Ranks, joined
from cfsp.errors import CfspError, RankLost, Stopped
from cfsp.io import block_reader as reading
from cfsp.io.safetensors import Readable, StoredTensor, read_index, read_tensors
from cfsp.io.shard_writer import Shard
from cfsp.models.opening import open_model, open_streamed
from cfsp.pruning import compaction_streamed as second_pass
from cfsp.weights.mapping import WayBack

from ..models.test_streaming import assert_same_files, prune, rewrite, saved
from .rank_driver import ROWS, prune_live, small_shards

ROOT = Path(__file__).resolve().parents[2]
EXACT = ["--seqlen", "32", "--width-multiple", "1", "--quiet"]
SAMPLES = 11  # of one window each on a CPU: the four ranks have 3, 3, 3 and 2 micro-batches
LLAMA = [*EXACT, "--samples", str(SAMPLES), "--eval-windows", "0"]
MEASURED = [
    *EXACT,
    "--samples",
    "7",
    "--eval-windows",
    "3",
    "--micro-batch",
    "2",
    "--scorer",
    "flap",
    "--compensation",
    "least-squares-bias",
]
FEW = [*EXACT, "--samples", "2", "--eval-windows", "1"]
CALIBRATE = ["--seqlen", "32", "--samples", str(SAMPLES), "--quiet"]
EVALUATE = ["--seqlen", "32", "--windows", "3", "--quiet", "--json"]


@dataclass(frozen=True)
class Line:
    """How a command ended on one rank."""

    name: str
    code: int
    out: str
    err: str


class Here:
    """A folder with two dense models, a text, and what one process makes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = folder / "text.txt"
        self.text.write_text(load_text("builtin", "calibrate")[:20_000])
        self.llama = saved(folder / "llama", shards=True)
        self.qwen = saved(folder / "qwen", "qwen2", dtype=torch.bfloat16, tie_word_embeddings=True)

    def prune(self, model: Path, out: str, options: list[str], *more: str) -> list[str]:
        datasets = ["--dataset", str(self.text), "--eval-dataset", str(self.text)]
        return ["prune", str(model), "--out", str(self.folder / out), *datasets, *options, *more]

    def calibrate(self, out: str) -> list[str]:
        datasets = ["--dataset", str(self.text)]
        return [
            "calibrate",
            str(self.llama),
            "--out",
            str(self.folder / out),
            *datasets,
            *CALIBRATE,
            "--scorer",
            "obs",
        ]

    def evaluate(self) -> list[str]:
        return ["evaluate", str(self.llama), "--dataset", str(self.text), *EVALUATE]

    def torchrun(self, size: int, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        return subprocess.run(
            [sys.executable, *command, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": str(torch.get_num_threads()),
                "TORCH_CPP_LOG_LEVEL": "ERROR",
            },
        )

    def drive(self, name: str, size: int, commands: list[dict[str, object]]) -> "Driven":
        """Every rank runs the commands in turn."""
        folder = self.folder / name
        folder.mkdir()
        (folder / "commands.json").write_text(json.dumps(commands))
        ended = self.torchrun(size, Path(__file__).with_name("rank_driver.py"), folder)
        found: dict[str, list[Line]] = defaultdict(list)
        for rank in range(size):
            file = folder / f"rank-{rank}.jsonl"
            for line in file.read_text().splitlines() if file.exists() else ():
                found[json.loads(line)["name"]].append(Line(**json.loads(line)))
        return Driven(ended, found)


@dataclass(frozen=True)
class Driven:
    """How the ranks ended, and each command on each of them."""

    process: subprocess.CompletedProcess[str]
    lines: dict[str, list[Line]]

    def codes(self, name: str) -> list[int]:
        assert name in self.lines, self.process.stderr[-3000:]
        return [line.code for line in self.lines[name]]

    def told(self, name: str) -> str:
        """What all ranks together wrote to stderr."""
        return "".join(line.err for line in self.lines[name])


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch)
        here = Here(folder)
        for model, out, options in (
            (here.llama, "llama-1", LLAMA),
            (here.qwen, "qwen-1", MEASURED),
            (here.llama, "few-1", FEW),
        ):
            assert main(here.prune(model, out, options)) == 0
        assert main(here.calibrate("1.safetensors")) == 0
        yield here


def with_a_broken_token(folder: Path, text: Path) -> Path:
    """A model whose first attention overflows at a token that the first windows of its calibration
    lack; all weights are finite."""
    saved(folder)
    opened = open_model(folder)
    windows = calibration_windows(
        opened.model, opened.tokenizer, cfsp.Calibration(str(text), SAMPLES, seqlen=32)
    )
    token = next(t for t in windows[4].tolist() if not (windows[:4] == t).any())

    def overflow(tensors: dict[str, torch.Tensor]) -> None:
        embeddings = tensors["model.embed_tokens.weight"]
        embeddings[:, 0] = 0
        embeddings[token, 0] = 1
        for name in ("q_proj", "k_proj"):
            tensors[f"model.layers.0.self_attn.{name}.weight"][:, 0] = 1e25

    rewrite(folder, overflow)
    return folder


@pytest.fixture(scope="module")
def four(here: Here) -> Driven:
    """Everything that four ranks are asked for, in one start of them; at its end one is killed."""
    stop_in_pass_1 = {
        "rank": 2, "module": "calibration.collect", "function": "run_block", "call": 2,
        "signal": "SIGTERM", "to": "itself",
    }  # fmt: skip
    stop_in_pass_2 = {
        **stop_in_pass_1, "module": "pruning.compaction", "function": "prune_block_",
        "call": 1,
    }  # fmt: skip
    kill = {**stop_in_pass_2, "rank": 3, "signal": "SIGKILL"}
    broken = with_a_broken_token(here.folder / "nan", here.text)
    calls = iter(range(4))  # those of pass 1
    calibration = cfsp.Calibration(str(here.text), SAMPLES, 32)
    recipe = cfsp.Recipe(width_multiple=1, calibration=calibration)
    with pytest.raises(Stopped):
        prune(here.llama, here.folder / "begun-by-1", recipe, stop=lambda: next(calls, 9) == 9)
    commands: list[tuple[str, list[object], dict[str, object]]] = [
        ("llama", here.prune(here.llama, "llama-4", LLAMA), {}),
        ("qwen", here.prune(here.qwen, "qwen-4", MEASURED, "--json"), {}),
        ("few", here.prune(here.llama, "few-4", FEW), {}),
        ("calibrate", here.calibrate("4.safetensors"), {}),
        ("evaluate", here.evaluate(), {}),
        ("dataset", here.prune(here.llama, "x", [*LLAMA, "--dataset", "absent"]), {}),
        ("option", here.prune(here.llama, "x", [*LLAMA, "--sparsity", "much"]), {}),
        ("nan", here.prune(broken, "x", LLAMA), {}),
        ("plan", ["plan", here.llama, "--statistics", here.folder / "1.safetensors"], {}),
        ("dry run", ["prune", here.llama, "--dry-run"], {}),
        ("differing", here.prune(here.llama, "x", [*LLAMA, "--seed", "{rank}"]), {}),
        ("elsewhere", here.prune(here.llama, "x-{rank}", LLAMA), {}),
        ("begun-by-1", here.prune(here.llama, "begun-by-1", LLAMA, "--resume"), {}),
        ("pass 1", here.prune(here.llama, "stopped", LLAMA), {"event": stop_in_pass_1}),
        ("pass 2", here.prune(here.llama, "stopped", LLAMA, "--resume"), {"event": stop_in_pass_2}),
        ("resumed", here.prune(here.llama, "stopped", LLAMA, "--resume"), {}),
        ("full", here.prune(here.llama, "full", LLAMA), {"full": 2}),
        ("refilled", here.prune(here.llama, "full", LLAMA, "--resume"), {}),
        ("killed", here.prune(here.llama, "killed", LLAMA), {"event": kill}),
    ]
    given = [
        {"name": name, "arguments": [str(a) for a in arguments], **more}
        for name, arguments, more in commands
    ]
    live = {"live": str(here.folder / "live-4"), "dataset": str(here.text)}
    given.insert(5, {"name": "live", **live})
    given.insert(0, {"name": "exchange", "exchange": str(here.folder / "own")})
    theirs = {"exchange": str(here.folder / "theirs"), "initialised": True}
    given.insert(1, {"name": "theirs", **theirs})
    return here.drive("four", 4, given)


def test_the_folder_is_that_of_one_process_byte_for_byte(here: Here, four: Driven) -> None:
    for name in ("llama", "qwen", "few"):
        assert four.codes(name) == [0] * 4
        assert_same_files(here.folder / f"{name}-4", here.folder / f"{name}-1")
        shards = {stored.file for stored in read_index(here.folder / f"{name}-4").values()}
        assert len(shards) >= 4


@pytest.mark.parametrize("size", [1, 2])
def test_torchrun_of_the_module_gives_the_same_bytes(size: int, here: Here) -> None:
    out = f"module-{size}"
    ran = here.torchrun(size, "-m", "cfsp", *here.prune(here.qwen, out, MEASURED, "--json"))
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert json.loads(ran.stdout.splitlines()[-1])["out"] == str(here.folder / out)
    assert ran.stdout.count("perplexity_after") == 1
    with pytest.MonkeyPatch.context() as patch:
        for module in ("checkpoints.folder", "pruning.compaction_streamed"):
            patch.setattr(f"cfsp.{module}.MAX_SHARD_BYTES", 5_000_000_000)
        if not (here.folder / "one-shard").exists():
            assert main(here.prune(here.qwen, "one-shard", MEASURED)) == 0
    assert_same_files(here.folder / out, here.folder / "one-shard")


def test_only_the_first_rank_prints(here: Here, four: Driven) -> None:
    for name in ("llama", "qwen", "few", "calibrate", "evaluate"):
        first, *others = four.lines[name]
        assert first.out
        assert not any(line.out or line.err for line in others)
    result = json.loads(four.lines["qwen"][0].out.splitlines()[-1])
    assert result["perplexity_before"]["windows"] == 3


def test_sums_are_added_in_the_order_of_one_process(here: Here, four: Driven) -> None:
    assert four.codes("exchange") == four.codes("theirs") == [0] * 4
    expected = torch.zeros_like(ROWS[0])
    for row in ROWS:
        expected += row
    parts = [sum(ROWS[Ranks(rank, 4).share(len(ROWS))]) for rank in range(4)]
    assert not torch.equal(sum(parts), expected)  # the order shows
    for name in [f"{group}-{rank}" for group in ("own", "theirs") for rank in range(4)]:
        found = torch.load(here.folder / name)
        assert torch.equal(found["sum"], expected)
        assert torch.equal(found["rows"], ROWS)
        assert found["others"] == [0, 3, 4]


def test_statistics_and_perplexity_are_those_of_one_process(
    here: Here, four: Driven, capsys: pytest.CaptureFixture[str]
) -> None:
    assert four.codes("calibrate") == four.codes("evaluate") == [0] * 4
    files = [here.folder / f"{size}.safetensors" for size in (1, 4)]
    assert files[0].read_bytes() == files[1].read_bytes()
    (ranking,) = cfsp.load_statistics(files[1]).rankings  # of Gram matrices over all ranks
    assert len(ranking.curves) == 4
    assert main(here.evaluate()) == 0
    found, expected = (
        {**json.loads(out.splitlines()[-1]), "seconds": 0}
        for out in (four.lines["evaluate"][0].out, capsys.readouterr().out)
    )
    assert found == expected


def test_a_live_model_is_written_by_the_first_rank(here: Here, four: Driven) -> None:
    assert four.codes("live") == [0] * 4
    prune_live(str(here.text), str(here.folder / "live-1"))
    assert_same_files(here.folder / "live-4", here.folder / "live-1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dataset", "cfsp: error: unknown dataset 'absent'; valid: "),
        ("option", "cfsp prune: error: argument --sparsity: invalid float value: 'much'"),
        ("plan", "cfsp: error: cfsp plan is for one process; start it without torchrun"),
        ("dry run", "cfsp: error: --dry-run is for one process; --ranks says how many a run will"),
        ("differing", "cfsp: error: rank 1 has another calibration text, recipe than rank 0"),
        ("elsewhere", "cfsp: error: rank 1 does not see "),
        ("nan", "cfsp: error: block 0 gave NaN or infinite activations in calibration window 4: "),
    ],
)
def test_an_error_is_told_once_and_leaves_nothing(
    name: str, message: str, here: Here, four: Driven
) -> None:
    assert four.codes(name) == [2] * 4
    assert four.told(name).startswith(message)
    assert four.told(name).count("\n") == 1
    assert not list(here.folder.glob("x*"))


def test_another_number_of_ranks_resumes_a_run(here: Here, four: Driven) -> None:
    assert four.codes("begun-by-1") == [0] * 4
    assert_same_files(here.folder / "begun-by-1", here.folder / "llama-1")


def test_all_ranks_stop_where_one_is_asked_to(here: Here, four: Driven) -> None:
    for name in ("pass 1", "pass 2"):
        assert four.codes(name) == [143] * 4
        assert four.told(name) == "cfsp: stopped; the same command with --resume continues\n"
    assert four.codes("resumed") == [0] * 4
    assert_same_files(here.folder / "stopped", here.folder / "llama-1")


def test_a_failure_of_one_rank_ends_the_others_and_loses_nothing(here: Here, four: Driven) -> None:
    assert four.codes("full") == [1, 1, 2, 1]
    (line,) = four.told("full").splitlines()
    assert line.endswith("No space left on device; --resume continues this run")
    assert four.codes("refilled") == [0] * 4
    assert_same_files(here.folder / "full", here.folder / "llama-1")


def test_a_killed_rank_ends_the_others_and_one_process_resumes(here: Here, four: Driven) -> None:
    assert four.process.returncode != 0
    assert four.process.stderr.count("exitcode  : -9") == 1
    assert four.told("killed").count("\n") <= 1  # torchrun ends them meanwhile
    assert not (here.folder / "killed").exists()
    assert (here.folder / "killed.partial" / ".cfsp-run" / "statistics.safetensors").exists()
    assert main(here.prune(here.llama, "killed", LLAMA, "--resume")) == 0
    assert_same_files(here.folder / "killed", here.folder / "llama-1")
    assert not (here.folder / "killed.partial").exists()


def test_sigterm_to_torchrun_stops_all_ranks_in_order(here: Here) -> None:
    event = {
        "rank": 1, "module": "pruning.compaction", "function": "prune_block_", "call": 1,
        "signal": "SIGTERM", "to": "torchrun",
    }  # fmt: skip
    arguments = here.prune(here.llama, "terminated", LLAMA)
    two = here.drive("two", 2, [{"name": "prune", "arguments": arguments, "event": event}])
    assert two.process.returncode != 0
    assert two.codes("prune") == [143] * 2
    assert two.told("prune") == "cfsp: stopped; the same command with --resume continues\n"
    assert (here.folder / "terminated.partial" / ".cfsp-run" / "statistics.safetensors").exists()
    assert main(here.prune(here.llama, "terminated", LLAMA, "--resume")) == 0
    assert_same_files(here.folder / "terminated", here.folder / "llama-1")


def test_only_blocks_that_are_wanted_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_streamed(saved(tmp_path / "m"))
    assert opened is not None
    read: list[StoredTensor] = []

    def recorded(tensors: dict[str, Readable], *more: object) -> dict[str, torch.Tensor]:
        read.extend(part for tensor in tensors.values() for part in tensor.parts)
        return read_tensors(tensors, *more)

    monkeypatch.setattr(reading, "read_tensors", recorded)
    stored = {name: source.stored[0] for name, source in opened.blocks.sources.items()}
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in (1, 3)]
    tensors = opened.described.tensors
    way_back = WayBack(opened.model, opened.blocks.sources, tensors, opened.layout.number_of)
    shard = Shard("s", {name: tensors[name] for name in (*names, "lm_head.weight")})
    wanted = second_pass.blocks_of([shard], way_back)
    with opened.blocks.turns(wanted) as turns:
        assert [number for number, _ in turns] == [1, 3]
    with opened.blocks.turns(set()) as turns:
        assert not list(turns)
    inside = ("model.layers.1.", "model.layers.3.")
    expected = [tensor for name, tensor in stored.items() if name.startswith(inside)]
    assert len(read) == 18
    assert all(tensor in expected for tensor in read)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 16])
def test_shares_are_contiguous_and_cover_everything(size: int, count: int) -> None:
    ranks = [Ranks(rank, size) for rank in range(size)]
    shares = [list(range(count))[rank.share(count)] for rank in ranks]
    assert list(chain(*shares)) == list(range(count))
    assert {len(share) for share in shares} <= {count // size, -(-count // size)}
    assert shares[0] or not count
    weights = [1 + 5 * (i % 3) for i in range(count)]
    weighted = [rank.weighted_share(weights) for rank in ranks]
    assert list(chain(*weighted)) == list(range(count))
    fair, largest = sum(weights) / size, max(weights, default=0)
    assert all(abs(sum(weights[i] for i in part) - fair) <= largest for part in weighted)


def test_one_process_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with joined() as ranks:
        assert ranks is ALONE
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined() as ranks:
        assert ranks is ALONE
    parts = [torch.full((2,), 0.1, dtype=torch.float64) for _ in range(3)]
    assert torch.equal(ALONE.ordered_sum(parts, parts[0]), 0 + parts[0] + parts[1] + parts[2])
    assert ALONE.of_first(lambda: 3) == ALONE.most(3) == ALONE.total(3) == 3
    assert ALONE.any(True)
    assert not ALONE.any(False)
    with pytest.raises(CfspError, match="broken"):
        ALONE.check("broken")


@pytest.mark.parametrize(
    ("has_nccl", "backend", "device"),
    [(True, "cpu:gloo,cuda:nccl", "meta"), (False, "gloo", "cpu")],
)
def test_sums_on_gpus_go_from_gpu_to_gpu_where_nccl_is_at_hand(
    has_nccl: bool, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors on meta stand for those of a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: has_nccl)
    assert distributed._backend() == backend
    exchanged: list[str] = []
    for name in ("recv", "send", "broadcast"):
        monkeypatch.setattr(dist, name, lambda x, *_, **__: exchanged.append(x.device.type))
    middle, like = Ranks(1, 3, backend=backend), torch.zeros(2, device="meta")
    assert middle.ordered_sum([], like).device.type == device
    assert exchanged == [device] * 3
    assert middle.ordered_sum([torch.ones(2)], torch.zeros(2)).tolist() == [1, 1]


def test_a_rank_has_the_gpu_of_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    ranks = Ranks(rank=9, size=12, local_rank=1)
    assert [ranks.device(name) for name in ("auto", "cuda", "cpu", "cuda:0")] == [
        "cuda:1", "cuda:1", "cpu", "cuda:0",
    ]  # fmt: skip
    assert current == [1, 1]
    with pytest.raises(CfspError, match="rank 9 has no GPU of its own: 2 on this machine"):
        Ranks(rank=9, size=12, local_rank=2).device("auto")
    assert issubclass(RankLost, Stopped)
