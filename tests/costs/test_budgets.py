"""Budgets of a whole model: read, met by what is really left, refused where they cannot be met."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedModel

import cfsp
from cfsp.api import plan as planned
from cfsp.calibration.collect import collect_statistics
from cfsp.calibration.statistics import Statistics
from cfsp.costs.budgets import check_recipe
from cfsp.costs.footprint import Footprints, footprints
from cfsp.errors import CfspError
from cfsp.models.opening import adopt
from cfsp.pruning.budget import parse_model_budget
from cfsp.pruning.compaction import prune_model_
from cfsp.pruning.plan import PruningPlan
from cfsp.pruning.second_pass import SecondPass

from ..cli.test_cli import EXACT, SMALL, run
from ..conftest import make_tiny
from .test_estimate import CONFIGS, build

MULTIPLE = {"qwen3_moe": 8, "deepseek_v3": 8}
TOKENS = torch.arange(48).view(2, 24)
WIDE = {"intermediate_size": 400}
MODELS = {
    "llama": WIDE,
    "phi3": {**WIDE, "pad_token_id": 0},
    "opt": {"ffn_dim": 400, "word_embed_proj_dim": 64},
    "gpt2": {"n_inner": 400, "n_embd": 64, "n_head": 8, "n_layer": 2},
    "qwen3_moe": {"num_hidden_layers": 3, "mlp_only_layers": [0], **WIDE},
    "deepseek_v3": {"num_hidden_layers": 2, **WIDE},
}
"""Gated, fused, with biases, Conv1D, and blocks of unequal costs: experts, shared ones and none."""


@pytest.fixture(scope="module")
def calibrated() -> dict[str, tuple[PreTrainedModel, Statistics]]:
    """Every model with its statistics; models stay dense."""
    found = {}
    for name, shape in MODELS.items():
        torch.manual_seed(0)
        model = build(name, "eager", **shape)
        opened = adopt(model, None)
        found[name] = (
            model,
            collect_statistics(
                model, opened.layout, TOKENS, micro_batch=2, progress=False, provenance={}
            ),
        )
    return found


def pruned(
    model: PreTrainedModel, statistics: Statistics, recipe: cfsp.Recipe
) -> tuple[PreTrainedModel, PruningPlan, Footprints]:
    """A copy of a model, cut to the recipe's budget."""
    plan = planned(statistics, model, recipe)
    opened = adopt(model, None)
    found = footprints(opened.described, plan)
    copy = build(model.config.model_type, "eager", **MODELS[model.config.model_type])
    copy.load_state_dict(model.state_dict())
    turn = SecondPass(plan, statistics).turn
    prune_model_(copy, opened.layout, plan.recipe, turn, progress=False)
    return copy, plan, found


def parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model: PreTrainedModel, tokens: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(input_ids=tokens, use_cache=False)
    return counted.get_total_flops()


@pytest.mark.parametrize("model_type", MODELS)
def test_the_parameters_left_are_those_asked_for(model_type: str, calibrated) -> None:
    model, statistics = calibrated[model_type]
    for amount, keep in (("0.15", 0.85), (f"{round(0.9 * parameters(model))}", 0.9)):
        multiple = MULTIPLE.get(model_type, 1)
        recipe = cfsp.Recipe(scorer="cfsp", budget=f"params={amount}", width_multiple=multiple)
        left, _, found = pruned(model, statistics, recipe)
        assert found.after.parameters == parameters(left)
        assert found.before.parameters == parameters(model)
        assert parameters(left) == pytest.approx(keep * parameters(model), rel=0.005)


@pytest.mark.parametrize("model_type", MODELS)
def test_the_flops_left_are_those_asked_for(model_type: str, calibrated) -> None:
    model, statistics = calibrated[model_type]
    multiple = MULTIPLE.get(model_type, 1)
    recipe = cfsp.Recipe(scorer="cfsp", budget="flops=0.2@2x24", width_multiple=multiple)
    left, _, found = pruned(model, statistics, recipe)
    assert (found.batch, found.length) == (2, 24)
    assert found.before.flops == flops(model, TOKENS)
    assert found.after.flops == flops(left, TOKENS)
    assert flops(left, TOKENS) == pytest.approx(0.8 * flops(model, TOKENS), rel=0.005)


@pytest.mark.parametrize("allocator", ["uniform", "global"])
def test_biases_that_the_compensation_adds_are_counted(allocator: str, calibrated) -> None:
    model, statistics = calibrated["llama"]
    recipe = cfsp.Recipe(budget="params=0.2", width_multiple=1, scorer="flap", allocator=allocator)
    left, plan, found = pruned(model, statistics, recipe)
    added = sum(p.numel() for name, p in left.named_parameters() if name.endswith("proj.bias"))
    assert added == 2 * 64
    assert parameters(left) == found.after.parameters
    # exact: without the biases counted it would be off by most of a channel
    wanted = 0.8 * parameters(model)
    assert abs(parameters(left) - wanted) <= 3 * 64 / 2
    plain = planned(statistics, model, replace(recipe, compensation="none"))
    assert sum(plain.widths) > sum(plan.widths)


def test_experts_count_as_a_token_meets_them(calibrated) -> None:
    """Parameters go where experts are many; FLOPs, of two experts in eight, from the plain FFN."""
    model, statistics = calibrated["qwen3_moe"]
    by_params, by_flops = (
        planned(statistics, model, cfsp.Recipe(scorer="cfsp", budget=budget, width_multiple=8))
        for budget in ("params=0.2", "flops=0.2@1x24")
    )
    assert by_params.sparsity < by_flops.sparsity


def test_one_width_for_all_meets_the_budget_or_says_that_it_cannot(calibrated) -> None:
    model, statistics = calibrated["llama"]
    exact = cfsp.Recipe(scorer="cfsp", budget="params=0.2", width_multiple=1, uniform=True)
    left, plan, _ = pruned(model, statistics, exact)
    assert len(set(plan.widths)) == 1
    assert parameters(left) == pytest.approx(0.8 * parameters(model), rel=0.005)
    coarse = replace(exact, width_multiple=128)
    with pytest.raises(CfspError, match=r"of 128 come to params=0\.\d+; take `width_multiple=\d"):
        planned(statistics, model, coarse)
    with pytest.raises(CfspError, match=r"of 128 come to params=0\.\d+; take `width_multiple=\d"):
        check_recipe(adopt(model, None).described, coarse)


SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("configs")
    AutoConfig.for_model("llama", **SMOLLM2).save_pretrained(folder)
    return {
        "SmolLM2-135M": folder / "config.json",
        **{name: CONFIGS / f"{name}.json" for name in ("Llama-3-8B", "Qwen3-235B-A22B")},
    }


@pytest.mark.parametrize(
    ("name", "budget", "keep"),
    [
        ("SmolLM2-135M", "params=0.25", 0.75),
        ("SmolLM2-135M", "params=100M", 100e6),
        ("SmolLM2-135M", "flops=0.25", 0.75),
        ("SmolLM2-135M", "flops=0.2@4x64", 0.8),
        ("Llama-3-8B", "params=6B", 6e9),
        ("Llama-3-8B", "flops=0.3", 0.7),
        ("Qwen3-235B-A22B", "flops=0.2", 0.8),
    ],
)
def test_real_shapes_meet_budgets_in_multiples_of_128(
    name: str, budget: str, keep: float, configs: dict[str, Path]
) -> None:
    found = cfsp.estimate(
        configs[name], cfsp.Recipe(scorer="cfsp", budget=budget), hardware="h100"
    ).sizes
    assert found is not None
    unit = "flops" if budget.startswith("flops") else "parameters"
    before, after = (getattr(side, unit) for side in (found.before, found.after))
    assert after == pytest.approx(keep if keep > 1 else keep * before, rel=0.005)
    assert found.after.channels % 128 == 0
    known = {"SmolLM2-135M": 134_515_008, "Llama-3-8B": 8_030_261_248}
    assert found.before.parameters == known.get(name, found.before.parameters)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.25", "budget '0.25': expected params=0.25, params=6B, flops=0.25 or latency=0.25"),
        ("memory=0.25", "budget 'memory=0.25': expected"),
        ("params=-1", "budget 'params=-1': expected"),
        ("params=x", "budget 'params=x': expected"),
        ("flops=6B", "budget 'flops=6B': flops is a fraction to remove, below 1"),
        ("latency=1.5", "budget 'latency=1.5': latency is a fraction"),
        ("params=0.2@1x8", "budget 'params=0.2@1x8': parameters are the same at any batch"),
        ("flops=0.2@0x8", "budget 'flops=0.2@0x8': batch and length must be 1 or more"),
    ],
)
def test_what_is_no_budget_is_refused(text: str, message: str) -> None:
    with pytest.raises(CfspError, match=message):
        cfsp.Recipe(budget=text)


def test_budgets_are_read() -> None:
    assert parse_model_budget("params=6B").parameters == 6 * 10**9
    assert parse_model_budget("params=98.5m").parameters == 98_500_000
    assert parse_model_budget("params=.25").kept(100) == 75
    shaped = parse_model_budget("flops=0.25@8x2048")
    assert (shaped.fraction, shaped.batch, shaped.length) == (0.25, 8, 2048)
    plain = parse_model_budget("latency=0.3")
    assert (plain.batch, plain.length) == (1, 1024)
    with pytest.raises(CfspError, match=r"budget params=0.2 and sparsity 0.5 exclude each other"):
        cfsp.Recipe(budget="params=0.2", sparsity=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "params=0.9"], "params=0.9 is out of reach: the FFNs, in multiples of 1, "),
        (["--budget", "params=1M"], "params=1M is out of reach: "),
        (["--budget", "flops=0.9"], "seqlen 1024 is beyond the model's 128 positions"),
        (["--budget", "flops=0.9@1x64"], "flops=0.9@1x64 is out of reach: "),
        (
            ["--budget", "params=0.145", "--width-multiple", "16"],
            "params=0.145: widths in multiples of 16 come to params=0.1",
        ),
        (["--budget", "params=0.2", "--width-multiple", "32"], "params=0.2 is out of reach: "),
        (["--budget", "params=0.2", "--scorer", "x"], "unknown scorer 'x'"),
        (["--budget", "fast"], "budget 'fast': expected params=0.25"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_budgets_out_of_reach_are_told_before_the_work(
    options: list[str],
    message: str,
    dry: bool,
    tmp_path: Path,
    tiny_cli_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = ["--dry-run"] if dry else ["--out", tmp_path / "out"]
    code, _, error = run(capsys, "prune", tiny_cli_folder, *out, *SMALL, *EXACT, *options)
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith(f"cfsp: error: {message}")
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def tiny_cli_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ..conftest import make_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_the_result_states_every_unit(
    tiny_cli_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "--width-multiple", 1, "--budget", "flops=0.1@2x16"]
    out = tmp_path / "out"
    code, printed, error = run(capsys, "prune", tiny_cli_folder, "--out", out, *options)
    assert code == 0, error
    result = json.loads(run(capsys, "prune", tiny_cli_folder, "--dry-run", "--json", *options)[1])
    sizes = result["sizes"]
    left = cfsp.load(out)
    capsys.readouterr()
    assert sizes["after"]["parameters"] == parameters(left)
    assert sizes["after"]["flops"] == pytest.approx(0.9 * sizes["before"]["flops"], rel=0.005)
    card = (out / "README.md").read_text()
    for title in ("FFN channels", "parameters", "FLOPs, 2 x 16 tokens", "latency, 2 x 16 tokens"):
        assert f"| {title} | " in card
        assert f"{title}: " in printed
    assert "not measured" in card
    assert cfsp.load_recipe(out / "recipe.yaml").budget == "flops=0.1@2x16"
    both = ["--sparsity", 0.2, "--budget", "params=0.2"]
    code, _, error = run(capsys, "prune", tiny_cli_folder, "--dry-run", *both)
    assert (code, error.count("\n")) == (2, 1)
    assert "argument --budget: not allowed with argument --sparsity" in error


def test_the_command_line_overrides_what_the_recipe_says(
    tiny_cli_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text("budget: params=0.1\nwidth_multiple: 1\n")
    (tmp_path / "other.yaml").write_text("sparsity: 0.5\nwidth_multiple: 1\n")
    found = {}
    for name, options in (
        ("file", ["--recipe", tmp_path / "recipe.yaml"]),
        ("sparsity", ["--recipe", tmp_path / "recipe.yaml", "--sparsity", 0.5]),
        ("budget", ["--recipe", tmp_path / "other.yaml", "--budget", "params=0.1"]),
    ):
        arguments = ["prune", tiny_cli_folder, "--dry-run", "--json", *SMALL, *options]
        sizes = json.loads(run(capsys, *arguments)[1])["sizes"]
        found[name] = sizes["after"]["channels"] / sizes["before"]["channels"]
    assert found["sparsity"] == 0.5
    assert found["file"] == found["budget"] != 0.5
