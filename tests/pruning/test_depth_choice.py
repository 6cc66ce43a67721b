"""Which blocks go: the stretch of the smallest angle or loss, and what is refused."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import cfsp
from cfsp.checkpoints.documents import read_result
from cfsp.costs.dry_run import estimate
from cfsp.errors import CfspError, Stopped
from cfsp.evaluation.quality import perplexity
from cfsp.models.depth import shallower
from cfsp.models.opening import adopt
from cfsp.pruning.plan import Depth
from cfsp.pruning.plan_file import load_plan, save_plan
from cfsp.pruning.whole.blocks import without_stretch

from ..conftest import TEXT, make_tiny, make_tokenizer

CALIBRATION = cfsp.Calibration(dataset=TEXT, samples=6, seqlen=24)
RECIPE = cfsp.Recipe(
    blocks=4, sparsity=0.0, search_windows=3, width_windows=4, calibration=CALIBRATION
)
JOB = {"eval_windows": 0, "progress": False}


def six(**config: object) -> PreTrainedModel:
    return make_tiny(num_hidden_layers=6, **config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    six().save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def windows() -> torch.Tensor:
    from cfsp.calibration.windows import calibration_windows

    return calibration_windows(six(), make_tokenizer(), CALIBRATION)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_angle_takes_the_stretch_that_turns_least(folder: Path, micro_batch: int) -> None:
    model = six()
    with torch.no_grad():
        found = model(input_ids=windows()[:4], output_hidden_states=True)
    states = [state.double() for state in found.hidden_states[:6]]
    angles = {}
    for start in (1, 2, 3):
        cosine = torch.cosine_similarity(states[start], states[start + 2], dim=-1)
        angles[start] = float((cosine.arccos() / math.pi).mean())
    best = min(angles, key=lambda start: angles[start])
    recipe = replace(RECIPE, micro_batch=micro_batch)
    result = cfsp.prune(folder, recipe=recipe, **JOB)
    expected = tuple(n for n in range(6) if n not in (best, best + 1))
    assert result.plan.depth == Depth(expected, 6)


def test_loss_takes_the_stretch_without_which_the_loss_is_least(folder: Path) -> None:
    losses = {}
    for start in (1, 2, 3):
        kept = without_stretch(6, start, 2)
        left = shallower(adopt(six(), None), kept).model
        losses[kept] = perplexity(left, windows()[-3:], progress=False).perplexity
    result = cfsp.prune(folder, recipe=replace(RECIPE, block_choice="loss"), **JOB)
    assert result.plan.depth is not None
    assert result.plan.depth.kept == min(losses, key=lambda kept: losses[kept])


@pytest.mark.parametrize("blocks", [1, 0])
def test_a_recipe_keeps_two_blocks_at_least(blocks: int) -> None:
    with pytest.raises(CfspError, match=r"^blocks must be 2 or more, or below 0"):
        replace(RECIPE, blocks=blocks)


@pytest.mark.parametrize("blocks", [7, -5, -6])
def test_more_than_there_are_or_fewer_than_two_are_refused(folder: Path, blocks: int) -> None:
    recipe = replace(RECIPE, blocks=blocks)
    with pytest.raises(CfspError, match="a model of 6 keeps 2 to 6, or loses up to 4"):
        cfsp.prune(folder, recipe=recipe, **JOB)
    with pytest.raises(CfspError, match="a model of 6 keeps 2 to 6, or loses up to 4"):
        estimate(folder, recipe)


def test_a_plan_takes_the_same_blocks_out_again(folder: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, blocks=-2, sparsity=0.5, width_multiple=8)
    cfsp.prune(folder, recipe=recipe, out=tmp_path / "a", **JOB)
    plan = load_plan(tmp_path / "a" / "plan.json")
    assert plan.depth is not None
    assert len(plan.depth.kept) == len(plan.blocks) == 4
    cfsp.prune(folder, plan=plan, out=tmp_path / "b", **JOB)
    a, b = ((tmp_path / way / "model.safetensors").read_bytes() for way in "ab")
    assert a == b
    with pytest.raises(CfspError, match="the plan is for another model"):
        cfsp.prune(folder, plan=replace(plan, depth=Depth((0, 3, 4, 5), 6)), **JOB)
    save_plan(replace(plan, depth=Depth((0, 5), 6)), tmp_path / "edited.json")
    with pytest.raises(CfspError, match=r"depth\.kept names 2 blocks, not 4"):
        load_plan(tmp_path / "edited.json")


def test_one_params_budget_counts_blocks_and_channels(folder: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, sparsity=0.3, budget="params=0.45", width_multiple=1)
    report = cfsp.prune(folder, recipe=recipe, out=tmp_path / "out", **JOB).report
    assert report.parameters_before == sum(p.numel() for p in six().parameters())
    assert report.parameters_after / report.parameters_before == pytest.approx(0.55, abs=0.003)
    result = read_result(tmp_path / "out")
    assert result.plan.depth == report.plan.depth
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| blocks | 6 | 4 (66.7%) |" in card
    gone = ", ".join(map(str, report.plan.depth.gone)) if report.plan.depth else ""
    assert f"| blocks gone | | {gone} of 0 to 5 |" in card


def test_statistics_of_fewer_blocks_say_which(folder: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, sparsity=0.5, width_multiple=8)
    statistics = cfsp.calibrate(folder, recipe=recipe, progress=False)
    assert len(statistics.blocks) == 4
    plan = cfsp.prune(folder, recipe=recipe, statistics=statistics, **JOB).plan
    assert plan.depth == cfsp.prune(folder, recipe=recipe, **JOB).plan.depth
    with pytest.raises(CfspError, match="blocks 5: the statistics are of 4 of 6 blocks"):
        cfsp.prune(folder, recipe=replace(recipe, blocks=5), statistics=statistics, **JOB)


def test_a_dry_run_counts_the_pass_and_the_smaller_model(folder: Path) -> None:
    found = estimate(folder, RECIPE, eval_windows=0)
    one = sum(p.numel() for p in six().model.layers[0].parameters())
    assert found.parameters - found.parameters_after == 2 * one
    stages = {stage.name: stage for stage in found.stages}
    assert stages["depth"].bytes_read == 6 * one * 4
    assert stages["prune"].bytes_read == 4 * one * 4
    assert stages["depth"].flops > 0


def test_a_latency_budget_and_blocks_exclude_each_other() -> None:
    with pytest.raises(CfspError, match="a latency table is of all blocks"):
        cfsp.Recipe(blocks=4, budget="latency=0.2")


@pytest.mark.parametrize("calls", [3, 9])
def test_a_run_that_was_stopped_goes_on_with_the_same_choice(
    folder: Path, tmp_path: Path, calls: int
) -> None:
    """In the pass that chooses, or in the one that cuts."""
    recipe = replace(RECIPE, sparsity=0.5, width_multiple=8)
    cfsp.prune(folder, recipe=recipe, out=tmp_path / "a", **JOB)
    left = iter(range(calls))
    with pytest.raises(Stopped):
        cfsp.prune(
            folder, recipe=recipe, out=tmp_path / "b", stop=lambda: next(left, None) is None, **JOB
        )
    if calls == 9:
        other = replace(recipe, blocks=3)
        with pytest.raises(CfspError, match=r"begun with another .*recipe"):
            cfsp.prune(folder, recipe=other, out=tmp_path / "b", resume=True, **JOB)
    cfsp.prune(folder, recipe=recipe, out=tmp_path / "b", resume=True, **JOB)
    a, b = ((tmp_path / way / "model.safetensors").read_bytes() for way in "ab")
    assert a == b
