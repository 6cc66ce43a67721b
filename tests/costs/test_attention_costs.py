"""What attention costs, dense, pruned and gone; budgets of KV bytes, alone and beside another."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

import cfsp
from cfsp.api import plan as planned
from cfsp.calibration.statistics import Statistics
from cfsp.costs.budgets import check_recipe
from cfsp.costs.dry_run import Request, estimate_opened
from cfsp.costs.flops import costs_of
from cfsp.costs.footprint import Footprints, footprints
from cfsp.costs.hardware import MemoryBudget
from cfsp.errors import CfspError
from cfsp.io.safetensors import TensorInfo
from cfsp.models.descriptions import block_path
from cfsp.models.loading import cache_argument
from cfsp.models.opening import OpenModel, open_any
from cfsp.pruning.budget import parse_model_budgets
from cfsp.pruning.compaction import prune_model_
from cfsp.pruning.plan import PruningPlan
from cfsp.pruning.second_pass import SecondPass

from ..conftest import TEXT, make_tiny, make_tokenizer
from .test_estimate import build

TOKENS = torch.arange(48).view(2, 24)
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 400,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
MODELS = {
    "llama": SHAPE,
    "qwen3": {**SHAPE, "head_dim": 16},
    "phi3": {**SHAPE, "pad_token_id": 0},
    "opt": {**SHAPE, "ffn_dim": 400, "word_embed_proj_dim": 64},
    "gpt2": {"n_inner": 400, "n_embd": 64, "n_head": 8, "num_hidden_layers": 4},
}
"""Groups of two heads, norms of heads, fused, single heads with biases, Conv1D."""
LOUDNESS = {"opt": 0.5, "gpt2": 1.0}
ALL = "channels,groups,attention,ffn"
RECIPE = cfsp.Recipe(
    scorer="activation-norm",
    allocator="knapsack",
    compensation="none",
    units="channels,groups",
    width_multiple=1,
    calibration=cfsp.Calibration(dataset=TEXT, samples=4, seqlen=32),
)


def make(model_type: str, **more: object) -> PreTrainedModel:
    """What attention adds is much less than what FFNs add in one block, much more in another, so
    that units of both go."""
    torch.manual_seed(0)
    model = build(model_type, "eager", **{**MODELS[model_type], **more})
    names = ("o_proj.weight", "attn.c_proj.weight", "out_proj.weight")
    outputs = [x for name, x in model.named_parameters() if name.endswith(names)]
    for number, output in enumerate(outputs):
        output.data *= LOUDNESS.get(model_type, 0.05) * 5 ** (number - 1.5)
    return model


@pytest.fixture(scope="module")
def calibrated() -> dict[str, tuple[PreTrainedModel, Statistics]]:
    """Every model with its statistics, attention included; models stay dense."""
    found = {}
    for name in MODELS:
        model = make(name)
        gram = replace(RECIPE, units=ALL)
        found[name] = model, cfsp.calibrate(model, make_tokenizer(), gram, progress=False)
    return found


def pruned(
    model: PreTrainedModel, statistics: Statistics, recipe: cfsp.Recipe
) -> tuple[PreTrainedModel, PruningPlan, Footprints]:
    plan = planned(statistics, model, recipe)
    layout = opened(model).layout
    found = footprints(opened(model).described, plan)
    copy = make(model.config.model_type)
    copy.load_state_dict(model.state_dict())
    prune_model_(copy, layout, plan.recipe, SecondPass(plan).turn, progress=False)
    return copy, plan, found


def opened(model: PreTrainedModel) -> OpenModel:
    return open_any(model, None, attention=True)


def parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def flops(model: PreTrainedModel) -> int:
    with FlopCounterMode(display=False) as counted:
        model(input_ids=TOKENS, use_cache=False)
    return counted.get_total_flops()


@torch.no_grad()
def cached_bytes(model: PreTrainedModel) -> int:
    """Of a token, by what a forward call leaves; one value of a block without attention apart."""
    cache = DynamicCache(config=model.config)
    model(input_ids=TOKENS, **{cache_argument(model): cache}, use_cache=True)
    kept = (x for layer in cache.layers for x in (layer.keys, layer.values))
    return sum(x.nbytes for x in kept if x.shape[-1] > 1) // TOKENS.numel()


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("units", ["channels,groups", ALL])
def test_a_pruned_model_costs_what_its_plan_says(model_type: str, units: str, calibrated) -> None:
    model, statistics = calibrated[model_type]
    units = units.replace(",ffn", "") if model_type == "opt" else units  # whose FFN is no module
    recipe = replace(RECIPE, units=units, budget="flops=0.4@2x24")
    left, plan, found = pruned(model, statistics, recipe)
    assert found.before.flops == flops(model)
    assert found.after.flops == flops(left) == pytest.approx(0.6 * flops(model), rel=0.005)
    assert found.before.kv_bytes == cached_bytes(model)
    assert found.after.kv_bytes == cached_bytes(left) < cached_bytes(model)
    assert found.after.parameters == parameters(left)
    assert any(block.counts[1] < block.units[1].count for block in plan.blocks)


@pytest.mark.parametrize("model_type", MODELS)
def test_attention_and_ffns_that_are_gone_cost_nothing(model_type: str, calibrated) -> None:
    model, statistics = calibrated[model_type]
    plan = planned(statistics, model, replace(RECIPE, units=ALL, budget="params=0.1"))
    blocks = list(plan.blocks)
    none = torch.empty(1, 0, dtype=torch.int64)
    gone = {1: (1,), 2: (1,) if model_type == "opt" else (0, 1)}
    for number, parts in gone.items():
        kept = tuple(none if n in parts else own for n, own in enumerate(blocks[number].kept))
        blocks[number] = replace(blocks[number], kept=kept)
    plan = replace(plan, blocks=tuple(blocks), recipe=replace(plan.recipe, budget=None))
    whole, copy = opened(model), make(model_type)
    prune_model_(copy, whole.layout, plan.recipe, SecondPass(plan).turn, progress=False)
    found = footprints(whole.described, plan).after
    assert found.parameters == parameters(copy)
    assert found.kv_bytes == cached_bytes(copy)
    per_token = costs_of(
        model.config,
        {n: TensorInfo(p.dtype, tuple(p.shape)) for n, p in copy.named_parameters()},
        block_path(model),
        4,
        whole.layout.attention,
    )
    assert per_token.flops(24) * TOKENS.numel() == flops(copy)
    assert [block.attention is None for block in per_token.blocks] == [False, True, True, False]
    assert [bool(block.ffn) for block in per_token.blocks] == [
        0 not in gone.get(number, ()) for number in range(4)
    ]


def test_a_reloaded_model_costs_what_its_config_says(tmp_path: Path) -> None:
    """Heads of every block stand in per_layer_config, and what is skipped."""
    from ..pruning.test_units import WIDE

    recipe = replace(RECIPE, units=ALL, sparsity=0.5, width_multiple=8)
    result = cfsp.prune(
        make_tiny(**WIDE),
        make_tokenizer(),
        recipe,
        tmp_path / "out",
        progress=False,
        eval_windows=0,
    )
    left = cfsp.load(tmp_path / "out")
    found = open_any(left)
    assert found.layout.attention is None
    costs = costs_of(left.config, found.described.parameters, found.described.blocks, 4)
    assert costs.kv_bytes == result.report.sizes.after.kv_bytes
    assert costs.flops(128) * 128 == result.report.sizes.after.flops
    groups = [block.counts[1] for block in result.plan.blocks]
    assert [x.attends.key_heads if x.attends else 0 for x in costs.blocks] == groups
    assert len(set(groups)) > 1


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_kv_bytes_go_from_attention_alone(model_type: str, share: float, calibrated) -> None:
    model, statistics = calibrated[model_type]
    left, plan, found = pruned(model, statistics, replace(RECIPE, budget=f"kv={share}"))
    assert cached_bytes(left) == (1 - share) * cached_bytes(model) == found.after.kv_bytes
    assert all(block.counts[0] == block.units[0].count for block in plan.blocks)


def test_ffns_of_a_kv_budget_stay_whole_at_any_width_multiple(calibrated) -> None:
    model, statistics = calibrated["llama"]
    for allocator in ("knapsack", "uniform", "global", "cfsp", "cfsp-filled"):
        recipe = replace(RECIPE, budget="kv=0.5", width_multiple=128, allocator=allocator)
        plan = planned(statistics, model, recipe)
        assert [block.counts[0] for block in plan.blocks] == [400] * 4  # no multiple of 128
        assert sum(block.counts[1] for block in plan.blocks) == 8


def test_a_group_multiple_meets_kv_bytes_to_half_of_it(calibrated) -> None:
    model, statistics = calibrated["llama"]
    for share, groups in ((0.5, 8), (0.3, 12), (0.4, 10)):
        recipe = replace(RECIPE, budget=f"kv={share}", group_multiple=2)
        plan = planned(statistics, model, recipe)
        counts = [block.counts[1] for block in plan.blocks]
        assert abs(sum(counts) - (1 - share) * 16) <= 1
        assert abs(sum(counts) - groups) <= 2
        assert all(count in (2, 4) for count in counts)


@pytest.mark.parametrize("first", ["params=0.1", "flops=0.08@2x24", "params=20000"])
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_two_budgets_are_both_met(model_type: str, first: str, calibrated) -> None:
    model, statistics = calibrated[model_type]
    first = f"params={0.9 * parameters(model):.0f}" if first == "params=20000" else first
    recipe = replace(RECIPE, budget=f"{first},kv=0.5")
    left, plan, found = pruned(model, statistics, recipe)
    assert found.after.kv_bytes == cached_bytes(left) <= cached_bytes(model) / 2
    kept, total = (parameters(left), parameters(model))
    if first.startswith("flops"):
        kept, total = flops(left), flops(model)
    keep = {"flops=0.08@2x24": 0.92}.get(first, 0.9)
    assert kept == pytest.approx(keep * total, rel=0.005)
    alone = planned(statistics, model, replace(recipe, budget=first))
    groups = [sum(block.counts[1] for block in own.blocks) for own in (plan, alone)]
    channels = [sum(block.counts[0] for block in own.blocks) for own in (plan, alone)]
    assert groups[0] < groups[1]
    assert channels[0] > channels[1]
    assert planned(statistics, model, replace(recipe, budget=f"kv=0.5,{first}")).widths == (
        plan.widths
    )


def test_a_second_budget_that_the_first_meets_changes_nothing(calibrated) -> None:
    model, statistics = calibrated["llama"]
    one, both = (
        planned(statistics, model, replace(RECIPE, budget=f"params=0.4{more}"))
        for more in ("", ",kv=0.01")
    )
    assert sum(block.counts[1] for block in one.blocks) < 15
    assert [block.counts for block in one.blocks] == [block.counts for block in both.blocks]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": "kv=0.5", "units": "channels"}, "kv=0.5: KV bytes go with `units` groups or"),
        ({"budget": "params=0.2,kv=0.5", "units": "channels,ffn"}, "kv=0.5: KV bytes go with"),
        ({"budget": "params=0.2,kv=0.5", "allocator": "uniform"}, "two budgets are for allocator"),
        ({"budget": "kv=0.5", "allocator": "search"}, "'search' keeps what channels cost, not KV"),
        ({"budget": "kv=2"}, "budget 'kv=2': kv is a fraction to remove, below 1"),
        ({"budget": "kv=0.5@1x8"}, "KV bytes of a token are the same at any batch and length"),
        ({"budget": "kv=0.5,kv=0.4"}, "two at once are one of KV bytes and one other"),
        ({"budget": "params=0.5,flops=0.4"}, "two at once are one of KV bytes and one other"),
        ({"budget": "params=0.5,flops=0.4,kv=0.2"}, "two at once are one of KV bytes and one"),
        ({"budget": "params=0.5,"}, "budget '': expected params=0.25"),
    ],
)
def test_budgets_that_are_nothing_for_a_recipe_are_refused(
    change: dict[str, str], message: str
) -> None:
    with pytest.raises(CfspError, match=message) as error:
        replace(RECIPE, **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("kv=0.9", "kv=0.9 is out of reach: numbers of KV groups allow kv=0.0000 to 0.7500"),
        ("params=0.05,kv=0.75", "params=0.05: beside kv=0.75 no plan keeps more than params=0."),
        ("params=0.95,kv=0.5", "params=0.95 is out of reach: "),
        ("params=0.2,kv=0.9", "kv=0.9 is out of reach: numbers of KV groups allow"),
    ],
)
def test_budgets_out_of_reach_are_told_early(budget: str, message: str) -> None:
    described = opened(make("llama")).described
    with pytest.raises(CfspError, match=message) as error:
        check_recipe(described, replace(RECIPE, budget=budget))
    assert "\n" not in str(error.value)


def test_heads_that_share_one_kv_head_have_no_kv_budget() -> None:
    described = opened(build("falcon", "eager")).described
    with pytest.raises(CfspError, match=r"kv=0\.5: no KV bytes go with what `units` may take"):
        check_recipe(described, replace(RECIPE, budget="kv=0.5"))


@pytest.mark.parametrize(
    ("model_type", "values"),
    [("llama", 2 * 2 * 8), ("falcon", 2 * 8), ("mixtral", 2 * 2 * 8), ("deepseek_v3", None)],
)
def test_kv_bytes_of_a_dense_model_are_those_of_its_cache(
    model_type: str, values: int | None
) -> None:
    """One KV head for all in Falcon; not known of latent attention."""
    torch.manual_seed(0)
    model = build(model_type, "eager", num_hidden_layers=3)
    tensors = {n: TensorInfo(p.dtype, tuple(p.shape)) for n, p in model.named_parameters()}
    found = costs_of(model.config, tensors, block_path(model), 4)
    assert found.kv_bytes == (3 * 4 * values if values else None)
    if values:
        assert found.kv_bytes == cached_bytes(model)


def test_footprints_say_kv_bytes_where_they_are_known(calibrated) -> None:
    model, statistics = calibrated["llama"]
    *_, found = pruned(model, statistics, replace(RECIPE, budget="kv=0.5"))
    assert ("KV cache, bytes per token", "1,024", "512 (50.0%)") in found.rows()
    unknown = replace(found, before=replace(found.before, kv_bytes=None))
    assert "KV cache" not in str(unknown.rows())


def test_flops_after_a_context_count_its_keys(calibrated) -> None:
    model, statistics = calibrated["llama"]
    recipe = replace(RECIPE, budget="flops=0.25@2x8+16")
    *_, found = pruned(model, statistics, recipe)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=TOKENS[:, :16], **{cache_argument(model): cache}, use_cache=True)
        with FlopCounterMode(display=False) as counted:
            model(input_ids=TOKENS[:, 16:], **{cache_argument(model): cache}, use_cache=True)
    assert found.before.flops == counted.get_total_flops()
    assert found.after.flops == pytest.approx(0.75 * found.before.flops, rel=0.005)
    assert any(title == "FLOPs, 2 x 8 tokens after 16" for title, *_ in found.rows())


def test_contexts_are_read() -> None:
    (found,) = parse_model_budgets("latency=0.25@8x1+4096")
    assert found.shape == (8, 1, 4096)
    assert [own.text for own in parse_model_budgets("kv=0.5, latency=0.25@8x1")] == [
        "latency=0.25@8x1",
        "kv=0.5",
    ]


def test_scorers_that_read_weights_read_those_of_attention_once_more_too(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = open_any(tmp_path, attention=True)
    recipe = replace(RECIPE, scorer="flap", allocator="global")
    found = estimate_opened(model, Request(recipe, 0), MemoryBudget(), measure=False)
    read = {stage.name: stage.bytes_read for stage in found.stages}["score"]
    assert read == 4 * 4 * 64 * (3 * 400 + 2 * 64 + 2 * 32)


def test_blocks_without_an_ffn_have_estimates_of_refits_too(calibrated) -> None:
    model, statistics = calibrated["llama"]
    plan = planned(statistics, model, replace(RECIPE, units=ALL, budget="params=0.1"))
    kept = (torch.empty(1, 0, dtype=torch.int64), plan.blocks[1].kept[1])
    blocks = (plan.blocks[0], replace(plan.blocks[1], kept=kept), *plan.blocks[2:])
    recipe = replace(plan.recipe, budget=None, compensation="least-squares", sequential=True)
    plan = replace(plan, blocks=blocks, recipe=recipe)
    request = Request(recipe, 0, plan=plan)
    found = estimate_opened(opened(model), request, MemoryBudget(), measure=False)
    assert found.parameters_after < found.parameters
