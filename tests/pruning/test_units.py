"""KV groups, attentions and FFNs beside channels: one plan, one cut, one budget."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import cfsp
from cfsp import CfspError
from cfsp.pruning.plan_file import load_plan, save_plan

from ..conftest import TEXT, make_tiny, make_tokenizer

CALIBRATION = cfsp.Calibration(dataset=TEXT, samples=4, seqlen=32)
PLAIN = cfsp.Recipe(
    scorer="activation-norm",
    units="channels,groups",
    allocator="knapsack",
    compensation="none",
    width_multiple=8,
    sparsity=0.35,
    calibration=CALIBRATION,
)
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 5}
FAMILIES = ("llama", "qwen3", "mistral", "phi3")


def prune(model: object, recipe: cfsp.Recipe, out: Path | None = None, **more: object):
    tokenizer = None if isinstance(model, Path) else make_tokenizer()
    return cfsp.prune(model, tokenizer, recipe, out, progress=False, **more)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=torch.arange(48).reshape(2, 24) * 11 % 256, use_cache=False).logits


def projections(model: PreTrainedModel) -> Iterator[tuple[torch.nn.Linear, torch.nn.Linear]]:
    for layer in model.model.layers:
        yield layer.mlp.down_proj, layer.self_attn.o_proj


@torch.no_grad()
def masked(model: PreTrainedModel, plan: cfsp.PruningPlan) -> PreTrainedModel:
    """The dense model with the columns of what goes set to zero."""
    for outputs, block in zip(projections(model), plan.blocks, strict=True):
        for down, kept, units in zip(outputs, block.kept, block.units, strict=True):
            goes = torch.ones(down.in_features, dtype=torch.bool)
            goes[units.columns_of(kept[0])] = False
            down.weight[:, goes] = 0
    return model


@pytest.mark.parametrize("units", ["channels,groups", "groups", "channels,groups,attention,ffn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_is_masked_whatever_the_units(family: str, units: str) -> None:
    dense = make_tiny(family, **WIDE)
    result = prune(make_tiny(family, **WIDE), replace(PLAIN, units=units))
    expected = logits(masked(dense, result.plan))
    assert torch.allclose(logits(result.model), expected, atol=1e-5)
    assert not torch.allclose(logits(make_tiny(family, **WIDE)), expected, atol=1e-3)
    counts = [block.counts for block in result.plan.blocks]
    assert any(groups < 4 for _, groups in counts)
    assert all(width == 48 for width, _ in counts) == (units == "groups")


@pytest.mark.parametrize("family", FAMILIES)
def test_disk_to_disk_gives_the_bytes_of_memory_and_both_reload(
    family: str, tmp_path: Path
) -> None:
    dense = tmp_path / "dense"
    make_tiny(family, **WIDE).save_pretrained(dense)
    make_tokenizer().save_pretrained(dense)
    recipe = replace(PLAIN, units="channels,groups,attention,ffn", sparsity=0.5)
    streamed = prune(dense, recipe, tmp_path / "streamed")
    live = prune(make_tiny(family, **WIDE), recipe, tmp_path / "live")
    assert streamed.plan.blocks[2].counts == live.plan.blocks[2].counts
    files = [load_file(tmp_path / n / "model.safetensors") for n in ("streamed", "live")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed", trust_remote_code=True)
    assert torch.equal(logits(reloaded), logits(live.model))


def test_a_plan_keeps_what_it_says_of_groups(tmp_path: Path) -> None:
    result = prune(make_tiny(**WIDE), replace(PLAIN, units="channels,groups,attention,ffn"))
    save_plan(result.plan, tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    for own, other in zip(loaded.blocks, result.plan.blocks, strict=True):
        assert own.units == other.units
        assert all(map(torch.equal, own.kept, other.kept))
    again = prune(make_tiny(**WIDE), PLAIN, plan=loaded)
    assert torch.equal(logits(again.model), logits(result.model))


def test_first_and_last_block_keep_an_attention_and_an_ffn() -> None:
    model = make_tiny(**WIDE)
    for layer in (model.model.layers[0], model.model.layers[-1]):
        for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
            output.weight.data *= 1e-4  # nothing costs less
    recipe = replace(PLAIN, units="channels,groups,attention,ffn", error_scale="absolute")
    counts = [block.counts for block in prune(model, recipe).plan.blocks]
    assert counts[0] == counts[-1] == (8, 1)


def test_parts_that_cost_nothing_to_lose_go_whole() -> None:
    def make() -> PreTrainedModel:
        model = make_tiny(**WIDE)
        model.model.layers[2].self_attn.o_proj.weight.data *= 1e-4
        model.model.layers[1].mlp.down_proj.weight.data *= 1e-4
        return model

    recipe = replace(PLAIN, units="channels,groups,attention,ffn", error_scale="absolute")
    result = prune(make(), recipe)
    counts = [block.counts for block in result.plan.blocks]
    assert counts[2][1] == 0
    assert counts[1][0] == 0
    layers = result.model.config.per_layer_config
    assert [own.skip or None for own in layers] == [
        None,
        ["mlp"],
        ["attention"],
        None,
        None,
    ]
    assert torch.allclose(logits(result.model), logits(masked(make(), result.plan)), atol=1e-5)


def test_a_group_multiple_is_kept() -> None:
    plan = prune(make_tiny(**WIDE), replace(PLAIN, group_multiple=2)).plan
    assert {block.counts[1] for block in plan.blocks} == {2, 4}


@pytest.mark.parametrize("compensation", ["least-squares", "least-squares-bias"])
def test_least_squares_make_up_for_groups_too(compensation: str) -> None:
    recipe = replace(PLAIN, units="groups", sparsity=0.5)
    dense, plain = logits(make_tiny(**WIDE)), prune(make_tiny(**WIDE), recipe)
    plan = replace(plain.plan, recipe=replace(recipe, compensation=compensation))
    fitted = prune(make_tiny(**WIDE), recipe, plan=plan)
    lost, plainly = ((logits(x.model) - dense).square().sum() for x in (fitted, plain))
    assert lost < plainly


def test_a_bias_puts_the_mean_of_removed_groups_back() -> None:
    recipe = replace(PLAIN, units="groups", sparsity=0.5, compensation="bias")
    statistics = cfsp.calibrate(make_tiny(**WIDE), make_tokenizer(), recipe, progress=False)
    result = prune(make_tiny(**WIDE), recipe, statistics=statistics)
    outputs = [o_proj for _, o_proj in projections(make_tiny(**WIDE))]
    for number, block in enumerate(result.plan.blocks):
        mean = statistics.blocks[number].parts()[1].mean.clone()
        mean[block.units[1].columns_of(block.kept[1][0])] = 0
        expected = outputs[number].weight.double() @ mean
        found = result.model.model.layers[number].self_attn.o_proj.bias
        assert torch.allclose(found.double(), expected, atol=1e-6)


def test_published_flap_has_one_threshold_for_heads_and_channels() -> None:
    recipe = replace(PLAIN, scorer="flap", allocator=None, compensation=None)
    plan = prune(make_tiny(**WIDE), recipe).plan
    assert plan.recipe.resolved_allocator == "global"
    assert plan.recipe.resolved_compensation == "bias"
    assert 0 < sum(block.counts[1] for block in plan.blocks) < 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"units": "heads"}, "unit 'heads'"),
        ({"units": ""}, "unit ''"),
        ({"units": "channels,groups", "uniform": True, "allocator": None}, "uniform"),
        ({"scorer": "cfsp-balanced"}, "scorer 'cfsp-balanced' is of FFNs alone"),
        ({"group_multiple": 0}, "group_multiple must be 1 or more"),
    ],
)
def test_bad_units_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(CfspError, match=message):
        replace(PLAIN, **change)
