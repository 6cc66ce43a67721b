"""A recovery that was interrupted ends in the bytes of one that was not, or is refused."""

import errno
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

import cfsp
from cfsp.cli.main import main
from cfsp.errors import CfspError, Stopped
from cfsp.recovery import run, training
from cfsp.recovery.training import RecoveryTrainer, Watch

from .test_recovery import OPTIONS, TEXT, contents, pruned_folder

SETTINGS = cfsp.Recovery(
    rank=2, steps=6, batch_size=2, micro_batch=1, learning_rate=1e-2, targets="all"
)


@pytest.fixture(autouse=True)
def frequent_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_STEPS", 2)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2: its training draws dropout."""
    return pruned_folder(tmp_path_factory.mktemp("resume"), "gpt2", n_inner=48)


@pytest.fixture(scope="module")
def reference(pruned: Path) -> Path:
    out = pruned.with_name("reference")
    cfsp.recover(pruned, out, SETTINGS, keep_adapter=True, **OPTIONS)
    return out


def recover(pruned: Path, out: Path, settings: cfsp.Recovery = SETTINGS, **options: object) -> None:
    cfsp.recover(pruned, out, settings, keep_adapter=True, **{**OPTIONS, **options})


def after(calls: int) -> Callable[[], bool]:
    left = iter(range(calls))
    return lambda: next(left, None) is None


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Becomes as long as there are forward passes of training."""
    passes: list[int] = []
    compute_loss = RecoveryTrainer.compute_loss

    def counted(self: RecoveryTrainer, *args: object, **options: object) -> object:
        passes.append(1)
        return compute_loss(self, *args, **options)

    monkeypatch.setattr(RecoveryTrainer, "compute_loss", counted)
    return passes


def test_a_stopped_run_goes_on_to_the_same_bytes(
    pruned: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(Stopped):
        recover(pruned, out, stop=after(2))
    assert not out.exists()
    checkpoints = partial / ".cfsp-run" / "training"
    assert (checkpoints / "checkpoint-3" / "complete").exists()
    shutil.copytree(checkpoints / "checkpoint-3", checkpoints / "checkpoint-5")
    (checkpoints / "checkpoint-5" / "complete").unlink()  # killed while it was being written
    other = {"eval_windows": 4}
    for settings, options, what in (
        (replace(SETTINGS, rank=3), {}, "settings"),
        (replace(SETTINGS, seed=1), {}, "settings, training text"),
        (SETTINGS, other, "evaluation text"),
    ):
        with pytest.raises(CfspError, match=f"it was begun with another {what};"):
            recover(pruned, out, settings, resume=True, **options)
    passes = count_passes(monkeypatch)
    recover(pruned, out, resume=True)
    assert len(passes) == 3 * 2
    assert contents(out) == contents(reference)
    assert not partial.exists()


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    pruned: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_save = Watch.on_save

    def killed_after(self: Watch, args: object, state: object, *rest: object, **more: object):
        on_save(self, args, state, *rest, **more)
        if state.global_step == 4:
            shutil.copytree(tmp_path / "whole.partial", tmp_path / "killed.partial")

    monkeypatch.setattr(Watch, "on_save", killed_after)
    recover(pruned, tmp_path / "whole")
    assert contents(tmp_path / "whole") == contents(reference)
    passes = count_passes(monkeypatch)
    with pytest.raises(CfspError, match=r"killed\.partial is an interrupted run: `resume=True`"):
        recover(pruned, tmp_path / "killed")
    assert not passes
    recover(pruned, tmp_path / "killed", resume=True)
    assert len(passes) == 2 * 2
    assert contents(tmp_path / "killed") == contents(reference)


def test_a_full_disk_after_the_last_step_costs_no_step(
    pruned: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_model", fill)
        with pytest.raises(CfspError, match="No space left on device; `resume=True` continues"):
            recover(pruned, tmp_path / "out")
    passes = count_passes(monkeypatch)
    recover(pruned, tmp_path / "out", resume=True)
    assert not passes
    assert contents(tmp_path / "out") == contents(reference)


def test_gradient_checkpointing_changes_no_bit(
    pruned: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards: list[int] = []
    forward = GPT2MLP.forward

    def counted(self: GPT2MLP, hidden_states: torch.Tensor) -> torch.Tensor:
        forwards.append(1)
        return forward(self, hidden_states)

    monkeypatch.setattr(GPT2MLP, "forward", counted)
    settings = replace(SETTINGS, gradient_checkpointing="on")
    recover(pruned, tmp_path / "out", settings)
    evaluated, probed, trained = 8 + 8, 1 + 1, 6 * 2
    assert len(forwards) == 4 * (evaluated + probed + 2 * trained)
    names = ("model.safetensors", "adapter/adapter_model.safetensors", "config.json")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (reference / name).read_bytes()


def test_sigterm_ends_the_command_in_order(
    pruned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["recover", str(pruned), "--out", str(tmp_path / "out"), "--method", "ffn"]
    command += ["--steps", "3", "--batch-size", "1", "--learning-rate", "1e-3", "--quiet"]
    command += ["--eval-dataset", TEXT, "--eval-windows", "2", "--json"]
    compute_loss = RecoveryTrainer.compute_loss

    def terminated(self: RecoveryTrainer, *args: object, **options: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RecoveryTrainer, "compute_loss", terminated)
        assert main(command) == 143
    assert "--resume continues" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    passes = count_passes(monkeypatch)
    assert main([*command, "--resume"]) == 0
    assert len(passes) == 2
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["out"] == str(tmp_path / "out")
    assert len(found["losses"]) == 3
    assert found["perplexity_after"]["perplexity"] != found["perplexity_before"]["perplexity"]


def test_generators_and_modes_are_as_they_were(pruned: Path, tmp_path: Path) -> None:
    random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), torch.rand(1)
    random.seed(1)
    torch.manual_seed(1)
    settings = replace(SETTINGS, steps=1)
    result = cfsp.recover(pruned, tmp_path / "out", settings, **{**OPTIONS, "eval_windows": 0})
    assert (random.random(), torch.rand(1)) == expected
    assert not any(module.training for module in result.model.modules())


def test_a_training_that_diverges_leaves_nothing(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(CfspError, match=r"training diverged: the loss of step \d is (nan|inf)"):
        recover(pruned, tmp_path / "out", replace(SETTINGS, learning_rate=1e30))
    assert not list(tmp_path.iterdir())
