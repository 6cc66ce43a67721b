"""Recovery: what is trained, by which ranks, and that its result is a pruned folder like any."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

import cfsp
from cfsp.errors import CfspError
from cfsp.models.layouts import known_layout
from cfsp.recovery import adapters, targets

from ..conftest import make_tiny, make_tokenizer
from ..models.test_families import ALL, EXPERTS, make

TEXT = str(Path(cfsp.__file__).parent / "calibration" / "text.py")
RECIPE = cfsp.Recipe(
    scorer="cfsp",
    sparsity=0.3,
    width_multiple=1,
    calibration=cfsp.Calibration(dataset=TEXT, samples=4, seqlen=16),
)
SETTINGS = cfsp.Recovery(rank=4, steps=20, batch_size=4, learning_rate=5e-2)
OPTIONS = {"eval_dataset": TEXT, "eval_windows": 8, "progress": False}


def pruned_folder(root: Path, model_type: str = "llama", **config: object) -> Path:
    dense = root / f"{model_type}-dense"
    make_tiny(model_type, **config).save_pretrained(dense)
    make_tokenizer().save_pretrained(dense)
    out = root / model_type
    cfsp.prune(dense, recipe=RECIPE, out=out, eval_windows=0, progress=False)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=torch.arange(24)[None] * 11 % 256, use_cache=False).logits


@dataclass(frozen=True)
class Recovered:
    pruned: Path
    result: cfsp.RecoveryResult


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory) -> Recovered:
    root = tmp_path_factory.mktemp("recovery")
    pruned = pruned_folder(root)
    result = cfsp.recover(pruned, root / "recovered", SETTINGS, keep_adapter=True, **OPTIONS)
    return Recovered(pruned, result)


def test_training_lowers_loss_and_perplexity(recovered: Recovered) -> None:
    report = recovered.result.report
    assert len(report.losses) == SETTINGS.steps
    assert report.losses[-1] < 0.95 * report.losses[0]
    assert report.perplexity_after.perplexity < 0.9 * report.perplexity_before.perplexity
    assert report.tokens == 20 * 4 * 16
    again = cfsp.perplexity(
        cfsp.load(recovered.result.out),
        cfsp.evaluation.quality.evaluation_windows(make_tokenizer(), TEXT, 16, 8, "auto"),
        progress=False,
    )
    assert again.perplexity == report.perplexity_after.perplexity


def test_the_result_is_a_pruned_folder_with_a_recovery(recovered: Recovered) -> None:
    before, after = contents(recovered.pruned), contents(recovered.result.out)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"README.md", "recipe.yaml", "model.safetensors", "cfsp.json"}
    added = {name.partition("/")[0] for name in after.keys() - before.keys()}
    assert added == {"adapter"}
    assert after["README.md"].startswith(before["README.md"])
    assert b"## Recovery" in after["README.md"]
    old, new = (yaml.safe_load(files["recipe.yaml"]) for files in (before, after))
    (entry,) = new.pop("recovery")
    assert new == old
    assert entry["settings"]["rank"] == SETTINGS.rank
    assert entry["result"]["losses"] == list(recovered.result.report.losses)
    assert "peft" in entry["provenance"]["versions"]
    assert not recovered.result.out.with_name("recovered.partial").exists()


def test_the_merged_model_says_what_the_adapter_says(recovered: Recovered) -> None:
    adapter = recovered.result.out / "adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    report = recovered.result.report
    assert sum(tensor.numel() for tensor in tensors.values()) == report.trained_parameters
    ranks_found = {len(t) for name, t in tensors.items() if "lora_A" in name}
    assert ranks_found == set(report.ranks)
    adapted = PeftModel.from_pretrained(cfsp.load(recovered.pruned), adapter).eval()
    merged, plain = cfsp.load(recovered.result.out), cfsp.load(recovered.pruned)
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=1e-4, atol=1e-4)
    assert (logits(plain) - logits(merged)).abs().max() > 0.1


def test_only_the_projections_of_ffns_have_changed(recovered: Recovered) -> None:
    before = cfsp.load(recovered.pruned).state_dict()
    after = cfsp.load(recovered.result.out).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".mlp." in name}


def test_a_recovered_model_is_exported(recovered: Recovered, tmp_path: Path) -> None:
    out = cfsp.export(recovered.result.out, "padded", tmp_path / "padded", progress=False).out
    torch.testing.assert_close(
        logits(cfsp.load(out)), logits(cfsp.load(recovered.result.out)), rtol=1e-4, atol=1e-4
    )


def test_a_recovered_model_is_recovered_again_by_its_ffns(
    recovered: Recovered, tmp_path: Path
) -> None:
    settings = cfsp.Recovery(method="ffn", steps=2, batch_size=2, learning_rate=1e-3)
    result = cfsp.recover(
        recovered.result.out, tmp_path / "out", settings, eval_windows=0, progress=False
    )
    entries = yaml.safe_load((result.out / "recipe.yaml").read_text())["recovery"]
    assert [entry["settings"]["method"] for entry in entries] == ["lora", "ffn"]
    before = cfsp.load(recovered.result.out).state_dict()
    changed = {n for n, value in result.model.state_dict().items() if not value.equal(before[n])}
    assert changed == {name for name in before if ".mlp." in name}
    assert result.report.trained_parameters == sum(before[name].numel() for name in changed)
    assert result.report.ranks == ()


@given(
    st.lists(
        st.tuples(st.floats(0, 0.5), st.integers(50, 5000), st.integers(16, 600)),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 16),
)
def test_ranks_by_importance_have_the_parameters_of_uniform_ones(
    blocks: list[tuple[float, int, int]], rank: int
) -> None:
    importance = torch.tensor([block[0] for block in blocks], dtype=torch.float64)
    costs, largest = [block[1] for block in blocks], [block[2] for block in blocks]
    found = targets.importance_ranks(importance, rank, costs, largest)
    assert all(1 <= own <= most for own, most in zip(found, largest, strict=True))
    total = sum(own * cost for own, cost in zip(found, costs, strict=True))
    assert abs(total - rank * sum(costs)) <= max(costs) / 2


def test_more_important_blocks_have_higher_ranks() -> None:
    importance = torch.tensor([0.3, 0.1, 0.05, 0.05, 0.2], dtype=torch.float64)
    found = targets.importance_ranks(importance, 8, [100, 100, 0, 100, 100], [64, 64, 0, 64, 64])
    assert found[0] > found[4] > found[1] > found[3] > 0 == found[2]
    assert sum(found) == 32
    with pytest.raises(CfspError, match="rank 65 is beyond the 64"):
        targets.importance_ranks(importance, 65, [100] * 5, [64] * 5)


@pytest.mark.parametrize("name", ALL)
def test_adapters_of_every_family_are_merged_to_the_same_logits(name: str) -> None:
    model, layout = make(name), known_layout(name)
    choice = "attention" if name in EXPERTS else "all"
    if name in EXPERTS:
        for refused in ("ffn", "all"):
            with pytest.raises(CfspError, match=r"no adapters for the FFNs .* routed experts"):
                targets.projections(model, layout, refused)
    else:
        found = targets.projections(model, layout, "ffn")
        parents = {path.rpartition(".")[0] for block in found for path in block}
        inner = "" if name == "opt" else ".mlp"
        assert parents == {f"{ALL[name].blocks}.{number}{inner}" for number in range(4)}
    blocks = targets.projections(model, layout, choice)
    assert all(any("att" in path for path in block) for block in blocks)
    costs = targets.rank_costs(blocks)
    before = logits(model)
    adapted = adapters.attach(model, blocks, [1, 2, 3, 4], 2.0, 0)
    assert torch.equal(logits(adapted), before)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == sum(
        rank * cost for rank, cost in zip((1, 2, 3, 4), costs, strict=True)
    )
    for number, parameter in enumerate(trained.values()):
        generator = torch.Generator().manual_seed(number)
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    expected_logits = logits(adapted)
    assert (expected_logits - before).abs().max() > 1e-2
    merged = adapters.merge(adapted)
    assert merged is model
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in make(name).named_parameters()}
    torch.testing.assert_close(logits(model), expected_logits, rtol=1e-4, atol=1e-4)


def test_settings_are_completed_by_size_and_pruning() -> None:
    calibration = cfsp.Calibration(dataset="ptb", seqlen=512, bos="never")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    small = cfsp.Recovery().resolved(calibration, 10**8, cpu)
    assert (small.dataset, small.seqlen, small.bos) == ("ptb", 512, "never")
    assert (small.batch_size, small.micro_batch, small.learning_rate) == (8, 2, 3e-4)
    large = cfsp.Recovery(method="ffn", seqlen=2048).resolved(calibration, 7 * 10**10, gpu)
    assert (large.batch_size, large.micro_batch, large.learning_rate) == (32, 4, 1e-5)
    assert cfsp.Recovery(batch_size=6).resolved(calibration, 1, gpu).micro_batch == 6
    assert cfsp.Recovery(batch_size=6, seqlen=200).resolved(calibration, 1, cpu).micro_batch == 3
    assert cfsp.Recovery(seqlen=2048).resolved(calibration, 1, cpu).micro_batch == 1
    assert small.text == replace(calibration, samples=1600)
    with pytest.raises(CfspError, match="micro_batch 3 does not divide batch_size 8"):
        cfsp.Recovery(micro_batch=3).resolved(calibration, 1, cpu)


@pytest.mark.parametrize(
    ("make_settings", "message"),
    [
        (lambda: cfsp.Recovery(method="dora"), "unknown method 'dora'"),
        (lambda: cfsp.Recovery(allocation="x"), "unknown allocation 'x'"),
        (lambda: cfsp.Recovery(targets="mlp"), "unknown targets 'mlp'"),
        (lambda: cfsp.Recovery(gradient_checkpointing="x"), "unknown gradient_checkpointing 'x'"),
        (lambda: cfsp.Recovery(bos="x"), "unknown bos 'x'"),
        (lambda: cfsp.Recovery(steps=0), "steps must be 1 or more, got 0"),
        (lambda: cfsp.Recovery(learning_rate=-1.0), "learning_rate must be above 0, got -1"),
        (lambda: cfsp.Distillation("t", temperature=0.0), "temperature must be above 0"),
        (lambda: cfsp.Distillation("t", 1.0, 0.0, 0.0, 0.0), "not all 0"),
    ],
)
def test_settings_out_of_range_are_refused(
    make_settings: Callable[[], object], message: str
) -> None:
    with pytest.raises(CfspError, match=message):
        make_settings()
