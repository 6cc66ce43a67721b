"""Experts of families that none are written down for: found by structure, observed, cut, saved."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn.functional import silu
from transformers import PreTrainedModel

import cfsp
from cfsp.calibration.collect import collect_statistics
from cfsp.models.detection import detect_layout
from cfsp.models.ffns.channels import Routing
from cfsp.models.loading import make_skeleton

from ..conftest import make_tiny, make_tokenizer
from .test_families import RECIPE, logits


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
    "aria_text": Family(
        {**ONLY, **shared()}, {"moe_num_experts": 4, "moe_topk": 2, "head_dim": None}, True
    ),
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
    "name", ["gpt_oss", "llama4_text", "minimax_m3_vl_text", "aria_text", "granitemoehybrid"]
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
        part = found.blocks[number].ffns()[expert]
        assert part.tokens == len(x)
        assert torch.allclose(part.mean, x.mean(0), rtol=1e-5, atol=1e-7)
        assert torch.allclose(part.variance, x.var(0, correction=0), rtol=1e-4, atol=1e-8)
    assert not any("forward" in module.__dict__ for module in model.modules())


class Sums:
    """An observer of the statistics alone."""

    def __init__(self, channels: int) -> None:
        self.sums = torch.zeros(2, channels, dtype=torch.float64)

    def totals(self) -> torch.Tensor:
        return self.sums

    def add(self, x: torch.Tensor, routing: Routing | None = None) -> None:
        pass


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_an_observed_model_says_what_it_says_unobserved(name: str) -> None:
    model = make(name)
    layout, expected = detect_layout(model), logits(model)
    with ExitStack() as stack:
        seen = []
        for _, block, ffn in layout.ffns_of(model):
            seen.append(Sums(ffn.group(block).total))
            stack.enter_context(ffn.observed(block, seen[-1]))
        assert torch.equal(logits(model), expected)
    assert all(observer.sums[1].max() > 0 for observer in seen)
