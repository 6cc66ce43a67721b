"""Cutting: equal to masking, exact, deterministic, in place; and the folder that reloads."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import cfsp
from cfsp import CfspError
from cfsp.checkpoints import folder as checkpoint
from cfsp.models import modeling_cfsp
from cfsp.models.layouts import LAYOUTS
from cfsp.pruning.plan_file import load_plan
from cfsp.pruning.recipe import load_recipe
from cfsp.pruning.scoring import SCORERS

from ..conftest import FAMILIES, TEXT, make_tiny, make_tokenizer

RECIPE = cfsp.Recipe(
    scorer="cfsp",
    sparsity=0.3,
    width_multiple=1,
    calibration=cfsp.Calibration(dataset=TEXT, samples=4, seqlen=32),
)
QUIET = {"progress": False}
TEXT_OF_MANY = " ".join(f"{number} and {number * number}," for number in range(400))


def prune_tiny(
    model: PreTrainedModel, recipe: cfsp.Recipe = RECIPE, out: Path | None = None, **options: object
) -> cfsp.PruneResult:
    return cfsp.prune(model, make_tokenizer(), recipe, out, **QUIET, **options)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(24)[None] * 11 % 256
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def mask_(model: PreTrainedModel, plan: cfsp.PruningPlan) -> PreTrainedModel:
    """The dense model with the removed channels' columns of down set to zero."""
    for layer, block in zip(model.model.layers, plan.blocks, strict=True):
        layer.mlp.down_proj.weight[:, block.removed] = 0
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scorer", ["cfsp", "wanda-sp"])
def test_pruned_equals_the_dense_model_with_the_same_channels_masked(
    family: str, scorer: str
) -> None:
    result = prune_tiny(make_tiny(family), replace(RECIPE, scorer=scorer))
    assert len(set(result.plan.widths)) > 1
    assert sum(result.plan.widths) == round(0.7 * 4 * 48)
    expected = logits(mask_(make_tiny(family), result.plan))
    assert torch.allclose(logits(result.model), expected, atol=1e-5)
    assert not torch.allclose(logits(make_tiny(family)), expected, atol=1e-3)


@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_every_scorer_prunes_with_its_own_defaults(scorer: str) -> None:
    result = prune_tiny(make_tiny(), replace(RECIPE, scorer=scorer))
    assert sum(result.plan.widths) == round(0.7 * 4 * 48)
    assert logits(result.model).isfinite().all()
    has_bias = result.model.model.layers[0].mlp.down_proj.bias is not None
    assert has_bias == (scorer in ("flap", "wifn"))


@pytest.mark.parametrize("metric", ["angular", "cosine", "mse", "mae"])
def test_every_importance_metric_gives_a_plan(metric: str) -> None:
    recipe = replace(RECIPE, importance=metric)
    assert sum(prune_tiny(make_tiny(), recipe).plan.widths) == round(0.7 * 4 * 48)


@pytest.mark.parametrize("mlp_bias", [False, True])
def test_bias_compensation_puts_the_mean_back(mlp_bias: bool) -> None:
    """With it, the FFN's mean output over the calibration tokens is that of the dense FFN."""
    recipe = replace(RECIPE, scorer="flap")
    dense = make_tiny(mlp_bias=mlp_bias)
    result = prune_tiny(make_tiny(mlp_bias=mlp_bias), recipe)
    for number, block in enumerate(result.statistics.blocks):
        old = dense.model.layers[number].mlp.down_proj
        new = result.model.model.layers[number].mlp.down_proj
        mean = block.mean.float()
        with torch.no_grad():
            kept_mean = mean[result.plan.blocks[number].flat_kept]
            assert torch.allclose(new(kept_mean), old(mean), atol=1e-5)


def test_width_multiples_meet_the_same_budget() -> None:
    recipe = replace(RECIPE, width_multiple=8)
    widths = prune_tiny(make_tiny(), recipe).plan.widths
    assert all(width % 8 == 0 for width in widths)
    assert abs(sum(widths) - 0.7 * 4 * 48) <= 4


def test_sparsity_zero_changes_nothing() -> None:
    recipe = replace(RECIPE, sparsity=0.0)
    assert torch.equal(logits(prune_tiny(make_tiny(), recipe).model), logits(make_tiny()))


def test_a_live_module_is_pruned_in_place_and_can_save_itself(tmp_path: Path) -> None:
    model = make_tiny().train()
    result = prune_tiny(model)
    assert result.model is model
    assert model.training
    assert type(model).__name__ == "CFSPLlamaForCausalLM"
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "own")
    assert (tmp_path / "own" / "modeling_cfsp.py").exists()
    assert torch.equal(logits(cfsp.load(tmp_path / "own")), expected)


def test_a_pruned_model_can_be_pruned_again(tmp_path: Path) -> None:
    prune_tiny(make_tiny(), out=tmp_path / "once", eval_windows=0)
    result = cfsp.prune(
        tmp_path / "once", recipe=RECIPE, out=tmp_path / "twice", eval_windows=0, **QUIET
    )
    once = load_plan(tmp_path / "once" / "plan.json").widths
    assert tuple(block.intermediate_size for block in result.plan.blocks) == once
    assert sum(result.plan.widths) == round(0.7 * sum(once))
    assert torch.equal(logits(cfsp.load(tmp_path / "twice")), logits(result.model))


def test_one_width_for_all_is_the_stock_architecture(tmp_path: Path) -> None:
    recipe = replace(RECIPE, allocator="uniform", width_multiple=8)
    recipe = replace(recipe, sparsity=1 / 3)
    result = prune_tiny(make_tiny(), recipe, tmp_path / "u", eval_windows=0)
    config = json.loads((tmp_path / "u" / "config.json").read_text())
    assert (config["model_type"], config["intermediate_size"]) == ("llama", 32)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not {"auto_map", "per_layer_config"} & set(config)
    assert not (tmp_path / "u" / "modeling_cfsp.py").exists()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "u").eval()
    assert type(stock).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(stock), logits(result.model))


FRESH = """
import os, sys, traceback
import torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
ids = torch.arange(24)[None] * 11 % 256

def loaded(way):
    if way == "load":
        import cfsp
        return cfsp.load(folder)
    if way == "registered":
        import cfsp
    else:
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("cfsp", "cfsp_kernels"):
                    raise ImportError("cfsp is not installed here")
        sys.meta_path.insert(0, Refuse())
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=way == "trust").eval()

@torch.no_grad()
def check(way):
    model = loaded(way)
    expected = model(input_ids=ids, use_cache=False).logits
    model.generate(ids, max_new_tokens=4, do_sample=False)
    own = folder + "-again-" + way
    model.save_pretrained(own)
    again = type(model).from_pretrained(own).eval()
    assert torch.equal(again(input_ids=ids, use_cache=False).logits, expected)
    torch.save(expected, folder + "." + way)

for way in sys.argv[2:]:  # a process each, in which nothing of cfsp is imported yet
    assert "cfsp" not in sys.modules
    if os.fork() == 0:
        try:
            check(way)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.wait()
"""
WAYS = ("load", "registered", "trust")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, str]:
    """A pruned folder, the pruned model's logits, and what other processes said on loading it."""
    folder = tmp_path_factory.mktemp("fresh")
    recipe = replace(RECIPE, scorer="flap")
    result = prune_tiny(make_tiny(), recipe, folder / "out", eval_windows=0)
    run = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder / "out"), *WAYS],
        capture_output=True,
        text=True,
        cwd=folder,
        env={
            "HF_HUB_OFFLINE": "1",
            "PATH": "",
            "HF_HOME": str(folder / "hf"),
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        },
    )
    return folder / "out", logits(result.model), run.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("way", WAYS)
def test_three_ways_to_load_give_the_same_bits_in_a_fresh_process(
    way: str, fresh: tuple[Path, torch.Tensor, str]
) -> None:
    out, expected, said = fresh
    file = out.with_name(f"{out.name}.{way}")
    assert file.exists(), said[-3000:]
    assert torch.equal(torch.load(file), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_reloads_equal(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make_tiny(family).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    result = prune_tiny(model, out=tmp_path / "out", eval_windows=0)
    loaded = cfsp.load(tmp_path / "out")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(result.model))


def test_a_live_model_with_rounded_rotary_buffers_is_saved_with_a_warning(tmp_path: Path) -> None:
    model = make_tiny().to(torch.bfloat16)
    with pytest.warns(UserWarning, match="not those that a fresh load makes"):
        prune_tiny(model, out=tmp_path / "out", eval_windows=0)
    loaded = cfsp.load(tmp_path / "out")
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_saved_model_that_differs_is_a_defect_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupted(model: PreTrainedModel, folder: Path) -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
        write_weights(model, folder)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] -= 1

    write_weights = checkpoint.write_weights
    monkeypatch.setattr(checkpoint, "write_weights", corrupted)
    with pytest.raises(RuntimeError, match="differs from the pruned one by"):
        prune_tiny(make_tiny(), out=tmp_path / "out", eval_windows=0)
    assert not list(tmp_path.iterdir())


def test_the_folder_holds_the_whole_story(
    tiny_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    out = tmp_path / "out"
    result = cfsp.prune(tiny_folder, recipe=RECIPE, out=out, eval_windows=3, **QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny"]
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "cfsp_llama"
    heads = ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
    assert set(config["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        *(f"AutoModelFor{head}" for head in heads),
    }
    widths = {int(k): v["intermediate_size"] for k, v in config["per_layer_config"].items()}
    full = config["intermediate_size"]
    assert tuple(widths.get(number, full) for number in range(4)) == result.plan.widths
    assert load_plan(out / "plan.json").widths == result.plan.widths
    assert load_recipe(out / "recipe.yaml") == RECIPE
    document = yaml.safe_load((out / "recipe.yaml").read_text())
    assert document["provenance"]["statistics"]["tokens_sha256"]
    assert document["provenance"]["versions"]["torch"] == torch.__version__
    assert document["result"]["parameters_after"] == sum(
        p.numel() for p in result.model.parameters()
    )
    card = (out / "README.md").read_text()
    before, after = result.report.perplexity_before, result.report.perplexity_after
    assert f"| {before.perplexity:.2f} | {after.perplexity:.2f} |" in card
    assert "base_model: tiny" in card
    weights = load_file(out / "model.safetensors")
    assert weights["model.layers.0.mlp.down_proj.weight"].shape == (32, result.plan.widths[0])
    mode = (out / "model.safetensors").stat().st_mode
    assert mode & 0o777 == (out / "config.json").stat().st_mode & 0o777


def test_two_budgets_from_one_file_equal_runs_from_scratch(
    tiny_folder: Path, tmp_path: Path
) -> None:
    statistics = cfsp.calibrate(tiny_folder, recipe=RECIPE, progress=False)
    cfsp.save_statistics(statistics, tmp_path / "s")
    for sparsity in (0.2, 0.5):
        recipe = replace(RECIPE, sparsity=sparsity, scorer="flap")
        pair = []
        for name, options in (("reused", {"statistics": tmp_path / "s"}), ("scratch", {})):
            out = tmp_path / f"{name}-{sparsity}"
            cfsp.prune(tiny_folder, recipe=recipe, out=out, eval_windows=0, **QUIET, **options)
            pair.append(out)
        for file in ("model.safetensors", "plan.json", "config.json", "recipe.yaml"):
            assert (pair[0] / file).read_bytes() == (pair[1] / file).read_bytes(), file


def test_statistics_of_another_text_or_of_too_few_windows_are_refused(
    tiny_folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT_OF_MANY)
    calibration = cfsp.Calibration(str(text), samples=6, seqlen=32)
    default = replace(RECIPE, scorer="cfsp-output", width_windows=2, calibration=calibration)
    few = cfsp.prune(tiny_folder, recipe=default, **QUIET).statistics
    assert few.provenance["windows"] == 2
    all_of_them = cfsp.calibrate(tiny_folder, recipe=default, progress=False)
    again = cfsp.prune(tiny_folder, recipe=default, statistics=few, **QUIET)
    for scorer, windows in (("flap", 6), ("cfsp", 6), ("cfsp-output", 4)):
        recipe = replace(default, scorer=scorer, width_windows=4)
        message = f"of 2 windows and this recipe needs {windows}: make them with `cfsp calibrate`"
        with pytest.raises(CfspError, match=message):
            cfsp.prune(tiny_folder, recipe=recipe, statistics=few, **QUIET)
        with pytest.raises(CfspError, match=message):
            cfsp.plan(few, make_tiny(), recipe)
        assert cfsp.prune(tiny_folder, recipe=recipe, statistics=all_of_them, **QUIET).plan
    text.write_text(TEXT_OF_MANY[::-1])
    for statistics in (few, all_of_them):
        with pytest.raises(CfspError, match=r"dataset .*text\.txt gives other text than when"):
            cfsp.prune(tiny_folder, recipe=default, statistics=statistics, **QUIET)
    # What fits nothing reads no text.
    assert cfsp.prune(tiny_folder, recipe=RECIPE, statistics=all_of_them, **QUIET).plan
    fitted = {again.report.fitted_sha256, all_of_them.provenance["tokens_sha256"]}
    assert len(fitted) == 1


def test_the_text_that_was_fitted_to_is_recorded(tiny_folder: Path, tmp_path: Path) -> None:
    hashes = []
    default = replace(RECIPE, scorer="cfsp-output", width_windows=2)
    plan = cfsp.prune(tiny_folder, recipe=default, **QUIET).plan
    for number, options in enumerate(({"recipe": default}, {"plan": plan}, {"recipe": RECIPE})):
        out = tmp_path / str(number)
        cfsp.prune(tiny_folder, out=out, eval_windows=0, **options, **QUIET)
        document = yaml.safe_load((out / "recipe.yaml").read_text())
        hashes.append(document["provenance"]["fitted_tokens_sha256"])
    statistics = cfsp.calibrate(tiny_folder, recipe=default, progress=False)
    assert hashes == [*[statistics.provenance["tokens_sha256"]] * 2, None]


def test_a_plan_is_applied_as_edited(tiny_folder: Path, tmp_path: Path) -> None:
    statistics = cfsp.calibrate(tiny_folder, recipe=RECIPE, progress=False)
    plan = cfsp.plan(statistics, make_tiny(), RECIPE)
    cfsp.save_plan(plan, tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    document["blocks"][1].update(kept="0-9", width=10)
    (tmp_path / "plan.json").write_text(json.dumps(document))
    result = cfsp.prune(
        tiny_folder, plan=cfsp.load_plan(tmp_path / "plan.json"), eval_windows=0, **QUIET
    )
    assert result.plan.widths == (plan.widths[0], 10, *plan.widths[2:])
    expected = make_tiny().model.layers[1].mlp.down_proj.weight[:, :10]
    assert torch.equal(result.model.model.layers[1].mlp.down_proj.weight, expected)
    assert result.statistics is None


def test_every_family_has_its_classes() -> None:
    cfsp.register()
    for model_type in LAYOUTS:
        stock = CONFIG_MAPPING[model_type]
        own = CONFIG_MAPPING[f"cfsp_{model_type}"]
        assert issubclass(own, stock)
        for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
            assert issubclass(mapping[own], mapping[stock])
            assert mapping[own].__name__ == f"CFSP{mapping[stock].__name__}"
            assert mapping[own] is getattr(modeling_cfsp, mapping[own].__name__)


def test_a_modeling_class_of_nothing_is_no_attribute() -> None:
    for name in ("LlamaForCausalLM", "CFSPNothing", "CFSPpipeline"):
        with pytest.raises(AttributeError, match=name):
            getattr(modeling_cfsp, name)
