"""Scorer obs and error curves on models: made in a calibration, kept, used, and searched from."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import cfsp
from cfsp.apportion import Steps
from cfsp.calibration.collect import DensePass, collect_statistics
from cfsp.calibration.statistics import BlockStatistics, Statistics, statistics_fingerprint
from cfsp.calibration.windows import calibration_windows
from cfsp.cli.main import main
from cfsp.errors import CfspError
from cfsp.evaluation.quality import perplexity
from cfsp.models.layouts import LAYOUTS
from cfsp.models.opening import adopt
from cfsp.models.parts.channels import PartWeights, Units
from cfsp.pruning.allocation import AllocationProblem, allocate_widths
from cfsp.pruning.compaction import prune_block_, prune_model_
from cfsp.pruning.plan import BlockPlan
from cfsp.pruning.planning import make_plan, select_channels
from cfsp.pruning.ranking import Ranker, rank, scaled_curves
from cfsp.pruning.search import CutBlocks

from ..conftest import TEXT, make_tiny, make_tokenizer

OBS = cfsp.Recipe(
    sparsity=0.3,
    scorer="obs",
    width_multiple=1,
    calibration=cfsp.Calibration(dataset="builtin", samples=20, seqlen=16),
)
SEARCH = replace(OBS, allocator="search", search_generations=3, search_offspring=2)


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    """Of the tiny Llama, ranked by obs, with error curves."""
    return cfsp.calibrate(make_tiny(), make_tokenizer(), OBS, progress=False)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    opened = adopt(make_tiny(), make_tokenizer())
    return calibration_windows(opened.model, opened.tokenizer, OBS.calibration)


@pytest.fixture(scope="module")
def known(windows: torch.Tensor) -> list[BlockStatistics]:
    """Of every block in the second pass, with Gram matrices."""
    dense = DensePass(make_tiny(), LAYOUTS["llama"], windows, gram=True)
    return [dense.run(number) for number in range(4)]


def ranked(
    known: Sequence[BlockStatistics], statistics: Statistics, recipe: cfsp.Recipe
) -> Statistics:
    """The statistics with the ranking that a calibration for this recipe makes."""
    ranker = Ranker(LAYOUTS["llama"], recipe)
    for number, block in enumerate(make_tiny().model.layers):
        ranker.visit(number, block, known[number])
    return replace(statistics, rankings=(ranker.ranking(),))


def refuse(number: int) -> Sequence[PartWeights]:
    raise AssertionError("weights were read")


def weights_of(model: torch.nn.Module) -> Callable[[int], Sequence[PartWeights]]:
    return adopt(model, None).blocks.part_weights


def output_error(
    known: BlockStatistics, number: int, kept: torch.Tensor, recipe: cfsp.Recipe
) -> float:
    """Mean square error of a block's FFN output on the fitting tokens, after compensation."""
    model = make_tiny()
    block = model.model.layers[number]
    dense = block.mlp.down_proj.weight.detach().double()
    own = BlockPlan((kept[None],), 1.0, known.units)
    prune_block_(block, LAYOUTS["llama"], own, recipe.resolved_compensation, recipe.damping, known)
    change = -dense
    change[:, kept] += block.mlp.down_proj.weight.detach().double()
    gram = known.gram.moments(centred=recipe.resolved_compensation == "bias").double()
    return float((change @ gram * change).sum()) / len(dense)


@pytest.mark.parametrize("compensation", ["none", "bias", "least-squares"])
def test_the_curve_is_the_error_of_the_pruned_ffn(
    statistics: Statistics, known: list[BlockStatistics], compensation: str
) -> None:
    recipe = replace(OBS, compensation=compensation)
    (ranking,) = ranked(known, statistics, recipe).rankings
    for number in (0, 3):
        curve, scores = ranking.curves[number], ranking.scores[number]
        assert curve.widths.tolist() == list(range(49))
        for width in (20, 40):
            kept = select_channels(scores, width)
            expected = output_error(known[number], number, kept, recipe)
            assert float(curve.errors[width]) == pytest.approx(expected, rel=1e-3)


def test_obs_with_its_knapsack_errs_least(
    statistics: Statistics, known: list[BlockStatistics]
) -> None:
    weights = weights_of(make_tiny())

    def summed(recipe: cfsp.Recipe) -> float:
        own = ranked(known, statistics, replace(recipe, allocator="knapsack"))
        (ranking,) = own.rankings
        widths = make_plan(own, weights, recipe).widths
        assert sum(widths) == round(0.7 * 4 * 48)
        curves = scaled_curves(ranking, own, recipe)
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
    statistics: Statistics, known: list[BlockStatistics], tmp_path: Path
) -> None:
    weights = weights_of(make_tiny())
    recipe = replace(OBS, compensation="none")
    made = ranked(known, statistics, recipe)
    cfsp.save_statistics(made, tmp_path / "s")
    loaded = cfsp.load_statistics(tmp_path / "s")
    for sparsity in (0.2, 0.5):
        asked = replace(recipe, sparsity=sparsity)
        found = make_plan(loaded, refuse, asked)
        expected = make_plan(made, weights, asked)
        assert found.widths == expected.widths
        for a, b in zip(found.blocks, expected.blocks, strict=True):
            assert torch.equal(a.flat_kept, b.flat_kept)
    # Scores of removal have nothing to do with the compensation, error curves have.
    for other in ({"compensation": "blockwise"}, {"compensation": "least-squares-bias"}):
        asked = replace(recipe, allocator="uniform", **other)
        assert rank(loaded, refuse, asked) is loaded.rankings[0]
    with pytest.raises(CfspError, match="scorer 'obs' needs Gram matrices"):
        make_plan(loaded, weights, replace(recipe, damping=0.5))
    with pytest.raises(CfspError, match="scorer 'obs' needs Gram matrices"):
        make_plan(loaded, weights, replace(recipe, compensation="least-squares"))
    fitted = ranked(known, statistics, OBS)
    assert rank(fitted, refuse, replace(OBS, compensation="blockwise")) is fitted.rankings[0]
    bare = replace(loaded, rankings=())
    assert statistics_fingerprint(bare) != statistics_fingerprint(loaded)


def test_statistics_that_were_not_made_for_obs_or_knapsack_are_refused(
    statistics: Statistics,
) -> None:
    bare = replace(statistics, rankings=())
    plain = replace(OBS, compensation="none")
    with pytest.raises(CfspError, match="scorer 'obs' needs Gram matrices"):
        cfsp.prune(make_tiny(), make_tokenizer(), plain, statistics=bare, progress=False)
    knapsack = cfsp.Recipe(scorer="cfsp", allocator="knapsack", width_multiple=1)
    message = "allocator 'knapsack' needs Gram matrices.* calibrate with `scorer='cfsp'`, `alloc"
    with pytest.raises(CfspError, match=message):
        cfsp.prune(make_tiny(), make_tokenizer(), knapsack, statistics=statistics, progress=False)


def test_a_ranking_by_sums_and_weights_serves_every_compensation(
    statistics: Statistics, known: list[BlockStatistics]
) -> None:
    made = ranked(known, statistics, cfsp.Recipe(scorer="wanda-sp"))
    asked = cfsp.Recipe(scorer="wanda-sp", compensation="least-squares", damping=0.7)
    assert rank(made, refuse, asked) is made.rankings[0]
    (ranking,) = made.rankings
    expected = rank(statistics, weights_of(make_tiny()), asked)
    for a, b in zip(ranking.scores, expected.scores, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(AssertionError, match="weights were read"):
        rank(made, refuse, replace(asked, scorer="flap"))


def test_experts_of_an_ffn_get_one_width_by_their_summed_errors() -> None:
    model = make_tiny(
        "mixtral", num_local_experts=3, num_experts_per_tok=2, num_hidden_layers=2, head_dim=None
    )
    windows = torch.randint(0, 256, (12, 16), generator=torch.Generator().manual_seed(0))
    layout = LAYOUTS["mixtral"]
    recipe = replace(OBS, width_multiple=8, calibration=cfsp.Calibration())
    ranker = Ranker(layout, recipe)
    found = collect_statistics(
        model, layout, windows, progress=False, gram=True, visit=ranker.visit
    )
    ranking = ranker.ranking()
    found = replace(found, rankings=(ranking,))
    assert [len(scores) for scores in ranking.scores] == [3 * 48] * 2
    assert [int(curve.widths[-1]) for curve in ranking.curves] == [48] * 2
    problem = AllocationProblem(
        torch.ones(2),
        ranking.scores,
        0.3,
        (Units(48, experts=3),) * 2,
        steps=(Steps(48, 8),) * 2,
        curves=scaled_curves(ranking, found, recipe),
    )
    plan = make_plan(found, weights_of(model), recipe)
    assert plan.blocks[0].kept[0].shape == (3, allocate_widths(problem, "knapsack")[0])


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


def cut_to(plan: cfsp.PruningPlan, known: Sequence[BlockStatistics]) -> PreTrainedModel:
    """The tiny Llama, cut to a plan, its columns fitted to what is known of the dense blocks."""
    pruned = make_tiny()
    prune_model_(
        pruned,
        LAYOUTS["llama"],
        plan.recipe,
        lambda number, block: (plan.blocks[number], known[number]),
        progress=False,
    )
    return pruned


def test_cut_blocks_are_those_of_the_pruned_model_and_go_again(
    statistics: Statistics, known: list[BlockStatistics]
) -> None:
    model, layout = make_tiny(), LAYOUTS["llama"]
    dense = list(model.model.layers)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = weights_of(model)
    plans = [make_plan(statistics, weights, replace(OBS, sparsity=p)) for p in (0.3, 0.6)]
    cuts: list[tuple[int, int]] = []

    def cut(number: int, block: torch.nn.Module, plan: object) -> None:
        cuts.append((number, plan.width))
        prune_block_(block, layout, plan, OBS.resolved_compensation, OBS.damping, known[number])

    tokens = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(2))
    blocks = CutBlocks(model, layout, cut)
    with torch.no_grad(), blocks.in_place() as put:
        for plan in (*plans, plans[0]):
            put(plan)
            pruned = cut_to(plan, known)
            assert torch.equal(model(tokens).logits, pruned(tokens).logits)
            assert blocks.bytes <= blocks.room
    assert len(set(cuts)) == 8
    assert list(model.model.layers) == dense
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_search_finds_no_worse_widths_and_says_so_by_the_pruned_model(
    statistics: Statistics, windows: torch.Tensor, known: list[BlockStatistics]
) -> None:
    model = make_tiny().train()
    found = cfsp.plan(statistics, model, SEARCH, make_tokenizer())
    assert model.training
    start = cfsp.plan(statistics, model, OBS)

    def measured(plan: cfsp.PruningPlan) -> float:
        return perplexity(cut_to(plan, known), windows[-8:], progress=False).perplexity

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


def test_the_command_line_calibrates_for_obs_and_plans_with_search(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "s.safetensors")
    text = ["--dataset", "builtin", "--samples", "20", "--seqlen", "16", "--quiet"]
    assert main(["calibrate", str(tiny_folder), "--out", file, "--scorer", "obs", *text]) == 0
    assert not list(tmp_path.glob("s.safetensors?*"))
    given = [str(tiny_folder), "--statistics", file, "--quiet", "--scorer", "obs"]
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
    assert main(["plan", *given, "--damping", "0.5"]) == 2
    assert "calibrate with --scorer obs, --allocator knapsack" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", [{"scorer": "obs"}, {"allocator": "knapsack"}])
def test_activations_beyond_fp32_are_told_with_their_block(recipe: dict[str, str]) -> None:
    model = make_tiny()
    for name, factor in (("up_proj", 1e10), ("gate_proj", 1e10), ("down_proj", 1e-20)):
        getattr(model.model.layers[2].mlp, name).weight.data *= factor
    calibration = cfsp.Calibration(dataset=TEXT, samples=4, seqlen=32)
    wanted = cfsp.Recipe(width_multiple=8, calibration=calibration, **recipe)
    with pytest.raises(CfspError, match=r"block 2: the Gram matrix is not finite"):
        cfsp.calibrate(model, make_tokenizer(), wanted, progress=False)
