"""Experts: statistics of routed tokens, one width for all of a block, the family's checkpoints."""

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import linear, silu
from transformers import PreTrainedModel

import cfsp
from cfsp.apportion import Steps, apportion
from cfsp.calibration.collect import collect_statistics
from cfsp.calibration.curves import ErrorCurve
from cfsp.calibration.statistics import Statistics, load_statistics, save_statistics
from cfsp.errors import CfspError
from cfsp.models.detection.ffns import layout_of
from cfsp.models.layouts import LAYOUTS
from cfsp.models.parts.channels import CutDown, Routing, Units, in_place
from cfsp.models.parts.experts import ExpertsFFN
from cfsp.pruning.allocation import AllocationProblem, allocate_widths
from cfsp.pruning.ranking import rank
from cfsp.report.figures import curves_figure

from ..conftest import make_tiny, make_tokenizer
from ..families.tiny import FAMILIES
from .test_families import ALL, make, recipe_for

RECIPE = recipe_for("deepseek_v3", "cfsp")


def collect(model: PreTrainedModel, windows: torch.Tensor, **options: object) -> Statistics:
    layout = LAYOUTS[model.config.model_type]
    return collect_statistics(model, layout, windows, progress=False, **options)


@torch.no_grad()
def routed_activations(
    model: PreTrainedModel, windows: torch.Tensor
) -> dict[tuple[int, int], torch.Tensor]:
    """(block, expert) -> its activations [tokens routed to it, F], from an ordinary forward."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    hooks = []
    for number, block in enumerate(model.model.layers):
        if not hasattr(block.mlp, "experts"):
            continue

        def hook(module: torch.nn.Module, args: tuple, number: int = number) -> None:
            states, index, _ = args
            for expert in range(len(module.down_proj)):
                x = states[(index == expert).any(1)]
                gate, up = linear(x, module.gate_up_proj[expert]).chunk(2, -1)
                found[number, expert] = (silu(gate) * up).double()

        hooks.append(block.mlp.experts.register_forward_pre_hook(hook))
    model(input_ids=windows, use_cache=False)
    for handle in hooks:
        handle.remove()
    return found


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_statistics_of_an_expert_are_those_of_its_tokens(
    name: str, fused: bool, windows: torch.Tensor
) -> None:
    model = make(name)
    expected = routed_activations(model, windows)
    assert len({len(x) for x in expected.values()}) > 1
    found = collect(model, windows, micro_batch=4, fused=fused)
    for (number, expert), x in expected.items():
        block = found.blocks[number]
        part = block.parts()[expert]
        assert part.tokens == len(x)
        assert block.tokens == windows.numel()
        assert torch.allclose(part.mean, x.mean(0), rtol=1e-5, atol=1e-7)
        assert torch.allclose(part.variance, x.var(0, correction=0), rtol=1e-4, atol=1e-8)
        assert torch.allclose(part.norm, (x.square().sum(0) / len(windows)).sqrt(), rtol=1e-5)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_shared_and_dense_ffns_beside_experts_have_statistics_of_every_token(
    windows: torch.Tensor,
) -> None:
    found = collect(make("deepseek_v3"), windows)
    assert [len(block.parts()) for block in found.blocks] == [1, 5, 5, 5]
    assert [(g.experts, g.count) for g in found.blocks[1].units] == [(4, 24), (1, 48)]
    for block in found.blocks:
        assert block.parts()[-1].tokens == windows.numel()
        assert block.parts()[-1].norm.min() > 0


def test_an_expert_without_tokens_has_scores_all_the_same(windows: torch.Tensor) -> None:
    model = make("mixtral")
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight[:] = 0  # the same two experts win for every token
    with pytest.warns(UserWarning, match="8 experts, the first in block 0, saw no calibration"):
        cfsp.calibrate(model, make_tokenizer(), RECIPE, progress=False)
    with warnings.catch_warnings():  # where more windows follow, what the first show says little
        warnings.filterwarnings("error", message=".*saw no calibration")
        default = replace(RECIPE, scorer="cfsp-output", width_windows=1, compensation=None)
        cfsp.prune(make("mixtral"), make_tokenizer(), default, progress=False)
    found = collect(model, windows)
    for block in found.blocks:
        assert sorted(block.expert_tokens) == [0, 0, windows.numel(), windows.numel()]
        for part in (part for part in block.parts() if part.tokens == 0):
            for values in (part.norm, part.mean, part.variance):
                assert torch.equal(values, torch.zeros(48).double())
    plan = cfsp.plan(found, model, replace(RECIPE, scorer="flap", compensation="none"))
    assert all(block.kept[0].shape[0] == 4 for block in plan.blocks)


def test_each_expert_keeps_its_own_channels_and_all_of_a_block_as_many(
    windows: torch.Tensor,
) -> None:
    model = make("deepseek_v3")
    statistics = collect(model, windows)
    plan = cfsp.plan(statistics, model, RECIPE)
    for block, known in zip(plan.blocks[1:], statistics.blocks[1:], strict=True):
        experts, shared = block.kept
        assert experts.shape[0] == 4
        assert shared.shape[0] == 1
        assert len({tuple(kept.tolist()) for kept in experts}) > 1
        for kept, part in zip([*experts, *shared], known.parts(), strict=True):
            best = part.norm.sort(descending=True, stable=True).indices[: len(kept)]
            assert torch.equal(kept, best.sort().values)
        assert block.width == experts.numel() + shared.numel()


@pytest.mark.parametrize("allocator", ["cfsp", "uniform", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5])
def test_widths_count_every_expert(allocator: str, sparsity: float) -> None:
    torch.manual_seed(0)
    experts, sizes = (1, 8, 1, 8, 1), (512, 64, 128, 64, 128)
    scores = tuple(torch.rand(e * f).double() for e, f in zip(experts, sizes, strict=True))
    units, steps = tuple(map(Units, sizes, experts)), tuple(Steps(size, 8) for size in sizes)
    importance = torch.rand(5).double() * 0.3
    problem = AllocationProblem(importance, scores, sparsity, units, steps=steps)
    widths = allocate_widths(problem, allocator)
    total = sum(e * w for e, w in zip(experts, widths, strict=True))
    assert abs(total - problem.budget) <= 8 * 8 / 2
    assert all(w % 8 == 0 and 8 <= w <= f for w, f in zip(widths, sizes, strict=True))
    if sparsity == 0:
        assert widths == sizes


def test_a_step_of_experts_is_taken_only_towards_the_budget() -> None:
    importance = torch.tensor([0.5, 0.1])
    ideal = torch.tensor([3.6, 6.6])
    for budget, expected in ((18, (3, 6)), (20, (3, 8)), (21, (4, 5)), (23, (4, 7))):
        assert apportion(ideal, [Steps(8)] * 2, budget, importance, [4, 1]) == expected


def test_a_budget_below_one_multiple_of_every_expert_is_refused() -> None:
    with pytest.raises(CfspError, match=r"multiples of 8: 2 FFNs can reach 0 to 0.875"):
        apportion(torch.ones(2), [Steps(64, 8)] * 2, 16, torch.ones(2), [8, 1])


def with_curves(statistics: Statistics) -> Statistics:
    """With an error curve for every FFN, whose error without any channel is their number."""
    ranking = rank(statistics, lambda number: pytest.fail("reads weights"), RECIPE)
    sizes = [units.count for block in statistics.blocks for units in block.units]
    curves = (ErrorCurve(torch.tensor([0, f]), torch.tensor([float(f), 0.0])) for f in sizes)
    ranking = replace(ranking, curves=tuple(curves))
    return replace(statistics, rankings=(ranking,))


def test_statistics_and_plan_go_through_their_files(windows: torch.Tensor, tmp_path: Path) -> None:
    model = make("deepseek_v3")
    statistics = collect(model, windows)
    save_statistics(statistics, tmp_path / "s")
    back = load_statistics(tmp_path / "s")
    assert [block.units for block in back.blocks] == [b.units for b in statistics.blocks]
    assert [b.expert_tokens for b in back.blocks] == [b.expert_tokens for b in statistics.blocks]
    plan = cfsp.plan(with_curves(back), model, RECIPE)
    cfsp.save_plan(plan, tmp_path / "p")
    again = cfsp.load_plan(tmp_path / "p")
    for a, b in zip(plan.blocks, again.blocks, strict=True):
        assert all(map(torch.equal, a.kept, b.kept))
        assert [int(curve.errors[0]) for curve in b.error_curves] == [own.count for own in b.units]
    assert [len(block.error_curves) for block in again.blocks][:2] == [1, 2]
    figure = str(curves_figure(again))
    assert "block 0: " in figure
    assert "block 1, FFN 1: " in figure

    document = json.loads((tmp_path / "p").read_text())
    assert "ffns" not in document["blocks"][0]
    document["blocks"][1].update(kept="0-7,24-31,48-55,72-78,96-104", width=40)
    (tmp_path / "p").write_text(json.dumps(document))
    with pytest.raises(CfspError, match=r"block 1: every expert .* got 7 to 8"):
        cfsp.load_plan(tmp_path / "p")
    document["blocks"][1].update(kept="0-6,24-30,48-54,72-78,96-104", width=37)
    (tmp_path / "p").write_text(json.dumps(document))
    with pytest.raises(CfspError, match="plan, block 1: width 7 is no multiple of 8"):
        cfsp.prune(model, plan=cfsp.load_plan(tmp_path / "p"), eval_windows=0, progress=False)


def test_what_experts_cannot_do_is_refused_before_the_calibration() -> None:
    for recipe, message in (
        (replace(RECIPE, scorer="flap"), "compensation 'bias' adds a bias, and mlp.experts.down"),
        (replace(RECIPE, width_multiple=12), "width_multiple 12 is no multiple of 8"),
    ):
        with pytest.raises(CfspError, match=message):
            cfsp.prune(make("mixtral"), make_tokenizer(), recipe, progress=False)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_the_checkpoint_has_the_names_and_shapes_of_the_familys(
    name: str, uniform: bool, tmp_path: Path
) -> None:
    dense = make(name)
    dense.save_pretrained(tmp_path / "dense")
    recipe = replace(RECIPE, sparsity=1 / 3, allocator="uniform") if uniform else RECIPE
    out = tmp_path / "out"
    result = cfsp.prune(dense, make_tokenizer(), recipe, out, eval_windows=0, progress=False)
    shapes = []
    for folder in ("dense", "out"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            names = file.keys()
            shapes.append({name: file.get_slice(name).get_shape() for name in names})
    assert shapes[0].keys() == shapes[1].keys()
    last = "block_sparse_moe.experts.3.w2" if name == "mixtral" else "mlp.experts.3.down_proj"
    width = result.plan.blocks[3].kept[0].shape[1]
    assert shapes[1][f"model.layers.3.{last}.weight"] == [32, width]
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == (name if uniform else f"cfsp_{name}")
    assert ("auto_map" in config) != uniform


class Seen:
    """An observer that counts."""

    def __init__(self, units: Units) -> None:
        self.sums = torch.zeros(2, units.total, dtype=torch.float64)
        self.norms = torch.zeros(2, 2 * units.experts, dtype=torch.float64)
        self.routings: list[Routing] = []

    def totals(self) -> torch.Tensor:
        return self.sums

    def outputs(self) -> torch.Tensor:
        return self.norms

    def add(self, x: torch.Tensor, routing: Routing | None = None) -> None:
        assert routing is not None
        self.routings.append(routing)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_that_are_observed_give_the_models_own_output(name: str) -> None:
    model = make(name)
    block, layout = model.model.layers[-1], LAYOUTS[name]
    experts = next(ffn for ffn in layout.block_parts(block) if ffn.units(block).experts > 1)
    units, module = experts.units(block), experts.module(block)
    states = torch.randn(37, 32, generator=torch.Generator().manual_seed(0))
    logits = torch.randn(37, units.experts, generator=torch.Generator().manual_seed(1))
    shares, chosen = logits.softmax(-1).topk(2)
    expected = module(states, chosen, shares)
    seen = Seen(units)
    with experts.observed(block, seen):
        assert torch.equal(module(states, chosen, shares), expected)
        chosen[3, 0] = units.experts  # on another machine: no expert here adds to it
        others = module(states, chosen, shares)
    first, second = seen.routings
    assert int(first.offsets[-1]) == 74
    assert int(second.offsets[-1]) == 73
    assert torch.equal(second.experts, second.experts.sort().values)
    same = torch.ones(37, dtype=torch.bool)
    same[3] = False
    assert torch.equal(others[same], expected[same])
    assert others[3].isfinite().all()
    assert not torch.equal(others[3], expected[3])


@pytest.mark.parametrize("fused", [True, False])
def test_experts_of_any_width_are_calibrated_where_the_model_runs(
    fused: bool, windows: torch.Tensor
) -> None:
    """Grouped products take rows of whole 16 bytes; a model may be told to do without."""
    config = {**dict(ALL["qwen3_moe"].config), "moe_intermediate_size": 34}
    model = make_tiny("qwen3_moe", 0, **config)
    model.set_experts_implementation("eager")
    expected = routed_activations(model, windows)
    found = collect(model, windows, micro_batch=4, fused=fused)
    for (number, expert), x in expected.items():
        part = found.blocks[number].parts()[expert]
        assert part.tokens == len(x)
        assert torch.allclose(part.mean, x.mean(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_experts_that_are_cut_where_they_lie_are_those_cut_elsewhere(family: str) -> None:
    """As on a GPU, where there is no room for a large block twice."""
    model = FAMILIES[family].model()
    layout = layout_of(model)
    generator, blocks = torch.Generator().manual_seed(0), layout.find_blocks(model)
    for block in blocks:
        for ffn in (ffn for ffn in layout.block_parts(block) if isinstance(ffn, ExpertsFFN)):
            units, cut = ffn.units(block), []
            order = torch.rand(units.experts, units.count, generator=generator).argsort(1)
            kept = order[:, : units.count // 2].sort(1).values

            def compensate(
                expert: int,
                weight: torch.Tensor,
                out: torch.Tensor | None,
                kept: torch.Tensor = kept,
            ) -> CutDown:
                left = weight[:, kept[expert]]
                return CutDown(left if out is None else out.copy_(left), None)

            for room in (None, in_place):
                copied = copy.deepcopy(block)
                before = {name: copied.get_parameter(name).data_ptr() for name in ffn.weight_names}
                ffn.cut_(copied, kept, compensate, room)
                cut.append(copied)
                for name, address in before.items():
                    same = copied.get_parameter(name).data_ptr() == address
                    assert same == (room is in_place)
            for name, value in cut[0].state_dict().items():
                assert torch.equal(value, cut[1].state_dict()[name]), name
