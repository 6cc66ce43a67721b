"""Least squares in a model: where they go, what guards them, what is said of them."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import PreTrainedModel

import cfsp
from cfsp.calibration.collect import DensePass
from cfsp.calibration.windows import calibration_windows
from cfsp.checkpoints import folder as checkpoint
from cfsp.cli.main import main
from cfsp.errors import Stopped
from cfsp.models.layouts import LAYOUTS
from cfsp.models.parts.channels import PartWeights
from cfsp.pruning import compaction_streamed as second_pass
from cfsp.pruning import compensation
from cfsp.pruning.compensation import DownProjection, least_squares
from cfsp.run import job

from ..conftest import TEXT, make_tiny, make_tokenizer
from ..models.test_families import make
from ..models.test_streaming import RECIPE, assert_same_files, prune, saved

CALIBRATION = replace(RECIPE.calibration, samples=12)
FITTED = replace(RECIPE, compensation="least-squares", damping=0.1, calibration=CALIBRATION)
BIASED = replace(FITTED, compensation="least-squares-bias")
pytestmark = pytest.mark.filterwarnings("ignore:least squares. 4 of 4 FFNs have fewer")


def weights(model: PreTrainedModel) -> list[list[PartWeights]]:
    """[block][FFN or expert], copied."""
    layout = LAYOUTS[model.config.model_type.removeprefix("cfsp_")]
    return [
        [replace(ffn, down=ffn.down.detach().clone()) for ffn in layout.part_weights(block)]
        for block in layout.find_blocks(model)
    ]


def prune_live(model: PreTrainedModel, recipe: cfsp.Recipe, **options: object) -> cfsp.PruneResult:
    return cfsp.prune(model, make_tokenizer(), recipe, progress=False, **options)


@pytest.mark.parametrize(
    ("name", "dtype"),  # fused, Conv1D, experts
    [("phi3", torch.bfloat16), ("gpt2", torch.float32), ("deepseek_v3", torch.bfloat16)],
)
@pytest.mark.filterwarnings("ignore:least squares. . of 16 FFNs have fewer")
def test_every_ffn_has_the_fit_of_its_own_activation(name: str, dtype: torch.dtype) -> None:
    model = make(name).to(dtype)
    dense = weights(model)
    recipe = replace(FITTED, width_multiple=8, damping=1.0)
    result = prune_live(model, recipe)
    fresh, applied = make(name).to(dtype), 0
    windows = calibration_windows(fresh, make_tokenizer(), recipe.calibration)
    layout = LAYOUTS[fresh.config.model_type]
    dense_pass = DensePass(fresh, layout, windows, gram=True)
    for number, block in enumerate(result.plan.blocks):
        known = dense_pass.run(number)
        kept = [own for group in block.kept for own in group]
        fits = result.report.fits[number]
        assert len(kept) == len(fits) == len(known.parts())
        for ffn, own in enumerate(kept):
            down, part = dense[number][ffn].down, known.parts()[ffn]
            expected, record = least_squares(DownProjection(down, own, part, 1.0))
            assert torch.equal(weights(model)[number][ffn].down, expected.weight)
            assert fits[ffn] == record
            assert torch.equal(expected.weight, down[:, own]) != fits[ffn].applied
            applied += fits[ffn].applied
    assert applied >= 2
    assert all(p.isfinite().all() for p in model.parameters())


def test_where_all_is_kept_weights_are_as_they_were() -> None:
    for recipe in (FITTED, BIASED):
        model = make_tiny()
        before = weights(model)
        result = prune_live(model, replace(recipe, sparsity=0.0))
        for old, new in zip(before, weights(model), strict=True):
            assert torch.equal(old[0].down, new[0].down)
        assert not any(record.applied for (record,) in result.report.fits)


@pytest.mark.parametrize("recipe", [FITTED, BIASED])
def test_a_fit_that_raises_the_held_out_error_is_not_put_in(
    recipe: cfsp.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(4))

    def worse_at_odd(*arguments: object, **options: object) -> object:
        found = fit(*arguments, **options)
        return replace(found, weight=-found.weight) if next(calls) % 2 else found

    fit = compensation.fit_down
    monkeypatch.setattr(compensation, "fit_down", worse_at_odd)
    model = make_tiny()
    dense = weights(model)
    result = prune_live(model, replace(recipe, damping=3.0))
    for number, (record,) in enumerate(result.report.fits):
        same = torch.equal(
            weights(model)[number][0].down,
            dense[number][0].down[:, result.plan.blocks[number].flat_kept],
        )
        assert same != record.applied
        assert record.applied == (record.error_after < record.error_before)
        bias = model.model.layers[number].mlp.down_proj.bias
        assert (bias is not None) == (recipe is BIASED)
        assert bias is None or bool(bias.any()) == record.applied
        if number % 2:
            assert record.error_after > 1
    assert {record.applied for (record,) in result.report.fits} == {True, False}


def test_an_expert_of_few_tokens_keeps_its_columns() -> None:
    model = make("mixtral")
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight[:] = 0  # the same two experts win for every token
    dense = weights(model)
    recipe = replace(FITTED, width_multiple=8, damping=3.0)
    with pytest.warns(UserWarning, match="least squares") as told:
        result = prune_live(model, recipe)
    (few,) = [str(w.message) for w in told if "least squares" in str(w.message)]
    assert few == (
        "least squares: 8 of 16 FFNs have fewer than 4 tokens per channel, block 0 0 for 48: "
        "calibrate on more windows"
    )
    for number, fits in enumerate(result.report.fits):
        tokens = result.statistics.blocks[number].expert_tokens
        for expert, record in enumerate(fits):
            if not tokens[expert]:
                kept = result.plan.blocks[number].kept[0][expert]
                found = weights(model)[number][expert].down
                assert torch.equal(found, dense[number][expert].down[:, kept])
                assert (record.applied, record.error_before, record.tokens) == (False, None, 0)
            else:
                assert record.error_before is not None
    assert [row["ffns"] for row in result.report.to_dict()["fits"]] == [4] * 4


def test_a_single_window_leaves_nothing_to_judge_by() -> None:
    recipe = replace(FITTED, calibration=replace(CALIBRATION, samples=1, seqlen=120))
    with pytest.warns(UserWarning, match="a single calibration window leaves none to hold out"):
        result = prune_live(make_tiny(), recipe)
    for (record,) in result.report.fits:
        assert (record.applied, record.error_before, record.tokens) == (True, None, 120)


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (checkpoint, second_pass):
            patch.setattr(module, "MAX_SHARD_BYTES", 15_000)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, and in "streamed" what least squares with a bias make of it."""
    folder = tmp_path_factory.mktemp("compensation")
    model = saved(folder / "m", shards=True, dtype=torch.bfloat16)
    prune(model, folder / "streamed", BIASED)
    return folder


def test_the_folder_is_that_of_the_model_in_memory(folder: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cfsp.models.opening.open_streamed", lambda *_, **__: None)
        result = prune(folder / "m", tmp_path / "whole", BIASED)
    assert result.live is not None
    assert_same_files(folder / "streamed", tmp_path / "whole")
    statistics = cfsp.calibrate(folder / "m", recipe=BIASED, progress=False)
    cfsp.save_statistics(statistics, tmp_path / "s")
    prune(folder / "m", tmp_path / "saved", BIASED, statistics=tmp_path / "s")
    assert_same_files(folder / "streamed", tmp_path / "saved")


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(range(5))  # four blocks of pass 1, one of pass 2
    with pytest.raises(Stopped):
        prune(folder / "m", tmp_path / "out", BIASED, stop=lambda: next(left, None) is None)
    state = tmp_path / "out.partial" / ".cfsp-run"
    kept = ["manifest.json", "shards", "statistics.safetensors"]
    assert sorted(f.name for f in state.iterdir()) == kept
    damping = replace(BIASED, damping=0.2)
    with pytest.raises(cfsp.CfspError, match="it was begun with another recipe"):
        prune(folder / "m", tmp_path / "out", damping, resume=True)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(job, "collect_statistics", again)
    shutil.copytree(tmp_path / "out.partial", tmp_path / "damaged.partial")
    file = tmp_path / "damaged.partial" / ".cfsp-run" / "statistics.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(cfsp.CfspError, match=r"cannot read statistics .*statistics\.safetensors"):
        prune(folder / "m", tmp_path / "damaged", BIASED, resume=True)
    prune(folder / "m", tmp_path / "out", BIASED, resume=True)
    assert_same_files(tmp_path / "out", folder / "streamed")


def test_the_documents_say_what_came_of_it(folder: Path) -> None:
    fits = yaml.safe_load((folder / "streamed" / "recipe.yaml").read_text())["result"]["fits"]
    assert [row["block"] for row in fits] == [0, 1, 2, 3]
    card = (folder / "streamed" / "README.md").read_text()
    for row in fits:
        assert row["applied"] == int(row["error_after"] < row["error_before"])
        assert f"| {row['block']} | {row['error_before']:.4g} | {row['error_after']:.4g} |" in card
    assert cfsp.load_recipe(folder / "streamed" / "recipe.yaml") == BIASED


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--dataset", TEXT, "--samples", "12", "--seqlen", "32", "--quiet"]
    s, out = str(tmp_path / "s"), str(tmp_path / "out")
    assert main(["calibrate", str(folder / "m"), "--out", s, *data]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    options = ["--scorer", "cfsp", "--compensation", "least-squares-bias"]
    given = ["--statistics", s, "--eval-windows", "0", "--width-multiple", "1", "--quiet", *options]
    assert main(["prune", str(folder / "m"), "--out", out, *given, "--damping", "0.1"]) == 0
    assert "least squares: " in capsys.readouterr().out
    assert_same_files(tmp_path / "out", folder / "streamed")
    given = [*given, "--overwrite", "--damping", "5", "--json"]
    assert main(["prune", str(folder / "m"), "--out", out, *given]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["damping"] for row in report["fits"]] == [5.0] * 4
    assert main(["prune", str(folder / "m"), "--out", "x", "--damping", "-1"]) == 2
    assert "damping must be 0 or more, got -1.0" in capsys.readouterr().err
