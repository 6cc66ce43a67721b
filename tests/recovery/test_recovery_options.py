"""Distillation, the estimate and the command line of recovery."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import cfsp
from cfsp.cli.main import main
from cfsp.errors import CfspError
from cfsp.evaluation.quality import evaluation_windows
from cfsp.models.descriptions import describe
from cfsp.models.layouts import known_layout
from cfsp.recovery import adapters, targets, training
from cfsp.recovery import estimate as estimates

from ..conftest import make_tiny, make_tokenizer
from .test_recovery import OPTIONS, TEXT, pruned_folder

ONLY = {"text_weight": 0.0, "logits_weight": 0.0, "hidden_weight": 0.0}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned_folder(tmp_path_factory.mktemp("distillation"))


@dataclass
class Output:
    logits: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...]


def output(seed: int) -> Output:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(3, 2, 5, 7, generator=generator)
    return Output(torch.randn(2, 5, 11, generator=generator), tuple(states))


def test_the_loss_is_what_its_definition_says() -> None:
    student, teacher = output(0), output(1)
    choice = cfsp.Distillation("t", 3.0, text_weight=0.5, logits_weight=2.0, hidden_weight=4.0)
    p = (teacher.logits.double() / 3).softmax(-1)
    q = (student.logits.double() / 3).softmax(-1)
    divergence = 9 * (p * (p / q).log()).sum(-1).mean()
    pairs = list(zip(student.hidden_states, teacher.hidden_states, strict=True))[1:]
    distance = sum(((s - t).norm() / t.norm()) ** 2 for s, t in pairs) / 2
    found = training.distillation_loss(student, teacher, torch.tensor(7.0), choice)
    assert float(found) == pytest.approx(float(3.5 + 2 * divergence + 4 * distance), rel=1e-5)
    same = training.distillation_loss(teacher, teacher, torch.tensor(7.0), choice)
    assert float(same) == pytest.approx(3.5, abs=1e-5)


@torch.no_grad()
def distance(model: torch.nn.Module, teacher: torch.nn.Module, choice: cfsp.Distillation) -> float:
    """The loss over all windows of the text."""
    ids = evaluation_windows(make_tokenizer(), TEXT, 16, 200, "auto")
    outputs = [m(input_ids=ids, output_hidden_states=True) for m in (model, teacher)]
    return float(training.distillation_loss(*outputs, torch.tensor(0.0), choice))


def test_a_student_comes_nearer_to_its_teacher(pruned: Path, tmp_path: Path) -> None:
    dense = pruned.with_name("llama-dense")
    choice = cfsp.Distillation(str(dense), text_weight=0.0)
    settings = cfsp.Recovery(
        method="ffn", steps=60, batch_size=4, learning_rate=2e-3, distillation=choice
    )
    result = cfsp.recover(pruned, tmp_path / "out", settings, **OPTIONS)
    assert result.report.settings.distillation == choice
    teacher, student = cfsp.load(dense), cfsp.load(pruned)
    for part in ("logits_weight", "hidden_weight"):
        only = cfsp.Distillation(str(dense), **{**ONLY, part: 1.0})
        before, after = (distance(model, teacher, only) for model in (student, result.model))
        assert after < 0.9 * before < 0.2


def test_a_teacher_that_cannot_be_compared_is_refused(pruned: Path, tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "deep")
    make_tiny(num_hidden_layers=2).save_pretrained(tmp_path / "deep")
    make_tokenizer().save_pretrained(tmp_path / "words")
    make_tiny(vocab_size=300).save_pretrained(tmp_path / "words")
    for name, message in (
        ("deep", "num_hidden_layers 2, not 4; hidden_weight 0 needs only its logits"),
        ("words", "vocab_size 300, not 260$"),
    ):
        choice = cfsp.Distillation(str(tmp_path / name))
        with pytest.raises(CfspError, match=message):
            cfsp.recover(pruned, tmp_path / "out", cfsp.Recovery(distillation=choice), **OPTIONS)
    only_logits = cfsp.Distillation(str(tmp_path / "deep"), hidden_weight=0.0)
    settings = cfsp.Recovery(steps=1, batch_size=1, rank=1, distillation=only_logits)
    assert cfsp.recover(pruned, tmp_path / "out", settings, **OPTIONS).report.losses


def kept_bytes(model: torch.nn.Module, seqlen: int) -> int:
    """What a forward pass keeps for the backward pass beside parameters: every storage once."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept: list[torch.Tensor] = []
    ids = torch.arange(seqlen)[None] % 256
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.train()(input_ids=ids, use_cache=False)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(nbytes for place, nbytes in storages.items() if place not in own)


@pytest.mark.parametrize(("name", "inner"), [("llama", 96), ("llama", 24), ("phi3", 64)])
def test_estimated_activations_are_those_kept(name: str, inner: int, tmp_path: Path) -> None:
    seqlen, kept, estimated = 64, {}, {}
    for blocks in (2, 4):
        model = make_tiny(name, num_hidden_layers=blocks, intermediate_size=inner)
        model.config.save_pretrained(tmp_path / "config")
        described = describe(tmp_path / "config")
        costs = estimates._costs(described, torch.float32)
        estimated[blocks] = estimates._activations(costs, seqlen, seqlen, False)
        model.requires_grad_(False)
        found = targets.projections(model, known_layout(name), "ffn")
        adapted = adapters.attach(model, found, [1] * blocks, 2.0, 0)
        kept[blocks] = kept_bytes(adapted, seqlen)
    assert estimated[4] - estimated[2] == pytest.approx(kept[4] - kept[2], rel=0.2)


def test_the_estimate_follows_the_settings(pruned: Path) -> None:
    def estimate(settings: cfsp.Recovery, **options: object) -> estimates.RecoveryEstimate:
        options = {"hardware": "h100", "tflops": 100.0, "eval_windows": 0, **options}
        return estimates.estimate_recovery(pruned, settings, **options)

    lora = estimate(cfsp.Recovery(rank=2, batch_size=8))
    model = cfsp.load(pruned)
    parameters = sum(p.numel() for p in model.parameters())
    multiplied = parameters - model.get_input_embeddings().weight.numel()
    assert (lora.parameters, lora.gradient_checkpointing) == (parameters, False)
    assert lora.seconds == lora.flops / 1e14
    assert 1 < lora.flops / (2 * 2 * multiplied * 200 * 8 * 16) < 1.5
    assert estimate(cfsp.Recovery(rank=2, batch_size=8, steps=400)).flops == 2 * lora.flops
    whole = estimate(cfsp.Recovery(method="ffn", batch_size=8))
    assert lora.flops < whole.flops < 2 * lora.flops
    trained = whole.trained_parameters
    assert whole.device_parts["trained parameters, gradients, moments"] == 12 * trained
    assert (
        lora.device_parts["trained parameters, gradients, moments"] == 16 * lora.trained_parameters
    )
    teacher = cfsp.Distillation(str(pruned.with_name("llama-dense")))
    taught = estimate(cfsp.Recovery(rank=2, batch_size=8, distillation=teacher))
    assert taught.device_parts["teacher"] > taught.device_parts["model"]
    assert taught.flops > 1.3 * lora.flops
    tight = f"{lora.device_bytes - 1}B"
    saving = estimate(cfsp.Recovery(rank=2, batch_size=8), max_memory=tight)
    assert saving.gradient_checkpointing
    assert saving.device_parts["activations"] < lora.device_parts["activations"]
    assert saving.flops > lora.flops
    with pytest.raises(CfspError, match=r"memory: about .* needed, 1\.0 KiB to be had"):
        estimate(cfsp.Recovery(), max_memory="1KiB").check(estimates.parse_memory("1KiB"))


def test_a_dry_run_reads_no_weights(
    pruned: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    weights = pruned / "model.safetensors"
    content = weights.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    try:
        weights.write_bytes(content[:header] + bytes(len(content) - header))
        command = ["recover", str(pruned), "--dry-run", "--rank", "2", "--tflops", "1"]
        assert main([*command, "--json"]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["seconds"] == pytest.approx(found["flops"] / 1e12)
        assert found["settings"]["learning_rate"] == 3e-4
        assert main([*command, "--device", "cpu"]) == 0
        assert "without gradient checkpointing" in capsys.readouterr().out
        assert main([*command, "--max-memory", "1MiB"]) == 2
    finally:
        weights.write_bytes(content)


def test_a_run_is_estimated_before_it_starts(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = cfsp.Recovery(rank=1, steps=1, batch_size=1)
    cfsp.recover(pruned, tmp_path / "out", settings, **{**OPTIONS, "progress": True})
    assert "estimate: llama: " in capsys.readouterr().err
    with pytest.raises(CfspError, match="to be had; lower `micro_batch`"):
        cfsp.recover(pruned, tmp_path / "new", settings, max_memory="1MiB", **OPTIONS)
    assert not (tmp_path / "new").exists()


def spoilt(name: str, content: str | None) -> Callable[[Path, Path], Path]:
    def spoil(pruned: Path, root: Path) -> Path:
        copy = root / "spoilt"
        copy.mkdir()
        for file in pruned.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        if content is None:
            (copy / name).unlink()
        else:
            (copy / name).write_text(content)
        return copy

    return spoil


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "9999"], "rank 9999 is beyond the"),
        (["--method", "dora"], "unknown method 'dora' (did you mean lora?); valid: lora, ffn"),
        (["--temperature", "2"], "--temperature needs --teacher MODEL"),
        (["--method", "ffn", "--keep-adapter"], "method 'ffn' has no adapter to keep"),
        (["--seqlen", "4096"], "seqlen 4096 is beyond the model's 128 positions"),
        (["--tflops", "1"], "--tflops is for --dry-run"),
        (["--teacher", "no/such/folder"], "no such model folder: no/such/folder"),
        (["--device", "nowhere"], "device 'nowhere'"),
        (["--eval-windows", "-1"], "windows must be"),
        (["--batch-size", "3", "--micro-batch", "2"], "micro_batch 2 does not divide"),
    ],
)
def test_bad_arguments_are_told_in_a_line(
    pruned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    assert main(["recover", str(pruned), "--out", str(out), "--quiet", *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("cfsp: error: ")
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoilt("plan.json", None), "not a folder that cfsp prune wrote: no plan.json"),
        (spoilt("recipe.yaml", "recovery: 3"), "is not a recipe that cfsp wrote"),
        (spoilt("plan.json", "{"), "cannot read plan"),
    ],
)
def test_a_folder_that_was_not_pruned_is_refused(
    pruned: Path, tmp_path: Path, spoil: Callable[[Path, Path], Path], message: str
) -> None:
    folder = spoil(pruned, tmp_path)
    with pytest.raises(CfspError, match=message):
        cfsp.recover(folder, tmp_path / "out", **OPTIONS)


def test_the_plan_of_another_model_is_refused(pruned: Path, tmp_path: Path) -> None:
    plan = json.loads((pruned / "plan.json").read_text())
    block = plan["blocks"][1]
    block["kept"], block["width"] = "0-1", 2
    folder = spoilt("plan.json", json.dumps(plan))(pruned, tmp_path)
    with pytest.raises(CfspError, match="is of another model: its widths are not those here"):
        cfsp.recover(folder, tmp_path / "out", **OPTIONS)


def test_an_existing_folder_is_kept_unless_it_is_to_be_replaced(
    pruned: Path, tmp_path: Path
) -> None:
    settings = cfsp.Recovery(rank=1, steps=1, batch_size=1)
    (tmp_path / "out").mkdir()
    with pytest.raises(CfspError, match="exists; `overwrite=True` replaces it"):
        cfsp.recover(pruned, tmp_path / "out", settings, **OPTIONS)
    with pytest.raises(CfspError, match="is the input"):
        cfsp.recover(pruned, pruned, settings, overwrite=True, **OPTIONS)
    cfsp.recover(pruned, tmp_path / "out", settings, overwrite=True, **OPTIONS)
    assert (tmp_path / "out" / "plan.json").exists()


def test_without_peft_the_command_says_what_to_install(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(CfspError, match=r"pip install 'cfsp\[recover\]'"):
        cfsp.recover(pruned, tmp_path / "out", **OPTIONS)
