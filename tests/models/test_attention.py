"""Attention cut to KV groups: the masked model, its caches, and the folder in a fresh process."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from cfsp.errors import CfspError
from cfsp.models.detection.attention import with_attention
from cfsp.models.detection.trial import checked_layout

from ..conftest import run_fresh
from ..families import fresh
from ..families.fresh import said
from .grouped import CASES, REFUSED, attention_of, both, cut_, make, masked, write

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(5, 25).reshape(2, 10)
CACHES = ({}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False})
STOCK = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "starcoder2",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "qwen3_5_text",
    "granitemoehybrid",
    "gemma3",
)
"""What a family can say of half of its groups in all blocks; GPT-NeoX cannot: its heads grow."""
OWN = ("gpt_neox", "gpt2", "opt", "falcon-new")


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def tokens(model: PreTrainedModel, **options: object) -> torch.Tensor:
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    return model.generate(IDS, pad_token_id=0, **options)


@pytest.fixture(scope="module")
def pair() -> Callable[[str], tuple[PreTrainedModel, PreTrainedModel]]:
    return cache(both)


@pytest.mark.parametrize("case", CASES)
def test_other_groups_in_every_block_equal_the_masked_model(
    case: str, pair: Callable[[str], tuple[PreTrainedModel, PreTrainedModel]]
) -> None:
    small, expected = pair(case)
    whole = logits(make(case))
    assert small.num_parameters() < expected.num_parameters()
    assert type(small).__name__ == f"CFSP{type(expected).__name__}" or case == "internlm3"
    for kind in ("sdpa", "eager")[not expected._supports_sdpa :]:
        for model in (small, expected):
            model.set_attn_implementation(kind)
        assert small.config._attn_implementation == expected.config._attn_implementation
        of_masked = logits(expected)
        assert torch.allclose(logits(small), of_masked, rtol=1e-5, atol=2e-5), kind
        assert not torch.allclose(whole, of_masked, atol=1e-2)


@pytest.mark.parametrize("options", CACHES, ids=("dynamic", "static", "none"))
@pytest.mark.parametrize("case", CASES)
def test_every_cache_gives_the_tokens_of_the_masked_model(
    case: str,
    options: dict[str, object],
    pair: Callable[[str], tuple[PreTrainedModel, PreTrainedModel]],
) -> None:
    small, expected = pair(case)
    assert torch.equal(tokens(small, **options), tokens(expected, **options))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict, dict, dict]]:
    """What each says here, in another process without cfsp, and there once it was saved again."""
    root, here = tmp_path_factory.mktemp("attention"), {}
    for case in (*CASES, *(f"{name} uniform" for name in (*STOCK, *OWN))):
        name, uniform = case.removesuffix(" uniform"), case.endswith(" uniform")
        model = make(name)
        layout = cut_(model, lambda _, count: range(0, count, 2)) if uniform else cut_(model)
        write(model, layout, root / case)
        here[case] = said(model)
    again = "import sys; sys.path.insert(0, sys.argv.pop(1)); import fresh; fresh.main(again=True)"
    arguments = [
        argument
        for case in here
        for argument in (str(root / case), "AutoModelForImageTextToText"
                         if CASES[case.removesuffix(" uniform")].multimodal
                         else "AutoModelForCausalLM")
    ]  # fmt: skip
    run_fresh("-c", again, str(Path(fresh.__file__).parent), *arguments, home=root / "hf")
    return {
        case: (own, torch.load(root / f"{case}.answer"), torch.load(root / f"{case}-again.answer"))
        for case, own in here.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_it_reloads_where_cfsp_is_not_installed(
    case: str, folders: dict[str, tuple[dict, dict, dict]]
) -> None:
    here, there, again = folders[case]
    for other in (there, again):
        assert other.get("error") is None
        assert other["class"] == here["class"]
        assert torch.allclose(other["logits"], here["logits"], rtol=0, atol=3e-6)
        assert torch.equal(other["tokens"], here["tokens"])


@pytest.mark.parametrize("case", [*STOCK, *OWN])
def test_the_same_number_everywhere_is_a_stock_class_where_the_family_can_say_it(
    case: str, folders: dict[str, tuple[dict, dict, dict]]
) -> None:
    here, there, _ = folders[f"{case} uniform"]
    assert there.get("error") is None
    assert here["class"].startswith("CFSP") == (case in OWN)
    assert there["class"] == here["class"]
    assert torch.equal(there["tokens"], here["tokens"])


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_is_refused_in_one_line(case: str) -> None:
    family, message = REFUSED[case]
    model = family.model()
    with pytest.raises(CfspError, match=message) as caught:
        with_attention(model, checked_layout(model))
    assert "\n" not in str(caught.value)
    assert "use `units=channels`" in str(caught.value)


def test_units_are_groups_where_keys_are_shared_and_query_heads_where_all_share_one() -> None:
    for case, expected in (
        ("llama", (4, 2, 1)),
        ("gpt2", (8, 1, 1)),
        ("multi-query", (8, 1, 0)),
        ("falcon", (8, 1, 0)),
        ("falcon-new", (4, 2, 1)),
    ):
        model = make(case)
        layout = with_attention(model, checked_layout(model))
        attention = attention_of(layout)
        (_, block, _), *_ = (p for p in layout.parts_of(model) if p[2] is attention)
        units = attention.units(block)
        assert (units.count, attention.heads, attention.keys) == expected, case
        assert units.columns == expected[1] * 8


def test_a_cut_model_is_cut_again() -> None:
    model, dense = make("llama"), make("llama")
    cut_(model, lambda _, __: (0, 1, 3))
    first = copy.deepcopy(model)
    layout = cut_(model, lambda number, _: ((0,), (1, 2), (0, 2), (0, 1, 2))[number])
    kept = ((0,), (1, 3), (0, 3), (0, 1, 3))
    assert type(model).__name__ == type(first).__name__ == "CFSPLlamaForCausalLM"
    expected = logits(masked(dense, layout, lambda number, _: kept[number]))
    assert torch.allclose(logits(model), expected, rtol=1e-5, atol=2e-5)
    assert [layer.num_key_value_heads for layer in model.config.per_layer_config] == [1, 2, 2, 3]
