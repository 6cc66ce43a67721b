"""Several models side by side: measured speed, tasks of the harness, the table and the JSON."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from cfsp.cli.main import main
from cfsp.errors import CfspError
from cfsp.evaluation import speed
from cfsp.evaluation.speed import Generation, measure_speed, random_prompts, time_round
from cfsp.evaluation.tasks import find_tasks, run_tasks
from cfsp.models.opening import adopt

from ..conftest import make_tiny, make_tokenizer

SMALL = Generation(batch=2, prompt_tokens=6, new_tokens=4, rounds=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models, the second with FFNs of half the width."""
    folder = tmp_path_factory.mktemp("side-by-side")
    for name, width in (("dense", 48), ("half", 24)):
        make_tiny(intermediate_size=width).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return [folder / "dense", folder / "half"]


def test_models_take_turns_and_a_speed_is_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [make_tiny(seed=0), make_tiny(seed=1)]
    turns: list[int] = []
    prefill = {0: iter([1.0, 9.0, 3.0]), 1: iter([2.0, 9.0, 4.0])}

    def seconds(model: object, generation: Generation) -> tuple[float, float]:
        turns.append(models.index(model))
        return next(prefill[turns[-1]]), 0.5 * (turns[-1] + 1)

    monkeypatch.setattr(speed, "time_round", seconds)
    found = measure_speed(models, SMALL, peak_memory=[7, None])
    assert turns == [0, 1, 0, 1, 0, 1]
    assert [f.prefill_tokens_per_second for f in found] == [12 / 3.0, 12 / 4.0]
    assert [f.decode_tokens_per_second for f in found] == [8 / 0.5, 8 / 1.0]
    assert [f.peak_memory_bytes for f in found] == [7, None]


def test_a_round_is_a_greedy_continuation_of_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make_tiny(), []
    forward = model.forward

    def recorded(**inputs: object) -> object:
        seen.append(inputs["input_ids"])
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", recorded)
    prefill, decode = time_round(model, SMALL)
    assert min(prefill, decode) > 0
    assert torch.equal(seen[0], random_prompts(model, SMALL))
    monkeypatch.undo()
    expected = model.generate(seen[0], max_new_tokens=4, do_sample=False, eos_token_id=-1)
    assert torch.equal(torch.cat(seen, dim=1), expected)


PEAK_MEMORY = """
import torch
from cfsp.evaluation.speed import PeakMemory
memory = PeakMemory(torch.device("cpu"))
held = torch.ones(64 << 20, dtype=torch.uint8)
torch.ones(256 << 20, dtype=torch.uint8)
memory.restart()
passing = torch.ones(96 << 20, dtype=torch.uint8)
del passing
print(memory.measure())
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_peak_memory_is_what_came_on_top() -> None:
    """In a process of its own: what others have left to be freed or paged in would count too."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY], capture_output=True, text=True, check=True
    )
    assert 150 << 20 < int(run.stdout) < 200 << 20


def fake_harness(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A harness that remembers what it was asked."""
    asked: dict[str, object] = {}

    def simple_evaluate(**options: object) -> dict[str, object]:
        asked.update(options)
        print("a bar of the harness", file=sys.stderr)
        results = {"acc,none": 0.5, "acc_stderr,none": "N/A", "exact_match,strict": 1, "alias": "q"}
        return {"results": {"questions": results}}

    def load(tasks: list[str]) -> None:
        if tasks == ["offline"]:
            raise ConnectionError("Couldn't reach 'x'\non the Hub")

    names = ("lm_eval", "lm_eval.tasks", "lm_eval.models", "lm_eval.models.huggingface")
    modules = {name: ModuleType(name) for name in names}
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.tasks"].TaskManager = lambda include_path: SimpleNamespace(
        all_tasks=["questions", "offline"], include_path=include_path, load=load
    )
    modules["lm_eval.models.huggingface"].HFLM = lambda **options: options
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_tasks_are_handed_to_the_harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = fake_harness(monkeypatch)
    model, tokenizer = make_tiny(), make_tokenizer()
    opened = adopt(model, tokenizer)
    index = find_tasks(["questions"], tmp_path)
    found = run_tasks(opened, ["questions"], index, limit=3, batch=2)
    assert found == {"questions": {"acc": 0.5, "exact_match (strict)": 1.0}}
    assert (asked["tasks"], asked["limit"]) == (["questions"], 3)
    assert asked["model"] == {
        "pretrained": model, "tokenizer": tokenizer, "backend": "causal", "batch_size": 2
    }  # fmt: skip
    assert asked["task_manager"] is index
    assert index.include_path == str(tmp_path)


def cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["evaluate", *map(str, arguments), "--quiet"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


SPEED = ("--speed", "--prompt-tokens", 8, "--new-tokens", 2, "--rounds", 1)
TEXT = ("--dataset", "builtin", "--seqlen", 32, "--windows", 2)


def test_the_command_sets_models_side_by_side(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_harness(monkeypatch)
    extras = (*SPEED, "--tasks", "questions")
    code, printed, error = cli(capsys, *folders, *TEXT, *extras, "--json")
    assert "harness" not in error
    models = json.loads(printed)["models"]
    assert code == 0
    assert [model["model"] for model in models] == [str(folder) for folder in folders]
    assert models[0]["parameters"] - models[1]["parameters"] == 4 * 3 * 32 * 24
    for model in models:
        assert model["perplexity"] > 1
        assert model["tasks"] == {"questions": {"acc": 0.5, "exact_match (strict)": 1.0}}
        assert model["speed"]["workload"] == {
            "batch": 1, "prompt_tokens": 8, "new_tokens": 2, "rounds": 1
        }  # fmt: skip
        assert model["speed"]["prefill_tokens_per_second"] > 0
    code, printed, _ = cli(capsys, *folders, "--windows", 0, *SPEED)
    assert code == 0
    for word in ("dense", "half", "prefill", "decode", "peak memory", "x)"):
        assert word in printed
    assert "perplexity" not in printed


def test_mistakes_are_told_before_a_model_is_read(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    missing = "tasks need the lm-evaluation-harness: pip install 'cfsp[eval]'"
    for arguments, message in (
        (("absent/model/x", "--tasks", "questions"), missing),
        (("absent/model/x", "--speed", "--rounds", 0), "rounds must be 1 or more, got 0"),
        ((folders[0], "--windows", 0), "nothing to measure"),
        (
            (folders[0], *SPEED, "--prompt-tokens", 127),
            "prompt_tokens 127 and new_tokens 2: seqlen 129 is beyond the model's 128",
        ),
    ):
        code, printed, error = cli(capsys, *arguments)
        assert (code, printed) == (2, "")
        assert message in error
    fake_harness(monkeypatch)
    for arguments, message in (
        (("--tasks", "other"), "unknown task 'other'"),
        (("--tasks", "questions,offline"), "cannot load task 'offline': Couldn't reach 'x' on the"),
        (("--tasks", "questions", "--limit", 0), "limit must be 1 or more, got 0"),
        (("--tasks", "questions", "--task-path", "absent"), "no such folder of tasks: absent"),
    ):
        code, _, error = cli(capsys, "absent/model/x", *arguments)
        assert code == 2
        assert message in error


def test_a_workload_that_is_none_is_refused() -> None:
    with pytest.raises(CfspError, match="new_tokens must be 1 or more, got 0"):
        Generation(new_tokens=0)
