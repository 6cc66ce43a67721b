"""Scorer obs and error curves on models: from Gram matrices, kept, used, and searched from."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cfsp
from cfsp.calibration.collect import collect_statistics
from cfsp.calibration.grams import temporary_folder
from cfsp.calibration.statistics import Statistics, statistics_fingerprint
from cfsp.calibration.windows import calibration_windows
from cfsp.cli.main import main
from cfsp.errors import CfspError
from cfsp.evaluation.quality import perplexity
from cfsp.models.channels import FFNWeights
from cfsp.models.layouts import LAYOUTS
from cfsp.models.opening import adopt
from cfsp.pruning.allocation import AllocationProblem, allocate_widths
from cfsp.pruning.compaction import prune_block_, prune_model_
from cfsp.pruning.plan import make_plan, select_channels
from cfsp.pruning.ranking import rank, scaled_curves, with_ranking
from cfsp.pruning.search import CutBlocks, width_search

from ..conftest import make_tiny, make_tokenizer

OBS = cfsp.Recipe(
    sparsity=0.3,
    scorer="obs",
    width_multiple=1,
    calibration=cfsp.Calibration(dataset="builtin", samples=20, seqlen=16),
)
SEARCH = replace(OBS, allocator="search", search_generations=3, search_offspring=2)


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    """Of the tiny Llama, with Gram matrices."""
    return cfsp.calibrate(make_tiny(), make_tokenizer(), OBS, gram=True, progress=False)


def refuse(number: int) -> Sequence[FFNWeights]:
    raise AssertionError("weights were read")


def weights_of(model: torch.nn.Module) -> Callable[[int], Sequence[FFNWeights]]:
    return adopt(model, None).blocks.ffn_weights


def output_error(
    statistics: Statistics, number: int, kept: torch.Tensor, recipe: cfsp.Recipe
) -> float:
    """Mean square error of a block's FFN output on the fitting tokens, after compensation."""
    model = make_tiny()
    block = model.model.layers[number]
    dense = block.mlp.down_proj.weight.detach().double()
    plan = make_plan(statistics, weights_of(model), replace(recipe, allocator="uniform"))
    own = replace(plan.blocks[number], kept=(kept[None],))
    known = statistics.blocks[number]
    prune_block_(block, LAYOUTS["llama"], own, recipe.resolved_compensation, recipe.damping, known)
    change = -dense
    change[:, kept] += block.mlp.down_proj.weight.detach().double()
    gram = known.gram.fit().moments(centred=recipe.resolved_compensation == "bias").double()
    return float((change @ gram * change).sum()) / len(dense)


@pytest.mark.parametrize("compensation", ["none", "bias", "least-squares"])
def test_the_curve_is_the_error_of_the_pruned_ffn(
    statistics: Statistics, compensation: str
) -> None:
    recipe = replace(OBS, compensation=compensation)
    ranking = rank(statistics, weights_of(make_tiny()), recipe)
    for number in (0, 3):
        curve, scores = ranking.curves[number], ranking.scores[number]
        assert curve.widths.tolist() == list(range(49))
        for width in (20, 40):
            kept = select_channels(scores, width)
            expected = output_error(statistics, number, kept, recipe)
            assert float(curve.errors[width]) == pytest.approx(expected, rel=1e-3)


def test_obs_with_its_knapsack_errs_least(statistics: Statistics) -> None:
    weights = weights_of(make_tiny())

    def summed(recipe: cfsp.Recipe) -> float:
        ranking = rank(statistics, weights, recipe, curves=True)
        widths = make_plan(statistics, weights, recipe).widths
        assert sum(widths) == round(0.7 * 4 * 48)
        curves = scaled_curves(ranking, statistics, recipe)
        return sum(
            float(curve.at(torch.tensor([width]))[0])
            for curve, width in zip(curves, widths, strict=True)
        )

    obs = summed(OBS)
    uniform = summed(replace(OBS, allocator="uniform"))
    norms = summed(replace(OBS, scorer="cfsp", compensation="least-squares", allocator="uniform"))
    assert obs < uniform < norms


def test_scale_and_importance_move_the_widths(statistics: Statistics) -> None:
    weights = weights_of(make_tiny())
    plans = [
        make_plan(statistics, weights, replace(OBS, **choice)).widths
        for choice in (
            {},
            {"error_scale": "hidden"},
            {"error_scale": "absolute"},
            {"importance_exponent": 4.0},
        )
    ]
    assert len(set(plans)) >= 3


def test_a_kept_ranking_needs_neither_weights_nor_gram_matrices(
    statistics: Statistics, tmp_path: Path
) -> None:
    weights = weights_of(make_tiny())
    recipe = replace(OBS, compensation="none")
    cfsp.save_statistics(with_ranking(statistics, weights, recipe), tmp_path / "s")
    loaded = cfsp.load_statistics(tmp_path / "s").without_grams()
    for sparsity in (0.2, 0.5):
        asked = replace(recipe, sparsity=sparsity)
        found = make_plan(loaded, refuse, asked)
        expected = make_plan(statistics, weights, asked)
        assert found.widths == expected.widths
        for a, b in zip(found.blocks, expected.blocks, strict=True):
            assert torch.equal(a.flat_kept, b.flat_kept)
    with pytest.raises(CfspError, match="scorer 'obs' needs Gram matrices"):
        make_plan(loaded, weights, replace(recipe, damping=0.5))
    bare = replace(loaded, rankings=())
    assert statistics_fingerprint(bare) != statistics_fingerprint(loaded)


def test_without_gram_matrices_obs_and_knapsack_are_refused(statistics: Statistics) -> None:
    bare = statistics.without_grams()
    plain = replace(OBS, compensation="none")
    with pytest.raises(CfspError, match="scorer 'obs' needs Gram matrices"):
        cfsp.prune(make_tiny(), make_tokenizer(), plain, statistics=bare, progress=False)
    knapsack = cfsp.Recipe(scorer="cfsp", allocator="knapsack", width_multiple=1)
    with pytest.raises(CfspError, match="allocator 'knapsack' needs Gram matrices"):
        cfsp.prune(make_tiny(), make_tokenizer(), knapsack, statistics=bare, progress=False)


def test_experts_of_an_ffn_get_one_width_by_their_summed_errors() -> None:
    model = make_tiny(
        "mixtral", num_local_experts=3, num_experts_per_tok=2, num_hidden_layers=2, head_dim=None
    )
    windows = torch.randint(0, 256, (12, 16), generator=torch.Generator().manual_seed(0))
    layout = LAYOUTS["mixtral"]
    found = collect_statistics(model, layout, windows, progress=False, grams=temporary_folder())
    recipe = replace(OBS, width_multiple=8, calibration=cfsp.Calibration())
    ranking = rank(found, weights_of(model), recipe)
    assert [len(scores) for scores in ranking.scores] == [3 * 48] * 2
    assert [int(curve.widths[-1]) for curve in ranking.curves] == [48] * 2
    problem = AllocationProblem(
        torch.ones(2), ranking.scores, 0.3, (3, 3), curves=scaled_curves(ranking, found, recipe)
    )
    plan = make_plan(found, weights_of(model), recipe)
    assert plan.blocks[0].kept[0].shape == (3, allocate_widths(problem, "knapsack", 8)[0])


def test_a_streamed_run_gives_the_plan_and_the_bytes_of_one_in_memory(
    tiny_folder: Path, tmp_path: Path
) -> None:
    stored = cfsp.prune(
        tiny_folder, recipe=OBS, out=tmp_path / "out", progress=False, eval_windows=0
    )
    live = cfsp.prune(make_tiny(), make_tokenizer(), OBS, progress=False)
    assert stored.plan.widths == live.plan.widths
    reloaded = stored.model.state_dict()
    for name, tensor in live.model.state_dict().items():
        assert torch.equal(tensor, reloaded[name]), name


def test_cut_blocks_are_those_of_the_pruned_model_and_go_again(statistics: Statistics) -> None:
    model, layout = make_tiny(), LAYOUTS["llama"]
    dense = list(model.model.layers)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = weights_of(model)
    plans = [make_plan(statistics, weights, replace(OBS, sparsity=p)) for p in (0.3, 0.6)]
    cuts: list[tuple[int, int]] = []

    def cut(number: int, block: torch.nn.Module, plan: object) -> None:
        cuts.append((number, plan.width))
        prune_block_(
            block, layout, plan, OBS.resolved_compensation, OBS.damping, statistics.blocks[number]
        )

    tokens = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(2))
    blocks = CutBlocks(model, layout, cut)
    with torch.no_grad(), blocks.in_place() as put:
        for plan in (*plans, plans[0]):
            put(plan)
            pruned = make_tiny()
            prune_model_(pruned, layout, plan, statistics, progress=False)
            assert torch.equal(model(tokens).logits, pruned(tokens).logits)
            assert blocks.bytes <= blocks.room
    assert len(set(cuts)) == 8
    assert list(model.model.layers) == dense
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_search_finds_no_worse_widths_and_says_so_by_the_pruned_model(
    statistics: Statistics,
) -> None:
    model = make_tiny().train()
    opened = adopt(model, make_tokenizer())
    windows = calibration_windows(opened.model, opened.tokenizer, OBS.calibration)[-8:]
    found = cfsp.plan(statistics, model, SEARCH, make_tokenizer())
    assert model.training
    start = cfsp.plan(statistics, model, OBS)

    def measured(plan: cfsp.PruningPlan) -> float:
        pruned = make_tiny()
        prune_model_(pruned, LAYOUTS["llama"], plan, statistics, progress=False)
        return perplexity(pruned, windows, progress=False).perplexity

    assert sum(found.widths) == sum(start.widths)
    assert found.widths != start.widths
    assert measured(found) < measured(start)
    assert found.recipe.search_seed == 0
    result = cfsp.prune(
        make_tiny(), make_tokenizer(), SEARCH, statistics=statistics, progress=False
    )
    assert result.plan.widths == found.widths


def test_a_search_without_a_model_is_refused(statistics: Statistics) -> None:
    with pytest.raises(CfspError, match="give the model itself"):
        cfsp.plan(statistics, weights_of(make_tiny()), SEARCH)
    with pytest.raises(
        CfspError, match="search_windows 8 is more than the calibration's 4 windows"
    ):
        replace(SEARCH, calibration=cfsp.Calibration(samples=4))
    with pytest.raises(CfspError, match="not seconds"):
        cfsp.Recipe(allocator="search", budget="latency=0.2")
    bare = replace(SEARCH, compensation="least-squares", scorer="cfsp")
    with pytest.raises(CfspError, match="compensation 'least-squares' needs Gram matrices"):
        width_search(make_tiny(), LAYOUTS["llama"], statistics.without_grams(), bare, None)(
            lambda widths: make_plan(statistics, refuse, replace(bare, allocator="uniform")),
            (48,),
            AllocationProblem(torch.ones(1), (torch.ones(48),), 0.3),
        )


def test_the_command_line_plans_with_search_and_keeps_curves(
    tiny_folder: Path, statistics: Statistics, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "s.safetensors")
    cfsp.save_statistics(statistics, file)
    given = [str(tiny_folder), "--statistics", file, "--quiet", "--scorer", "obs"]
    for new in (True, False):
        assert main(["curves", *given, "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["new"] == new
    assert len(cfsp.load_statistics(file).rankings) == 1
    plan = ["plan", *given, "--width-multiple", "1", "--out", str(tmp_path / "plan.json")]
    assert main([*plan, "--allocator", "search", "--search-generations", "1"]) == 0
    found = cfsp.load_plan(tmp_path / "plan.json")
    assert found.recipe.search_generations == 1
    assert sum(found.widths) == round(0.7 * 4 * 48)
    (ranking,) = cfsp.load_statistics(file).rankings
    for block, curve in zip(found.blocks, ranking.curves, strict=True):
        assert torch.equal(block.error_curves[0].widths, curve.widths)
        torch.testing.assert_close(block.error_curves[0].errors, curve.errors, rtol=5e-5, atol=0)
    capsys.readouterr()
    assert main(["plan", *given, "--error-scale", "loud"]) == 2
    assert "error scale" in capsys.readouterr().err
