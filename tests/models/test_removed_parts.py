"""Blocks without attention or FFN: the model whose projections are zero, everywhere it runs."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from cfsp.errors import CfspError
from cfsp.models.detection.attention import with_attention
from cfsp.models.detection.removable import check_removable
from cfsp.models.detection.trial import checked_layout
from cfsp.models.layouts import Layout
from cfsp.models.modeling_cfsp import skip
from cfsp.models.pruned_classes import become_pruned_, skipped_parts

from ..conftest import run_fresh
from ..families import fresh
from ..families.fresh import said
from ..families.tiny import Family, family
from .grouped import CASES, WIDE, WIDE_EXPERTS, make, write

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(5, 25).reshape(2, 10)
GONE = {0: ["attention"], 1: ["mlp"], 2: ["attention"]}
CHOSEN = (
    "llama",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "cohere",
    "falcon",
    "falcon-new",
    "gpt_neox",
    "gpt2",
    "phi3",
    "exaone4",
    "glm4",
    "granite",
    "stablelm",
    "lfm2",
    "nemotron_h",
    "gemma3",
    "qwen3_vl",
    "mixtral",
    "gpt_oss",
)
WITHOUT_ATTENTION = ("mixtral", "gpt_oss")
"""Experts cannot be taken out: their attentions alone."""
WAYS = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "none": {"use_cache": False},
    "beams": {"num_beams": 3},
    "padded": {"attention_mask": torch.ones_like(IDS).index_fill(1, torch.arange(4), 0)},
}


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def tokens(model: PreTrainedModel, ids: torch.Tensor = IDS, **options: object) -> torch.Tensor:
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    return model.generate(ids, pad_token_id=0, **options)


@torch.no_grad()
def without_parts(case: str) -> tuple[PreTrainedModel, PreTrainedModel, Layout]:
    """(model without parts, the same with projections that are zero, layout)."""
    small = make(case)
    zero = copy.deepcopy(small)
    layout = with_attention(small, checked_layout(small))
    for number, block, part in layout.parts_of(zero):
        kind = part.skipped_as
        if kind in GONE.get(number, ()) and not (kind == "mlp" and case in WITHOUT_ATTENTION):
            for name, parameter in block.named_parameters():
                if name.startswith(f"{part.down}."):
                    parameter.zero_()
            skip(layout.find_blocks(small)[number], kind, part.path)
    become_pruned_(small, layout, {})
    return small, zero, layout


@pytest.fixture(scope="module")
def pair() -> Callable[[str], tuple[PreTrainedModel, PreTrainedModel, Layout]]:
    return cache(without_parts)


@pytest.mark.parametrize("case", CHOSEN)
def test_logits_are_those_of_zero_projections(
    case: str, pair: Callable[[str], tuple[PreTrainedModel, PreTrainedModel, Layout]]
) -> None:
    small, zero, layout = pair(case)
    assert type(small).__name__ == f"CFSP{type(zero).__name__}"
    gone = [sorted(skipped_parts(block)) for block in layout.find_blocks(small)]
    text = small.config.get_text_config()
    assert [getattr(own, "skip", None) or [] for own in text.per_layer_config] == gone
    assert sum(map(len, gone)) >= 1
    assert small.num_parameters() < zero.num_parameters()
    for kind in ("sdpa", "eager")[not zero._supports_sdpa :]:
        for model in (small, zero):
            model.set_attn_implementation(kind)
        assert small.config._attn_implementation == zero.config._attn_implementation
        assert torch.equal(logits(small), logits(zero)), kind
    assert not torch.allclose(logits(make(case)), logits(zero), atol=1e-2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CHOSEN)
def test_generation_is_that_of_zero_projections(
    case: str, way: str, pair: Callable[[str], tuple[PreTrainedModel, PreTrainedModel, Layout]]
) -> None:
    small, zero, _ = pair(case)
    assert torch.equal(tokens(small, **WAYS[way]), tokens(zero, **WAYS[way]))


@pytest.mark.parametrize("case", ["llama", "gemma3_text", "gpt_neox"])
def test_it_assists_and_is_assisted(
    case: str, pair: Callable[[str], tuple[PreTrainedModel, PreTrainedModel, Layout]]
) -> None:
    small, zero, _ = pair(case)
    dense = make(case)
    expected = tokens(zero, IDS[:1])
    assert torch.equal(tokens(small, IDS[:1], assistant_model=dense), expected)
    assert torch.equal(tokens(dense, IDS[:1], assistant_model=small), tokens(dense, IDS[:1]))


def test_positions_are_right_whatever_block_asks_the_cache() -> None:
    small, zero, _ = without_parts("llama")
    caches = []
    for model in (small, zero):
        with torch.no_grad():
            cache_ = model(input_ids=IDS).past_key_values
            caches.append([cache_.get_seq_length(number) for number in range(4)])
    assert caches[0] == caches[1] == [IDS.shape[1]] * 4


@pytest.fixture(scope="module")
def reloaded(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[dict, dict, dict]]:
    root, here, arguments = tmp_path_factory.mktemp("removed"), {}, []
    for case in CHOSEN:
        small, _, layout = without_parts(case)
        write(small, layout, root / case)
        here[case] = said(small)
        auto = "ImageTextToText" if CASES[case].multimodal else "CausalLM"
        arguments += [str(root / case), f"AutoModelFor{auto}"]
    again = "import sys; sys.path.insert(0, sys.argv.pop(1)); import fresh; fresh.main(again=True)"
    run_fresh("-c", again, str(Path(fresh.__file__).parent), *arguments, home=root / "hf")
    return {
        case: (own, torch.load(root / f"{case}.answer"), torch.load(root / f"{case}-again.answer"))
        for case, own in here.items()
    }


@pytest.mark.parametrize("case", CHOSEN)
def test_it_reloads_where_cfsp_is_not_installed(
    case: str, reloaded: dict[str, tuple[dict, dict, dict]]
) -> None:
    here, there, again = reloaded[case]
    for other in (there, again):
        assert other.get("error") is None
        assert other["class"] == here["class"]
        assert torch.allclose(other["logits"], here["logits"], rtol=0, atol=3e-6)
        assert torch.equal(other["tokens"], here["tokens"])


@pytest.mark.parametrize("case", [name for name in CHOSEN if name not in WITHOUT_ATTENTION])
def test_what_adds_nothing_without_its_parts_may_lose_them(case: str) -> None:
    model = make(case)
    check_removable(model, with_attention(model, checked_layout(model)), ("attention", "ffn"))


POST_NORM = family("", "opt", WIDE, ffn_dim=48, word_embed_proj_dim=64, do_layer_norm_before=False)
REFUSED: dict[str, tuple[Family, str, str]] = {
    "experts": (family("", "mixtral", WIDE_EXPERTS)[1], "ffn", "blocks have experts"),
    "beside experts": (family("", "afmoe", WIDE_EXPERTS)[1], "ffn", "blocks have experts"),
    "no module": (CASES["opt"], "ffn", "it is no module of its own"),
    "post-norm": (POST_NORM[1], "attention", "parts that give nothing changes its hidden states"),
    "residual inside": (family("", "bloom", WIDE)[1], "ffn", "takes 2 positional arguments"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_taken_out_is_refused_in_one_line(case: str) -> None:
    refused, kind, message = REFUSED[case]
    model = refused.model()
    layout = checked_layout(model)
    layout = with_attention(model, layout) if kind == "attention" else layout
    with pytest.raises(CfspError, match=message) as caught:
        check_removable(model, layout, (kind,))
    assert "\n" not in str(caught.value)
    assert f"leave '{kind}' out of `units`" in str(caught.value)
    check_removable(model, layout, ())


@pytest.mark.parametrize("case", ["olmo2", "olmo3", "gemma4_text"])
def test_ffns_may_go_where_attention_cannot(case: str) -> None:
    model = family("", case, WIDE)[1].model()
    check_removable(model, checked_layout(model), ("ffn",))


def test_attention_may_go_where_experts_cannot() -> None:
    for case in (*WITHOUT_ATTENTION, "qwen3_moe", "afmoe", "jamba"):
        model = make(case)
        check_removable(model, with_attention(model, checked_layout(model)), ("attention",))
