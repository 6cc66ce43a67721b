"""Every family: cut equals masked, streamed equals in memory, and the folder reloads anywhere."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

import cfsp
from cfsp.errors import CfspError
from cfsp.models.layouts import LAYOUTS
from cfsp.models.opening import open_model, open_streamed

from ..conftest import make_tiny, make_tokenizer, run_fresh
from ..families.checks import BothWays

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Family:
    """A tiny model of a family, and where it has its FFN as its own code says it."""

    down: tuple[str, ...] = ("mlp.down_proj",)
    """Modules in a block whose input are the channels, those that a block has, in order."""
    blocks: str = "model.layers"
    config: tuple[tuple[str, object], ...] = ()


def family(*down: str, blocks: str = "model.layers", **config: object) -> Family:
    return Family(down or ("mlp.down_proj",), blocks, tuple(config.items()))


SLIDING = ["sliding_attention", "full_attention"] * 2
ALL = {
    "llama": family(),
    "mistral": family(),
    "qwen2": family(),
    "qwen3": family(),
    "gemma": family(),
    "gemma2": family(sliding_window=8),
    "gemma3_text": family(sliding_window=8, layer_types=SLIDING),
    "olmo2": family(),
    "granite": family(mlp_bias=True, residual_multiplier=0.5),
    "cohere2": family(sliding_window=8),
    "smollm3": family(mlp_bias=True),
    "stablelm": family(),
    "phi3": family(),
    "glm4": family(),
    "phi": family("mlp.fc2"),
    "starcoder2": family("mlp.c_proj"),
    "gpt_neox": family("mlp.dense_4h_to_h", blocks="gpt_neox.layers"),
    "falcon": family(
        "mlp.dense_4h_to_h", blocks="transformer.h", ffn_hidden_size=48, bias=True, head_dim=None
    ),
    "bloom": family("mlp.dense_4h_to_h", blocks="transformer.h"),
    "opt": family("fc2", blocks="model.decoder.layers", ffn_dim=48, word_embed_proj_dim=32),
    "mixtral": family("mlp.experts", num_local_experts=4),
    "qwen3_moe": family(
        "mlp.experts",
        "mlp.down_proj",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        mlp_only_layers=[1],
    ),
    "deepseek_v3": family(
        "mlp.experts",
        "mlp.shared_experts.down_proj",
        "mlp.down_proj",
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=24,
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        head_dim=None,
    ),
    "gpt2": family("mlp.c_proj", blocks="transformer.h", n_inner=48),
}
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3")
UNIFORM = "uniform"
CASES = [
    (name, case)
    for name in ALL
    for case in ("cfsp", "wanda-sp" if name in EXPERTS else "flap", UNIFORM)
    if (name, case) != ("bloom", UNIFORM)
]
"""(family, scorer or UNIFORM)."""
RECIPE = cfsp.Recipe(
    scorer="cfsp",
    sparsity=0.3,
    width_multiple=1,
    micro_batch=2,
    calibration=cfsp.Calibration(dataset=__file__, samples=4, seqlen=16),
)


def recipe_for(name: str, scorer: str) -> cfsp.Recipe:
    if scorer == UNIFORM:
        return replace(RECIPE, sparsity=1 / 3, uniform=True, width_multiple=8)
    return replace(RECIPE, scorer=scorer, width_multiple=8 if name in EXPERTS else 1)


def make(name: str, seed: int = 0) -> PreTrainedModel:
    return make_tiny(name, seed, **dict(ALL[name].config))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=torch.arange(24)[None] * 11 % 256, use_cache=False).logits


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], BothWays]:
    root = tmp_path_factory.mktemp("families")

    @cache
    def dense(name: str) -> Path:
        make(name).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
        return root / name

    @cache
    def prune(name: str, scorer: str) -> BothWays:
        recipe = recipe_for(name, scorer)
        options = {"recipe": recipe, "eval_windows": 0, "progress": False}
        opened = open_model(dense(name))
        out = root / f"{name}-{scorer}"
        return BothWays(
            dense(name),
            cfsp.prune(opened.model, opened.tokenizer, out=out, **options),
            cfsp.prune(dense(name), out=root / f"{name}-{scorer}-streamed", **options),
        )

    return prune


@contextmanager
def masked(model: PreTrainedModel, name: str, result: cfsp.PruneResult) -> Iterator[None]:
    """Removed channels are zero, or their mean where the plan puts it back."""
    compensated = result.plan.recipe.resolved_compensation == "bias"

    def hook(module: object, args: tuple[torch.Tensor], removed: object, fill: object) -> tuple:
        x = args[0].clone()
        x[..., removed] = fill
        return (x,)

    with ExitStack() as stack:
        blocks = model.get_submodule(ALL[name].blocks)
        for number, (block, plan) in enumerate(zip(blocks, result.plan.blocks, strict=True)):
            gone = torch.ones(plan.intermediate_size).scatter(0, plan.flat_kept, 0).bool()
            mean = result.statistics.blocks[number].mean.float() * compensated
            modules = dict(block.named_modules())
            for path in (path for path in ALL[name].down if path in modules):
                module = modules[path]
                if path == "mlp.experts":
                    experts, _, channels = module.down_proj.shape
                    of_experts = gone[: experts * channels].view(experts, 1, channels)
                    module.down_proj.data.mul_(~of_experts)
                    gone = gone[experts * channels :]
                    continue
                removed = gone[: max(module.weight.shape) if name == "gpt2" else module.in_features]
                gone = gone[len(removed) :]
                fill = mean[: len(removed)][removed]
                handle = module.register_forward_pre_hook(partial(hook, removed=removed, fill=fill))
                stack.callback(handle.remove)
            assert not len(gone)
        yield


def test_every_layout_is_tested() -> None:
    assert set(ALL) == set(LAYOUTS)


@pytest.mark.parametrize(("name", "scorer"), CASES)
def test_pruned_equals_the_dense_model_with_the_same_channels_masked(
    name: str, scorer: str, pruned: Callable[[str, str], BothWays]
) -> None:
    result = pruned(name, scorer).in_memory
    total = sum(block.intermediate_size for block in result.plan.blocks)
    wanted = (2 / 3 if scorer == UNIFORM else 0.7) * total
    assert abs(sum(result.plan.widths) - wanted) <= (16 if name in EXPERTS else 0.5)
    shares = {b.width / b.intermediate_size for b in result.plan.blocks}
    assert (len(shares) == 1) == (scorer == UNIFORM)
    dense = make(name)
    whole = logits(dense)
    with masked(dense, name, result):
        expected = logits(dense)
    assert torch.allclose(logits(result.model), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole, expected, atol=1e-3)
    assert sum(p.numel() for p in result.model.parameters()) < sum(
        p.numel() for p in dense.parameters()
    )


@pytest.mark.parametrize(
    ("name", "scorer"), [*CASES, *((name, cfsp.Recipe().scorer) for name in ALL)]
)
def test_from_disk_to_disk_gives_the_same_bytes(
    name: str, scorer: str, pruned: Callable[[str, str], BothWays]
) -> None:
    case = pruned(name, scorer)
    opened = open_streamed(case.dense)
    assert opened is not None
    a, b = case.in_memory.out, case.streamed.out
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    for file in {*names} - {"README.md", "recipe.yaml", "tokenizer_config.json"}:
        assert (a / file).read_bytes() == (b / file).read_bytes(), file


FRESH = """
import sys, torch
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cfsp", "cfsp_kernels"):
            raise ImportError("cfsp is not installed here")
sys.meta_path.insert(0, Refuse())
from transformers import AutoModel, AutoModelForCausalLM
ids = torch.arange(24)[None] * 11 % 256
@torch.no_grad()
def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    return model, model(input_ids=ids, use_cache=False).logits
for folder in sys.argv[1:]:
    try:
        model, first = logits(folder)
        torch.save(first, folder + ".logits")
        model.generate(ids, max_new_tokens=2, do_sample=False)
        model.save_pretrained(folder + "-again")
        assert torch.equal(first, logits(folder + "-again")[1]), "another model after a re-save"
        base = AutoModel.from_pretrained(folder, trust_remote_code=True)
        pruned = base.config.model_type.startswith("cfsp_")
        assert type(base).__name__.startswith("CFSP") == pruned, type(base)
        assert not (pruned and "-uniform" in folder), folder
    except Exception as error:
        raise RuntimeError(folder) from error
"""


@pytest.fixture(scope="module")
def fresh(
    pruned: Callable[[str, str], BothWays], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], torch.Tensor]:
    """Logits of every result as another process without cfsp has them; one process for all."""
    folders = {(n, s): str(pruned(n, s).streamed.out) for n, s in CASES}
    run_fresh("-c", FRESH, *folders.values(), home=tmp_path_factory.mktemp("hf"))
    return lambda name, scorer: torch.load(f"{folders[name, scorer]}.logits")


@pytest.mark.parametrize(("name", "scorer"), CASES)
def test_it_reloads_to_the_last_bit_where_cfsp_is_not_installed(
    name: str,
    scorer: str,
    pruned: Callable[[str, str], BothWays],
    fresh: Callable[[str, str], torch.Tensor],
) -> None:
    assert torch.equal(fresh(name, scorer), logits(pruned(name, scorer).in_memory.model))


def test_a_width_that_no_config_can_say_is_refused_before_the_calibration() -> None:
    for name, changes, message in (
        ("bloom", {}, r"dense_h_to_4h.weight would be \[88, 32\] and .* has \[128, 32\] there"),
        ("llama", {"scorer": "flap"}, r"down_proj.bias would be \[32\] .* has nothing there"),
    ):
        recipe = replace(recipe_for(name, UNIFORM), **changes)
        with pytest.raises(CfspError, match=message):
            cfsp.prune(make(name), make_tokenizer(), recipe, progress=False)


def test_what_users_set_beside_the_weights_is_carried_over(tmp_path: Path) -> None:
    model, tokenizer = make("qwen2"), make_tokenizer()
    model.generation_config.temperature = 0.25
    model.generation_config.do_sample = True
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "dense")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 3
    for case in ("cfsp", UNIFORM):
        out = tmp_path / case
        cfsp.prune(
            tmp_path / "dense",
            recipe=recipe_for("qwen2", case),
            out=out,
            eval_windows=0,
            progress=False,
        )
        kept = GenerationConfig.from_pretrained(out)
        assert (kept.temperature, kept.do_sample) == (0.25, True)
        messages = [{"role": "user", "content": "hi"}]
        loaded = AutoTokenizer.from_pretrained(out)
        assert loaded.apply_chat_template(messages, tokenize=False) == "<user>hi"
