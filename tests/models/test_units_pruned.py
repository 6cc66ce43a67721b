"""Channels and KV groups in one plan: the masked model, the bytes of both ways, and once more."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import cfsp
from cfsp.models.detection.attention import with_attention
from cfsp.models.detection.trial import checked_layout
from cfsp.models.opening import open_model

from ..conftest import make_tokenizer
from ..families.checks import OF_THE_RUN, OPTIONS, RECIPE, BothWays, is_masked_equal
from .grouped import CASES, make

pytestmark = pytest.mark.usefixtures("one_thread")
GROUPS = replace(RECIPE, units="channels,groups", allocator="global", scorer="wanda-sp")
CHOSEN = (
    "llama",
    "phi3",
    "gpt2",
    "falcon-new",
    "multi-query",
    "gemma3",
    "qwen3_vl",
    "mistral3",
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "qwen3_5_text",
    "nemotron_h",
)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., BothWays]:
    root = tmp_path_factory.mktemp("units")

    @cache
    def prune(case: str, dtype: torch.dtype) -> BothWays:
        dense = root / f"{case}-{dtype}"
        make(case).to(dtype).save_pretrained(dense)
        make_tokenizer().save_pretrained(dense)
        live = open_model(dense)
        out = root / f"{case}-{dtype}"
        return BothWays(
            dense,
            cfsp.prune(live.model, live.tokenizer, GROUPS, f"{out}-live", **OPTIONS),
            cfsp.prune(dense, None, GROUPS, f"{out}-disk", **OPTIONS),
        )

    return prune


def kept_groups(result: cfsp.PruneResult) -> list[int]:
    return [len(block.groups[0]) for block in result.plan.blocks if block.groups is not None]


@pytest.mark.parametrize("case", CHOSEN)
def test_what_stays_is_the_masked_model(case: str, pruned: Callable[..., BothWays]) -> None:
    result = pruned(case, torch.float32).in_memory
    counts = kept_groups(result)
    dense = make(case)
    layout = with_attention(dense, checked_layout(dense))
    whole = [own.count for _, block, part in layout.parts_of(dense) if part is layout.attention
             for own in (part.units(block),)]  # fmt: skip
    assert len(counts) == len(whole)
    assert sum(counts) < sum(whole)
    assert is_masked_equal(dense, layout, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))
@pytest.mark.parametrize("case", CHOSEN)
def test_from_disk_to_disk_gives_the_bytes_of_memory(
    case: str, dtype: torch.dtype, pruned: Callable[..., BothWays]
) -> None:
    found = pruned(case, dtype)
    live, disk = found.in_memory.out, found.streamed.out
    names = {path.name for path in live.iterdir()}
    assert names == {path.name for path in disk.iterdir()}
    assert {"model.safetensors", "config.json", "plan.json"} <= names
    for name in names - OF_THE_RUN:
        assert (live / name).read_bytes() == (disk / name).read_bytes(), name
    loaded = cfsp.load(disk)
    assert loaded.dtype == dtype
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected, again = (m(ids, use_cache=False).logits for m in (found.in_memory.model, loaded))
    assert torch.equal(expected, again)


@pytest.mark.parametrize("units", ["channels", "groups", "channels,groups"])
@pytest.mark.parametrize("case", ["llama", "phi3", "gpt2", "mixtral"])
def test_what_was_pruned_by_groups_is_pruned_again(
    case: str, units: str, pruned: Callable[..., BothWays], tmp_path: Path
) -> None:
    first = pruned(case, torch.float32).streamed
    recipe = replace(GROUPS, units=units, sparsity=0.2)
    disk = cfsp.prune(first.out, None, recipe, tmp_path / "disk", **OPTIONS)
    live = cfsp.load(first.out)
    assert cfsp.prune(live, make_tokenizer(), recipe, tmp_path / "live", **OPTIONS).model is live
    for name in ("model.safetensors", "config.json", "plan.json"):
        live_bytes, disk_bytes = ((tmp_path / way / name).read_bytes() for way in ("live", "disk"))
        assert live_bytes == disk_bytes, name
    again = disk.model
    assert again.num_parameters() < first.model.num_parameters()
    if units == "channels":
        assert attention_shapes(again) == attention_shapes(first.model)
    else:
        assert sum(kept_groups(disk)) <= sum(kept_groups(first))


@pytest.mark.parametrize("case", ["llama", "gpt_neox", "gemma3"])
def test_whole_parts_go_as_a_plan_says_and_what_is_left_is_pruned_again(
    case: str, tmp_path: Path
) -> None:
    make(case).save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    live = open_model(tmp_path / "dense")
    plan = cfsp.prune(live.model, live.tokenizer, GROUPS, progress=False).plan
    none, blocks = torch.empty(1, 0, dtype=torch.int64), list(plan.blocks)
    for number, gone in ((1, 0), (2, 1)):  # its FFN, its attention
        kept = [own if part != gone else none for part, own in enumerate(blocks[number].kept)]
        blocks[number] = replace(blocks[number], kept=tuple(kept))
    as_planned = {"plan": replace(plan, blocks=tuple(blocks))}
    once_more = {"recipe": replace(GROUPS, sparsity=0.2)}
    expected = [[], ["mlp"], ["attention"], []]
    for dense, names, options in (
        ("dense", ("live", "disk"), as_planned),
        ("disk", ("again-live", "again-disk"), once_more),
    ):
        opened = open_model(tmp_path / dense)
        for given, name in ((opened.model, names[0]), (tmp_path / dense, names[1])):
            disk = cfsp.prune(given, make_tokenizer(), out=tmp_path / name, **options, **OPTIONS)
        for name in ("model.safetensors", "config.json", "plan.json"):
            live_bytes, disk_bytes = ((tmp_path / way / name).read_bytes() for way in names)
            assert live_bytes == disk_bytes, name
        text = disk.model.config.get_text_config()
        assert [
            sorted(getattr(own, "skip", None) or []) for own in text.per_layer_config
        ] == expected
    assert disk.model.num_parameters() < cfsp.load(tmp_path / "disk").num_parameters()


def attention_shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters() if "attn" in name}


def test_a_live_model_is_pruned_in_place_and_goes_on_generating() -> None:
    model = make("llama")
    result = cfsp.prune(model, make_tokenizer(), GROUPS, progress=False)
    assert result.model is model
    assert type(model).__name__ == "CFSPLlamaForCausalLM"
    assert len(set(kept_groups(result))) > 1
    ids = torch.arange(10)[None]
    dynamic = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    static = model.generate(
        ids, max_new_tokens=6, do_sample=False, pad_token_id=0, cache_implementation="static",
        disable_compile=True,
    )  # fmt: skip
    assert torch.equal(dynamic, static)


def test_the_chosen_families_are_among_those_that_are_cut() -> None:
    assert set(CHOSEN) <= CASES.keys()
