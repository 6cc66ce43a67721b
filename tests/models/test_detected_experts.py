"""Experts of families that none are written down for: found by structure, observed, cut, saved."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import silu
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

import cfsp
from cfsp.calibration.collect import collect_statistics
from cfsp.errors import CfspError
from cfsp.models.detection.ffns import detect_layout
from cfsp.models.detection.stacked import stacked_ffns
from cfsp.models.detection.trial import checked_layout
from cfsp.models.layouts import LAYOUTS
from cfsp.models.loading import make_skeleton
from cfsp.models.parts.channels import CutDown, Routing, Units
from cfsp.models.parts.experts import ExpertsFFN

from ..conftest import TINY, make_tiny, make_tokenizer
from .test_families import RECIPE, logits

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Family:
    """What a family's own code says: its FFNs in order, by module, with the width's config name."""

    ffns: dict[str, str]
    config: dict[str, object]
    transposed: bool = False


MOE, INTERMEDIATE = "moe_intermediate_size", "intermediate_size"
SHARED, SHARED_EXPERT = "shared_intermediate_size", "shared_expert_intermediate_size"
DENSE = {"mlp.down_proj": INTERMEDIATE}
NUMBERS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
OF_MOE = {**NUMBERS, "n_routed_experts": 4, "num_shared_experts": 1, "n_shared_experts": 2, MOE: 24}
DEEPSEEK = {
    **OF_MOE,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": None,
}
LINEAR = {f"linear_{n}": 4 for n in ("num_key_heads", "num_value_heads")}
LINEAR |= {f"linear_{n}": 8 for n in ("key_head_dim", "value_head_dim")}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
HYBRID = ["linear_attention", "full_attention"] * 2


def experts(width: str = MOE, path: str = "mlp.experts") -> dict[str, str]:
    return {f"{path}.down_proj": width}


def shared(width: str = SHARED, path: str = "mlp.shared_experts") -> dict[str, str]:
    return {f"{path}.down_proj": width}


ONLY = experts(INTERMEDIATE)
SHARING = {**experts(), **shared()}
FAMILIES = {
    "afmoe": Family({**SHARING, **DENSE}, {**OF_MOE, "num_dense_layers": 1}),
    "axk1": Family({**SHARING, **DENSE}, DEEPSEEK),
    "bailing_hybrid": Family({**SHARING, **DENSE}, DEEPSEEK),
    "beam": Family({**experts(), **DENSE}, {**OF_MOE, "n_group": 1, "topk_group": 1}),
    "cohere2_moe": Family({**ONLY, **shared()}, OF_MOE),
    "deepseek_v2": Family({**SHARING, **DENSE}, DEEPSEEK),
    "deepseek_v3": Family({**SHARING, **DENSE}, DEEPSEEK),
    "deepseek_v32": Family({**SHARING, **DENSE}, DEEPSEEK),
    "dots1": Family(
        {**SHARING, **DENSE}, {**OF_MOE, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    ),
    "ernie4_5_moe": Family(
        {**SHARING, **DENSE},
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            MOE: 24,
        },
    ),
    "exaone_moe": Family({**SHARING, **DENSE}, {**OF_MOE, "n_group": 1, "topk_group": 1}),
    "flex_olmo": Family(ONLY, OF_MOE),
    "flint": Family({**experts(), **shared(SHARED_EXPERT, "mlp.shared_expert"), **DENSE}, OF_MOE),
    "glm4_moe": Family({**SHARING, **DENSE}, {**OF_MOE, "n_group": 1, "topk_group": 1}),
    "glm4_moe_lite": Family({**SHARING, **DENSE}, DEEPSEEK),
    "gpt_oss": Family(ONLY, OF_MOE, True),
    "granitemoe": Family(experts(INTERMEDIATE, "block_sparse_moe.experts"), OF_MOE),
    "granitemoe_swa": Family(experts(INTERMEDIATE, "block_sparse_moe.experts"), OF_MOE),
    "granitemoehybrid": Family(
        {**experts(INTERMEDIATE, "block_sparse_moe.experts"), "shared_mlp.output_linear": SHARED},
        {**OF_MOE, **MAMBA, "layer_types": ["mamba", "attention"] * 2, SHARED: 40},
    ),
    "granitemoeshared": Family(
        {**experts(INTERMEDIATE, "block_sparse_moe.experts"), "shared_mlp.output_linear": SHARED},
        {**OF_MOE, SHARED: 40},
    ),
    "hunyuan_v1_moe": Family({**ONLY, **shared(path="mlp.shared_mlp")}, OF_MOE),
    "hy_v3": Family({**SHARING, **DENSE}, OF_MOE),
    "jamba": Family(
        {**experts(INTERMEDIATE, "feed_forward.experts"), "feed_forward.down_proj": INTERMEDIATE},
        {
            **OF_MOE,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "kimi_linear": Family({**SHARING, **DENSE}, DEEPSEEK),
    "laguna": Family(
        {**experts(), **shared(SHARED_EXPERT), **DENSE}, {**OF_MOE, SHARED_EXPERT: 40}
    ),
    "lfm2_moe": Family(
        {**experts(path="feed_forward.experts"), "feed_forward.w2": INTERMEDIATE},
        {
            **OF_MOE,
            "layer_types": ["conv", "full_attention"] * 2,
            "num_dense_layers": 1,
            "head_dim": None,
        },
    ),
    "llama4_text": Family(
        {
            **experts(INTERMEDIATE, "feed_forward.experts"),
            **shared(SHARED, "feed_forward.shared_expert"),
            "feed_forward.down_proj": "intermediate_size_mlp",
        },
        {**OF_MOE, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 2},
        True,
    ),
    "mellum": Family(experts(), OF_MOE),
    "mimo_v2_flash": Family({**experts(), **DENSE}, OF_MOE),
    "minimax": Family(ONLY, {**OF_MOE, "layer_types": HYBRID}),
    "minimax_m2": Family(ONLY, {**OF_MOE, "rotary_dim": 8}),
    "minimax_m3_vl_text": Family(
        {**ONLY, **shared(SHARED)}, {**OF_MOE, SHARED: 40, "dense_intermediate_size": 56}
    ),
    "mixtral": Family(ONLY, OF_MOE),
    "olmoe": Family(ONLY, OF_MOE),
    "phimoe": Family(ONLY, OF_MOE),
    "qwen2_moe": Family(
        {**experts(), **shared(SHARED_EXPERT, "mlp.shared_expert")}, {**OF_MOE, SHARED_EXPERT: 40}
    ),
    "qwen3_5_moe_text": Family(
        {**experts(), **shared(SHARED_EXPERT, "mlp.shared_expert")},
        {**OF_MOE, **LINEAR, SHARED_EXPERT: 40},
    ),
    "qwen3_moe": Family({**experts(), **DENSE}, {**OF_MOE, "mlp_only_layers": [1]}),
    "qwen3_next": Family(
        {**experts(), **shared(SHARED_EXPERT, "mlp.shared_expert")},
        {**OF_MOE, **LINEAR, SHARED_EXPERT: 40},
    ),
    "solar_open": Family(SHARING, {**OF_MOE, "n_group": 1, "topk_group": 1}),
}
WIDE = replace(RECIPE, width_multiple=8)


def make(name: str) -> PreTrainedModel:
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return make_tiny(name, **FAMILIES[name].config)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], cfsp.PruneResult]:
    root = tmp_path_factory.mktemp("experts")

    @cache
    def prune(name: str) -> cfsp.PruneResult:
        options = {"eval_windows": 0, "progress": False}
        return cfsp.prune(make(name), make_tokenizer(), WIDE, root / name, **options)

    return prune


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_and_what_lies_beside_them_are_found(name: str) -> None:
    model, family = make(name), FAMILIES[name]
    layout = detect_layout(model)
    assert layout.blocks == "model.layers"
    assert {ffn.down: ffn.width for ffn in layout.ffns} == family.ffns
    assert [ffn.down for ffn in layout.ffns] == list(family.ffns)
    assert detect_layout(make_skeleton(model.config, torch.float32)) == layout


@torch.no_grad()
def mask_(model: PreTrainedModel, family: Family, plan: cfsp.PruningPlan) -> None:
    """Set the columns of down to zero for all channels that the plan removes."""
    for block, planned in zip(model.model.layers, plan.blocks, strict=True):
        parameters, kept = dict(block.named_parameters()), iter(planned.kept)
        for path in family.ffns:
            if path in parameters:
                down = parameters[path].mT if family.transposed else parameters[path]
                for matrix, channels in zip(down, next(kept), strict=True):
                    stays = torch.zeros(matrix.shape[1]).index_fill(0, channels, 1)
                    matrix.mul_(stays)
            elif f"{path}.weight" in parameters:
                matrix = parameters[f"{path}.weight"]
                matrix.mul_(torch.zeros(matrix.shape[1]).index_fill(0, next(kept)[0], 1))
        assert not list(kept)


@pytest.mark.parametrize("name", FAMILIES)
def test_cut_experts_equal_those_with_the_same_channels_masked(
    name: str, pruned: Callable[[str], cfsp.PruneResult]
) -> None:
    result, dense = pruned(name), make(name)
    whole = logits(dense)
    mask_(dense, FAMILIES[name], result.plan)
    expected = logits(dense)
    assert not torch.allclose(whole, expected, atol=1e-3)
    assert torch.allclose(logits(result.model), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(cfsp.load(result.out)), logits(result.model))


@torch.no_grad()
def own_activations(
    name: str, model: PreTrainedModel, windows: torch.Tensor
) -> dict[tuple[int, int], torch.Tensor]:
    """(block, expert) -> what enters its down projection [its tokens, F], expert by expert."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    hooks = []

    def product(module: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
        if name == "gpt_oss":
            both = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
            gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
            return (up + 1) * gate * (1.702 * gate).sigmoid()
        weight = module.gate_up_proj[expert]
        both = x @ (weight if FAMILIES[name].transposed else weight.T)
        gate, up = both.chunk(2, -1)
        if name == "minimax_m3_vl_text":
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            return (up + 1) * gate * (1.702 * gate).sigmoid()
        return silu(gate) * up

    for number, block in enumerate(model.model.layers):
        modules = [m for n, m in block.named_modules() if n.endswith(".experts")]

        def hook(module: nn.Module, args: tuple, number: int = number) -> None:
            for expert in range(len(module.down_proj)):
                if name == "llama4_text":
                    x = args[0].chunk(len(module.down_proj))[expert]
                    x = x[x.abs().sum(1) > 0]
                else:
                    x = args[0][(args[1] == expert).any(1)]
                found[number, expert] = product(module, expert, x).double()

        hooks += [module.register_forward_pre_hook(hook) for module in modules]
    model(input_ids=windows, use_cache=False)
    for handle in hooks:
        handle.remove()
    return found


@pytest.mark.parametrize(
    "name", ["gpt_oss", "llama4_text", "minimax_m3_vl_text", "granitemoehybrid"]
)
def test_statistics_are_those_of_each_expert_on_its_own_tokens(
    name: str, windows: torch.Tensor
) -> None:
    model = make(name)
    expected = own_activations(name, model, windows)
    assert len({len(x) for x in expected.values()}) > 1
    layout = detect_layout(model)
    options = {"progress": False, "micro_batch": 4}
    found = collect_statistics(model, layout, windows, **options)
    for (number, expert), x in expected.items():
        part = found.blocks[number].parts()[expert]
        assert part.tokens == len(x)
        assert torch.allclose(part.mean, x.mean(0), rtol=1e-5, atol=1e-7)
        assert torch.allclose(part.variance, x.var(0, correction=0), rtol=1e-4, atol=1e-8)
    assert not any("forward" in module.__dict__ for module in model.modules())


class Sums:
    """An observer of the statistics alone."""

    def __init__(self, units: Units) -> None:
        self.sums = torch.zeros(2, units.total, dtype=torch.float64)
        self.norms = torch.zeros(2, 2 * units.experts, dtype=torch.float64)

    def totals(self) -> torch.Tensor:
        return self.sums

    def outputs(self) -> torch.Tensor:
        return self.norms

    def add(self, x: torch.Tensor, routing: Routing | None = None) -> None:
        pass


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_an_observed_model_says_what_it_says_unobserved(name: str) -> None:
    model = make(name)
    layout, expected = detect_layout(model), logits(model)
    with ExitStack() as stack:
        seen = []
        for _, block, ffn in layout.parts_of(model):
            seen.append(Sums(ffn.units(block)))
            stack.enter_context(ffn.observed(block, seen[-1]))
        assert torch.equal(logits(model), expected)
    assert all(observer.sums[1].max() > 0 for observer in seen)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_the_written_layout_of_experts_is_what_their_structure_says(name: str) -> None:
    found, written = detect_layout(make(name)).ffns, LAYOUTS[name].ffns
    plain = [ffn if isinstance(ffn, ExpertsFFN) else replace(ffn, activation="") for ffn in written]
    assert list(found) == plain


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text", "qwen2_moe", "jamba"])
def test_uniform_widths_are_those_of_a_config_of_the_family(name: str, tmp_path: Path) -> None:
    recipe = replace(WIDE, sparsity=1 / 3, uniform=True)
    model = make(name)
    result = cfsp.prune(
        model, make_tokenizer(), recipe, tmp_path / "out", eval_windows=0, progress=False
    )
    assert result.model.config.model_type == name
    assert type(result.model) is type(make(name))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(loaded), logits(result.model))
    experts_name = next(iter(FAMILIES[name].ffns.values()))
    assert getattr(loaded.config, experts_name) == result.plan.blocks[-1].kept[0].shape[1]


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text", "deepseek_v2"])
def test_a_pruned_model_says_the_names_of_its_widths_itself(
    name: str, pruned: Callable[[str], cfsp.PruneResult]
) -> None:
    result = pruned(name)
    assert type(result.model).__name__.startswith("CFSP")
    layout = detect_layout(result.model)
    assert {ffn.down: ffn.width for ffn in layout.ffns} == FAMILIES[name].ffns
    again = cfsp.prune(result.out, recipe=WIDE, eval_windows=0, progress=False)
    assert sum(again.plan.widths) < sum(result.plan.widths)


class Odd(nn.Module):
    """Experts of the right shapes."""

    def __init__(self, kind: str, gated: bool = True) -> None:
        super().__init__()
        self.kind, self.act_fn = kind, nn.SiLU()
        up, down = torch.empty(4, 48 if gated else 24, 32), torch.empty(4, 32, 24)
        turned = kind == "transposed"
        self.up_proj, self.down_proj = (
            nn.Parameter(x.mT.contiguous() if turned else x) for x in (up, down)
        )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        output = torch.zeros_like(hidden_states)
        turned = self.kind == "transposed"
        stacks = (x.mT if turned else x for x in (self.up_proj, self.down_proj))
        for expert, (up, down) in enumerate(zip(*stacks, strict=True)):
            shares = (top_k_weights * (top_k_index == expert)).sum(1, keepdim=True)
            both = hidden_states @ up.T
            if up.shape[0] == down.shape[1]:
                inner = self.act_fn(both)
            else:
                gate, linear_up = both.chunk(2, -1)
                inner = self.act_fn(gate) * linear_up
            if self.kind == "normalised":
                inner = inner / inner.norm(dim=-1, keepdim=True)
            output += inner @ down.T * (shares if self.kind != "unshared" else (shares > 0))
        return output


@pytest.mark.parametrize("kind", ["experts", "ungated", "transposed", "normalised", "unshared"])
def test_shapes_alone_are_no_experts(kind: str) -> None:
    model = make_tiny("helium")
    for block in model.model.layers:
        block.more = nn.Module()
        block.more.experts = Odd(kind, gated=kind != "ungated")
    if kind in ("normalised", "unshared"):
        with pytest.raises(CfspError, match=r"more\.experts of \w+ does not compute what"):
            detect_layout(model)
        return
    found = detect_layout(model).ffns
    assert [ffn.down for ffn in found] == ["more.experts.down_proj", "mlp.down_proj"]
    assert found[0].fused == (kind != "ungated")
    assert found[0].transposed == (kind == "transposed")
    assert found[0].units(model.model.layers[0]) == Units(24, 4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["experts", "ungated", "transposed"])
def test_experts_of_any_kind_are_cut_and_observed_alone(kind: str) -> None:
    block = nn.Module()
    block.experts = Odd(kind, gated=kind != "ungated")
    for parameter in block.parameters():
        parameter.normal_(0, 0.2)
    ((_, ffn),) = stacked_ffns(block)
    x, shares = torch.randn(9, 32), torch.rand(9, 2)
    chosen = torch.arange(18).view(9, 2) % 4
    expected, sums = block.experts(x, chosen, shares), Sums(Units(24, 4))
    with ffn.observed(block, sums):
        assert torch.allclose(block.experts(x, chosen, shares), expected, atol=1e-5)
    assert sums.sums[1].min() > 0
    assert sums.norms[:, ::2].min() > 0
    kept = torch.stack([torch.randperm(24)[:8].sort().values for _ in range(4)])
    masked = copy.deepcopy(block)
    down = masked.experts.down_proj.mT if kind == "transposed" else masked.experts.down_proj
    for matrix, channels in zip(down, kept, strict=True):
        matrix.mul_(torch.zeros(24).index_fill(0, channels, 1))

    def compensate(expert: int, down: torch.Tensor, out: torch.Tensor | None) -> CutDown:
        cut = down[:, kept[expert]]
        return CutDown(cut if out is None else out.copy_(cut), None)

    ffn.cut_(block, kept, compensate, None)
    assert ffn.units(block) == Units(8, 4)
    ours, theirs = (m.experts(x, chosen, shares) for m in (block, masked))
    assert torch.allclose(ours, theirs, atol=1e-5)


LOOP = {
    "n_layers_per_attn_res_block": 1,
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 3,
    "loop_num_passes": 2,
}
REFUSED = {
    "deepseek_v4": ({**DEEPSEEK, "num_key_value_heads": 1}, r"given \[1, 2, 4, 32\] for 2 tokens"),
    "glm_moe_dsa": (DEEPSEEK, "its blocks cannot be run one by one"),
    "inkling_text": (OF_MOE, "mlp.shared_experts of InklingDecoderLayer does not compute what"),
    "inkling2_text": (
        {**OF_MOE, "n_layers_per_attn_res_block": 2},
        "they are given more of each other than the hidden states",
    ),
    "inkling2_loop_text": ({**OF_MOE, **LOOP}, "block 1 is run after 3 others"),
    "longcat_flash": ({}, r"expected one list of \d+ blocks, found none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name: str) -> None:
    config, message = REFUSED[name]
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    values = {k: v for k, v in {**TINY, **config}.items() if v is not None}
    skeleton = make_skeleton(AutoConfig.for_model(name, **values), torch.float32)
    with pytest.raises(CfspError, match=f"unsupported architecture '{name}': .*{message}"):
        checked_layout(skeleton)
