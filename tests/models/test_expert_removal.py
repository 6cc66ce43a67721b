"""Whole experts removed: as a router that never chooses them, in the family's own class."""

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

import cfsp
from cfsp.calibration.statistics import Statistics, load_statistics, save_statistics
from cfsp.cli.main import main
from cfsp.errors import CfspError
from cfsp.models.detection.experts import with_fewer_experts
from cfsp.models.detection.trial import checked_layout
from cfsp.models.parts.channels import in_place
from cfsp.models.parts.expert_removal import FewerExperts, keep_experts_
from cfsp.models.parts.experts import ExpertsFFN
from cfsp.pruning.plan_file import load_plan, save_plan
from cfsp.pruning.whole.experts import EXPERT_SCORES, expert_scores

from ..conftest import TEXT, make_tokenizer
from ..families.tiny import FAMILIES, LATENT, sized

NAMES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "olmoe"),
    *("deepseek_v3", "glm4_moe", "gpt_oss", "minimax_m2", "phimoe", "ernie4_5_moe"),
    *("granitemoe", "llama4_text", "dots1", "exaone_moe", "hunyuan_v1_moe", "afmoe"),
)
CALIBRATION = cfsp.Calibration(dataset=TEXT, samples=6, seqlen=24)
WHOLE = cfsp.Recipe(experts=6, calibration=CALIBRATION)
BOTH = replace(WHOLE, sparsity=1 / 3, width_multiple=8)
IDS = torch.arange(32)[None] * 11 % 256
"""So many that scores fill whole vectors: those of a rest at the end have other last bits."""
COUNTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
ROUTERS = ("gate.weight", "router.weight", "wg.weight")

pytestmark = pytest.mark.usefixtures("one_thread")
prune = partial(cfsp.prune, eval_windows=0, progress=False)


def make(name: str) -> PreTrainedModel:
    """A tiny model of 8 experts, whose router has a correction where the family has one."""
    config = FAMILIES[name].config()
    for key in COUNTS & config.to_dict().keys():
        setattr(config, key, 8)
    model = replace(FAMILIES[name], config=lambda: config).model()
    for buffer, value in model.named_buffers():
        if buffer.endswith("bias"):
            value.normal_(0, 0.01)
    return model


def grouped() -> PreTrainedModel:
    """DeepSeek-V3 with 8 experts in 2 groups, of which a token sees one."""
    torch.manual_seed(0)
    values = {**LATENT, "n_group": 2, "topk_group": 1, "n_routed_experts": 8}
    config = sized("deepseek_v3", {k: v for k, v in values.items() if k != "num_local_experts"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    return model


def folder_of(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@contextmanager
def masked(
    model: PreTrainedModel, kept: Sequence[torch.Tensor | None]
) -> Iterator[PreTrainedModel]:
    """The dense model with a logit of -inf for the experts of each block that are not ``kept``."""
    rows: dict[int, torch.Tensor] = {}
    for number, own in enumerate(kept):
        for name, weight in model.named_parameters():
            router = name.endswith(ROUTERS) and weight.shape[0] == 8
            if own is not None and f"layers.{number}." in name and router:
                rows[weight.data_ptr()] = own
    assert len(rows) == sum(own is not None for own in kept)
    linear = torch.nn.functional.linear

    def without(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if (own := rows.get(weight.data_ptr())) is None:
            return linear(x, weight, bias)
        # A product with fewer columns may have other last bits: the logits that count are of one.
        logits = linear(x, weight[own], None if bias is None else bias[own])
        return x.new_full((*x.shape[:-1], 8), -torch.inf).index_copy(-1, own, logits)

    torch.nn.functional.linear = without
    try:
        yield model
    finally:
        torch.nn.functional.linear = linear


@torch.no_grad()
def says(model: PreTrainedModel) -> tuple[torch.Tensor, list[int]]:
    """Logits, and greedy tokens."""
    tokens = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return model(IDS).logits, tokens[0].tolist()


@torch.no_grad()
def check_masked(dense: PreTrainedModel, recipe: cfsp.Recipe, tmp_path: Path) -> Any:
    """Prune from disk to disk and in memory; the model that reloads is the masked dense one."""
    source, out = folder_of(dense, tmp_path / "dense"), tmp_path / "out"
    plan = prune(source, None, recipe, out).plan
    kept = [block.experts for block in plan.blocks]
    assert {len(own) for own in kept if own is not None} == {recipe.experts}
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(loaded) is type(dense)
    with masked(dense, kept):
        expected = says(dense)
    assert not torch.equal(expected[0], dense(IDS).logits)
    found = says(loaded)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]
    live = prune(dense, make_tokenizer(), recipe, tmp_path / "live")
    assert weights(tmp_path / "live") == weights(out)
    assert torch.equal(dense(IDS).logits, expected[0])
    assert live.report.parameters_after == sum(p.numel() for p in loaded.parameters())
    return loaded, plan


@pytest.mark.parametrize("name", NAMES)
def test_removed_is_masked_to_the_last_bit_in_the_stock_class(name: str, tmp_path: Path) -> None:
    dense = make(name)
    layout = with_fewer_experts(dense, checked_layout(dense), 6)
    loaded, plan = check_masked(dense, WHOLE, tmp_path)
    fewer = layout.fewer_experts
    assert fewer is not None
    assert getattr(loaded.config, fewer.name) == 6
    assert loaded.config.model_type == name
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    aliases = [k for k, v in type(loaded.config).attribute_map.items() if v == fewer.name]
    assert {written[key] for key in (fewer.name, *aliases)} == {6}
    assert all(block.share in (0.75, 1) or len(block.units) > 1 for block in plan.blocks)


@pytest.mark.parametrize(("score", "kept"), [("msan", 6), ("reap", 4), ("frequency", 6)])
def test_groups_of_a_router_keep_as_many_each(score: str, kept: int, tmp_path: Path) -> None:
    recipe = replace(WHOLE, experts=kept, expert_score=score)
    _, plan = check_masked(grouped(), recipe, tmp_path)
    for block in plan.blocks[1:]:
        assert block.experts is not None
        assert int((block.experts < 4).sum()) == kept // 2


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text"])
def test_experts_and_then_channels_of_those_left(name: str, tmp_path: Path) -> None:
    source = folder_of(make(name), tmp_path / "dense")
    out, live = tmp_path / "out", AutoModelForCausalLM.from_pretrained(source).eval()
    plan = prune(source, None, BOTH, out).plan
    prune(live, make_tokenizer(), BOTH, tmp_path / "live")
    assert weights(tmp_path / "live") == weights(out)
    loaded = cfsp.load(out)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, live(IDS).logits)
    left = [own.total for block in plan.blocks for own in block.left_units]
    assert abs(1 - sum(plan.widths) / sum(left) - 1 / 3) < 0.05
    for block in plan.blocks:
        assert [len(k) for k in block.kept] == [6 if u.experts > 1 else 1 for u in block.units]


def test_a_uniform_cut_of_both_needs_no_class_of_ours(tmp_path: Path) -> None:
    recipe = replace(BOTH, uniform=True)
    result = prune(folder_of(make("qwen3_moe"), tmp_path / "d"), None, recipe, tmp_path / "out")
    assert result.report.stock
    assert type(result.model).__name__ == "Qwen3MoeForCausalLM"
    assert result.model.config.num_local_experts == 6


@pytest.mark.parametrize("budget", ["params=0.26", "flops=0.15@1x64"])
def test_a_budget_counts_the_experts_that_go(budget: str, tmp_path: Path) -> None:
    recipe = replace(WHOLE, sparsity=0.3, budget=budget, width_multiple=8)
    report = prune(folder_of(make("mixtral"), tmp_path / "dense"), None, recipe, None).report
    kind, wanted = ("parameters", 0.74) if "params" in budget else ("flops", 0.85)
    before, after = (getattr(side, kind) for side in (report.sizes.before, report.sizes.after))
    assert abs(after / before - wanted) < 0.005
    assert (report.sizes.before.experts, report.sizes.after.experts) == (32, 24)
    assert any("32" in was and "24" in now for _, was, now in report.sizes.rows())


def hooked(model: PreTrainedModel, windows: torch.Tensor) -> dict[int, torch.Tensor]:
    """[3, E] fp64 of every block with experts: tokens, and sums of squared norms and of norms times
    shares, of what the model's own experts give each token alone."""
    double = copy.deepcopy(model).double()
    double.set_experts_implementation("eager")
    layout, found = checked_layout(model), {}

    def observe(number: int, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        x, *routing = (a.double() if a.is_floating_point() else a for a in args)
        experts = next(module.parameters()).shape[0]
        total = found.setdefault(number, torch.zeros(3, experts, dtype=torch.float64))
        forward = type(module).forward
        if not routing:  # a row for every expert and token, scaled by its share
            norms = forward(module, x).unflatten(0, (experts, -1)).norm(dim=-1)
            seen = x.unflatten(0, (experts, -1)).any(-1)
            total += torch.stack([seen.sum(1), norms.square().sum(1), norms.sum(1)])
            return
        chosen, shares = routing
        for expert in range(experts):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            index = torch.full((len(rows), 1), expert)
            norms = forward(module, x[rows], index, torch.ones(len(rows), 1).double()).norm(dim=-1)
            gated = (norms * shares[rows, place]).sum()
            total[:, expert] += torch.stack([torch.tensor(len(rows)), norms.square().sum(), gated])

    for number, block in enumerate(layout.find_blocks(double)):
        for ffn in layout.block_ffns(block):
            if isinstance(ffn, ExpertsFFN):
                ffn.module(block).register_forward_pre_hook(
                    lambda module, args, number=number: observe(number, module, args)
                )
    with torch.no_grad():
        double(windows)
    return found


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text"])
def test_scores_are_those_of_the_dense_models_own_experts(
    name: str, windows: torch.Tensor, tmp_path: Path
) -> None:
    model = make(name)
    layout = checked_layout(model)
    found = cfsp.calibration.collect.collect_statistics(
        model, layout, windows, micro_batch=4, progress=False
    )
    save_statistics(found, tmp_path / "s.safetensors")
    again, expected = load_statistics(tmp_path / "s.safetensors"), hooked(model, windows)
    assert expected
    for number, (tokens, energy, gated) in expected.items():
        for statistics in (found, again):
            scores = {n: expert_scores(statistics.blocks[number], n) for n in EXPERT_SCORES}
            seen = tokens.clamp(min=1)
            assert torch.equal(scores["frequency"], tokens)
            assert torch.allclose(scores["msan"], energy / seen, rtol=1e-5)
            assert torch.allclose(scores["reap"], gated / seen, rtol=1e-5)
        assert len(energy.unique()) > 1
    quiet = [b for n, b in enumerate(found.blocks) if n not in expected]
    assert not any(len(block.expert_energy) for block in quiet)


@pytest.mark.parametrize("score", list(EXPERT_SCORES))
def test_the_experts_of_the_highest_scores_stay(score: str, windows: torch.Tensor) -> None:
    model = make("mixtral")
    statistics = calibrated(model, windows)
    recipe = replace(WHOLE, expert_score=score)
    plan = cfsp.plan(statistics, model, recipe)
    for block, known in zip(plan.blocks, statistics.blocks, strict=True):
        assert block.experts is not None
        assert block.experts.tolist() == sorted(expert_scores(known, score).argsort()[2:].tolist())


def calibrated(model: PreTrainedModel, windows: torch.Tensor) -> Statistics:
    layout = checked_layout(model)
    return cfsp.calibration.collect.collect_statistics(model, layout, windows, progress=False)


def test_equal_scores_go_to_the_lower_number_and_groups_choose_apart() -> None:
    fewer = FewerExperts(4, "num_experts", (), (), groups=2)
    assert fewer.choose(torch.tensor([1, 1, 1, 0, 9, 0, 8, 8.0])).tolist() == [0, 1, 4, 6]
    assert replace(fewer, groups=1).choose(torch.zeros(6)).tolist() == [0, 1, 2, 3]


def test_a_saved_plan_is_applied_as_it_is(tmp_path: Path) -> None:
    source = folder_of(make("deepseek_v3"), tmp_path / "dense")
    plan = prune(source, None, BOTH, tmp_path / "out").plan
    document = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert "experts" not in document["blocks"][0]
    assert load_plan(tmp_path / "out" / "plan.json").blocks[0].experts is None
    entry, block = document["blocks"][1], plan.blocks[1]
    assert block.experts is not None
    own = {int(n) for part in entry["experts"].split(",") for n in part.split("-")}
    assert own <= set(block.experts.tolist())
    assert max(int(n) for part in entry["kept"].split(",") for n in part.split("-")) < sum(
        own.total for own in block.left_units
    )
    applied = prune(
        source, None, plan=load_plan(tmp_path / "out" / "plan.json"), out=tmp_path / "b"
    )
    assert weights(tmp_path / "b") == weights(tmp_path / "out")
    save_plan(applied.plan, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["blocks"] == document["blocks"]


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ("0-1", "block 1: keeps 2 experts, its recipe's `experts` says 6"),
        (None, "every expert of an FFN must keep the same number of channels"),
        ("0,2,9", r"experts must be distinct .* in \[0, 7\]"),
        ("", "experts must name some of several"),
    ],
)
def test_an_edited_plan_of_other_experts_is_refused(
    experts: str | None, message: str, tmp_path: Path
) -> None:
    source = folder_of(make("qwen3_moe"), tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(source)
    prune(model, make_tokenizer(), WHOLE, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "plan.json").read_text())
    entry = document["blocks"][0]
    if experts is None:
        del entry["experts"]
    else:
        entry["experts"] = experts
        count = len(experts.split("-")) if experts == "0-1" else 3
        entry.update(width=count * 24, kept=f"0-{count * 24 - 1}")
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(CfspError, match=message.replace("block 1", "block 0")):
        prune(source, None, plan=load_plan(tmp_path / "plan.json"), out=tmp_path / "b")


def test_a_plan_of_uneven_groups_is_refused(tmp_path: Path) -> None:
    source, recipe = folder_of(grouped(), tmp_path / "dense"), replace(WHOLE, experts=6)
    plan = prune(source, None, recipe, None).plan
    uneven = replace(plan.blocks[1], experts=torch.tensor([0, 1, 2, 3, 4, 5]))
    plan = replace(plan, blocks=(plan.blocks[0], uneven, *plan.blocks[2:]))
    with pytest.raises(CfspError, match="block 1: its experts must be as many of each of 2 groups"):
        prune(source, None, plan=plan, out=tmp_path / "b")


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "ernie4_5_moe"])
def test_experts_that_move_up_in_place_are_those_of_new_memory(name: str) -> None:
    """As on a GPU, where there is no room for a large block twice, and as from disk to disk."""
    model = make(name)
    layout = with_fewer_experts(model, checked_layout(model), 6)
    block, fewer = layout.find_blocks(model)[-1], layout.fewer_experts
    ffn = next(ffn for ffn in layout.block_ffns(block) if isinstance(ffn, ExpertsFFN))
    assert fewer is not None
    for kept in ([0, 1, 3, 4, 6, 7], [2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5]):
        cut = [copy.deepcopy(block) for _ in range(2)]
        before = cut[1].get_parameter(ffn.down).data_ptr()
        for own, room in zip(cut, (None, in_place), strict=True):
            keep_experts_(own, fewer, torch.tensor(kept), room)
        assert cut[1].get_parameter(ffn.down).data_ptr() == before
        for key, value in cut[0].state_dict().items():
            assert torch.equal(value, cut[1].state_dict()[key]), key
        down = cut[0].get_parameter(ffn.down)
        assert torch.equal(down, block.get_parameter(ffn.down)[kept])
        assert down.untyped_storage().nbytes() == down.nbytes


@pytest.mark.parametrize(
    ("name", "recipe", "message"),
    [
        (
            "mixtral",
            replace(WHOLE, experts=1),
            r"experts must be in \[2, 8\] for this model, got 1",
        ),
        (
            "mixtral",
            replace(WHOLE, experts=9),
            r"experts must be in \[2, 8\] for this model, got 9",
        ),
        ("llama", WHOLE, "experts: 'llama': it has no kinds of routed experts; drop `experts`"),
        ("grouped", replace(WHOLE, experts=5), "a multiple of 2 has to stay, 4 or more"),
        ("grouped", replace(WHOLE, experts=2), "chooses 2 of 1 of 2 groups, .* 4 or more"),
        ("mixtral", replace(WHOLE, sparsity=0.3, budget="latency=0.2@1x32"), "drop `experts`"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(
    name: str, recipe: cfsp.Recipe, message: str, tmp_path: Path
) -> None:
    dense = grouped() if name == "grouped" else make(name)
    source = folder_of(dense, tmp_path / "dense")
    with pytest.raises(CfspError, match=message) as error:
        prune(source, None, recipe, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_recipes_that_cannot_be_are_refused(windows: torch.Tensor) -> None:
    with pytest.raises(CfspError, match="experts must be 1 or more"):
        cfsp.Recipe(experts=0)
    with pytest.raises(CfspError, match=r"expert score 'size'.*msan"):
        cfsp.Recipe(expert_score="size")
    model = make("mixtral")
    statistics = calibrated(model, windows)
    with pytest.raises(CfspError, match="`experts` is of a whole model: give the model itself"):
        cfsp.plan(statistics, checked_layout(model).part_weights, WHOLE)  # type: ignore[arg-type]


def test_as_many_experts_as_there_are_is_no_removal(tmp_path: Path) -> None:
    source = folder_of(make("qwen3_moe"), tmp_path / "dense")
    with pytest.warns(UserWarning, match="the plan removes nothing"):
        plan = prune(source, None, replace(WHOLE, experts=8), None).plan
    assert all(block.experts is None for block in plan.blocks)


def test_a_router_that_knows_how_many_there_are_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = Qwen3MoeTopKRouter.forward

    def scaled(self: Any, hidden_states: torch.Tensor) -> Any:
        logits, shares, chosen = forward(self, hidden_states)
        return logits, shares * len(self.weight), chosen

    monkeypatch.setattr(Qwen3MoeTopKRouter, "forward", scaled)
    model = make("qwen3_moe")
    with pytest.raises(CfspError, match="without some experts it gives something else than masked"):
        with_fewer_experts(model, checked_layout(model), 6)


def test_the_amount_that_recipes_stand_for() -> None:
    assert (cfsp.Recipe().sparsity, WHOLE.sparsity, BOTH.sparsity) == (0.3, 0, 1 / 3)
    assert WHOLE.resolved_compensation == "none"
    assert BOTH.resolved_compensation == "least-squares"
    assert cfsp.Recipe(**{**WHOLE.to_dict(), "calibration": CALIBRATION}) == WHOLE


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = folder_of(make("qwen3_moe"), tmp_path / "dense"), tmp_path / "out"
    small = ["--dataset", TEXT, "--samples", "6", "--seqlen", "24", "--quiet"]
    options = ["--experts", "6", "--expert-score", "reap", "--eval-windows", "0"]
    assert main(["prune", str(source), "--out", str(out), *options, *small]) == 0
    printed = capsys.readouterr().out
    assert "experts: 24 -> 18 (75.0%)" in printed
    assert "6 of 8" in printed
    assert "23.08% of FFN channels and 6 of 24 experts removed" in " ".join(printed.split())
    assert "| experts | 24 | 18 (75.0%) |" in (out / "README.md").read_text()
    recipe = load_plan(out / "plan.json").recipe
    assert (recipe.experts, recipe.expert_score, recipe.sparsity) == (6, "reap", 0)
    assert main(["prune", str(source), "--dry-run", *options, *small]) == 0


def test_an_estimate_counts_what_is_left(tmp_path: Path) -> None:
    source = folder_of(make("deepseek_v3"), tmp_path / "dense")
    report = prune(source, None, WHOLE, None).report
    found = cfsp.estimate(source, WHOLE, eval_windows=0)
    assert found.sizes == report.sizes
    assert report.parameters_after < report.parameters_before
