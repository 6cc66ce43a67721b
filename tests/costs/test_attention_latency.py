"""Latency of KV groups: tables, contexts, limits of parts of both kinds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import cfsp
from cfsp.apportion import Steps
from cfsp.costs import latency_measurement as latency_measure
from cfsp.costs.latency import LatencyLimit, LatencyTable, WidthCurve, load_table, save_table
from cfsp.costs.latency_measurement import cached_table, known_table, table_identity, table_of
from cfsp.costs.placed_blocks import cache_maker
from cfsp.errors import CfspError
from cfsp.models.loading import cache_argument
from cfsp.models.opening import OpenModel, open_any
from cfsp.pruning.budget import KVLimit

from ..cli.test_cli import EXACT, SMALL, run
from ..conftest import make_tiny, make_tokenizer
from ..pruning.test_units import WIDE
from .test_latency import even

IDENTITY = {"model": "m", "batch": 1, "length": 16, "context": 0}
FFN = WidthCurve((0, 8, 64), (2.0, 12.0, 66.0))
ATTENTION = WidthCurve((0, 1, 4), (52.0, 57.0, 66.0), groups=True)
BOTH = LatencyTable(IDENTITY, 10.0, ((FFN, ATTENTION), (FFN,)), (0, 1, 0))
"""Two blocks with attention, one without."""
GROUPS = ["--units", "channels,groups"]


def wide(**more: object) -> OpenModel:
    return open_any(make_tiny(**{**WIDE, **more}), make_tokenizer(), attention=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for every test, and few rounds: what is measured is not judged here."""
    monkeypatch.setenv("CFSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latency_measure, "ROUNDS", 1)
    monkeypatch.setattr(latency_measure, "POINTS", 2)
    return tmp_path / "cache" / "latency"


def test_seconds_of_both_kinds_add_up() -> None:
    assert BOTH.dense_seconds == 10 + 3 * 66
    assert BOTH.predicted([64, 4, 64, 64, 4]) == BOTH.dense_seconds
    assert BOTH.predicted([8, 0, 0, 64, 2]) == 10 + (66 - 54 - 14) + 2 + (66 - 6)


def test_a_table_without_its_groups_is_one_of_channels() -> None:
    plain = BOTH.of_channels()
    assert (BOTH.knows_groups, plain.knows_groups) == (True, False)
    assert plain.dense_seconds == BOTH.dense_seconds
    assert plain.predicted([8, 0, 64]) == BOTH.predicted([8, 4, 0, 64, 4])
    alone = LatencyTable(IDENTITY, 1.0, ((ATTENTION,), (FFN,)), (0, 1)).of_channels()
    assert alone.predicted([64]) == alone.dense_seconds == 1 + 66 + 66


def test_tables_of_groups_and_contexts_are_written_and_read(tmp_path: Path) -> None:
    known = replace(BOTH, identity={**IDENTITY, "context": 4096})
    save_table(known, tmp_path / "t.json")
    assert load_table(tmp_path / "t.json") == known
    assert known.shape == (1, 16, 4096)
    older = json.loads((tmp_path / "t.json").read_text()) | {"format": "cfsp-latency-1"}
    (tmp_path / "t.json").write_text(json.dumps(older))
    with pytest.raises(CfspError, match=r"not a latency table of this version \(cfsp-latency-2\)"):
        load_table(tmp_path / "t.json")


@settings(max_examples=60, deadline=None)
@given(
    keep=st.floats(0.1, 1.0),
    multiple=st.sampled_from([1, 8, 16]),
    removable=st.booleans(),
    capped=st.booleans(),
)
def test_a_limit_is_met_by_parts_of_both_kinds(
    keep: float, multiple: int, removable: bool, capped: bool
) -> None:
    ffn, attention = Steps(64, multiple, removable), Steps(4, 1, removable)
    steps = [ffn, attention, ffn, ffn, attention]
    kv = KVLimit((0, 1, 0, 0, 1), 4) if capped else None
    limit = LatencyLimit(BOTH, keep * BOTH.dense_seconds, "latency", kv)
    shares = even([64, 4, 64, 64, 4], 1)

    def widths_at(sparsity: float) -> tuple[int, ...]:
        if sparsity > 0.999:
            return tuple(own.least for own in steps)
        pairs = zip(shares(sparsity), steps, strict=True)
        found = [max(own.least, share // own.multiple * own.multiple) for share, own in pairs]
        return tuple(
            min(2, x) if capped and own.size == 4 else x
            for x, own in zip(found, steps, strict=True)
        )

    least = [own.least for own in steps]
    try:
        widths = limit.fitted(widths_at, steps)
    except CfspError:
        assert BOTH.predicted(least) > limit.seconds or removable
        return
    assert BOTH.predicted(widths) <= limit.seconds + 1e-9
    for width, own in zip(widths, steps, strict=True):
        assert own.least <= width <= own.size
        assert width % own.multiple == 0
    assert not capped or widths[1] + widths[4] <= 4
    for part, (width, own) in enumerate(zip(widths, steps, strict=True)):
        still = capped and own.size == 4
        if width + own.multiple <= own.size and not still:  # any one more step is too slow
            wider = [*widths[:part], width + own.multiple, *widths[part + 1 :]]
            assert BOTH.predicted(wider) > limit.seconds - 1e-9


def test_a_group_costs_as_much_more_than_a_channel_as_it_takes() -> None:
    costs = LatencyLimit(BOTH, 1.0, "").costs([64, 4, 64, 64, 4])
    assert costs[1] / costs[0] == pytest.approx((14 / 4) / (64 / 64), rel=0.01)


@pytest.mark.parametrize("context", [0, 12])
def test_a_table_has_the_groups_and_what_may_go_whole(context: int, cache: Path) -> None:
    opened = wide()
    table = table_of(opened, 2, 3, context, whole_ffns=True, progress=False)
    (kind,) = table.kinds
    assert [(curve.widths, curve.groups) for curve in kind] == [
        ((0, 24, 48), False),
        ((0, 1, 2, 4), True),
    ]
    assert table.shape == (2, 3, context)
    assert table.predicted([48, 4] * 5) == table.dense_seconds
    where = (opened.model, opened.layout, torch.device("cpu"))
    assert cached_table(table_identity(*where, 2, 3, context, whole_ffns=True)) == table
    assert cached_table(table_identity(*where, 2, 3, context)) is None
    plain = open_any(opened.model)
    assert table_of(plain, 2, 3, context, progress=False).kinds[0][0].widths == (24, 48)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_what_is_timed_after_a_context_is_the_model_with_its_cache(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks in place, dense: the model's own logits with that cache, call after call; and the
    positions go on where no block is."""
    shape = {"num_hidden_layers": 4, "num_attention_heads": 8, "sliding_window": 8}
    model = make_tiny(family, **shape)
    tokens, name = torch.tensor([[5], [6]]), cache_argument(model)
    fresh = cache_maker(model, 2, 12)(lambda words, **more: model(input_ids=words, **more))
    assert fresh().get_seq_length() == 12

    @torch.no_grad()
    def logits(cache: DynamicCache) -> torch.Tensor:
        return model(input_ids=tokens, **{name: cache}, use_cache=True).logits

    first, again, later = (
        logits(fresh()), logits(fresh()), logits(DynamicCache(config=model.config))
    )  # fmt: skip
    assert torch.equal(first, again)
    assert not torch.allclose(first, later)
    calls: list[object] = []

    def timed(cases, device):
        calls.extend(case().logits for case in cases)
        return [[0.0] * len(cases)]

    monkeypatch.setattr(latency_measure, "_timed", timed)
    opened = open_any(model, attention=True)
    identity = table_identity(opened.model, opened.layout, torch.device("cpu"), 2, 1, 12)
    with torch.no_grad():
        expected = alone_after(opened, 12)
    latency_measure.measure_table(opened, identity, progress=False)
    torch.testing.assert_close(calls[0], expected)
    assert not any(torch.allclose(found, expected) for found in calls[1:3])


def alone_after(opened: OpenModel, context: int) -> torch.Tensor:
    """Logits of the tokens that are timed, by a model without blocks."""
    model = opened.model
    words = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(0, words, (2, 1), generator=torch.Generator().manual_seed(0))
    states = model.get_input_embeddings()(tokens)
    base = model.base_model
    if hasattr(base, "wpe"):
        states = states + base.wpe(torch.tensor([[context]]))
    norm = base.norm if hasattr(base, "norm") else base.ln_f
    return model.get_output_embeddings()(norm(states))


def test_states_that_are_no_keys_have_no_context() -> None:
    from ..costs.test_estimate import build

    model = build(
        "qwen3_next",
        num_hidden_layers=4,
        num_experts=4,
        num_experts_per_tok=2,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    with pytest.raises(CfspError, match="block 0 keeps other states than keys and values"):
        cache_maker(model, 1, 4)(lambda words, **more: model(input_ids=words, **more))


def test_tables_that_lack_the_groups_are_refused() -> None:
    opened = wide()
    plain = open_any(opened.model)
    own = table_of(plain, 1, 4, progress=False)
    where = (opened.model, opened.layout, torch.device("cpu"))
    with pytest.raises(CfspError, match="is of channels alone: measure it with the same `units`"):
        known_table(*where, None, own)
    both = table_of(opened, 1, 4, progress=False)
    assert known_table(*where, None, both) == both
    assert known_table(plain.model, plain.layout, where[2], None, both) == both.of_channels()
    for budget, text in (("latency=0.2@1x4+8", "1 x 4 tokens, budget .* of 1 x 4 [+] 8"),):
        with pytest.raises(CfspError, match=f"latency table is of {text}"):
            known_table(*where, cfsp.Recipe(budget=budget).model_budget, both)
    kv = cfsp.Recipe(budget="kv=0.2", units="groups").model_budget
    assert known_table(*where, kv, both) == both


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "wide"
    make_tiny(**WIDE).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_the_command_measures_groups_after_a_context(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.json"
    arguments = ["latency", folder, "--shape", "2x1+16", *GROUPS, "--quiet", "--out", out]
    code, printed, error = run(capsys, *arguments)
    assert code == 0, error
    assert load_table(out).shape == (2, 1, 16)
    assert load_table(out).kinds[0][1].groups
    assert "2 x 1 tokens after 16" in printed
    assert "KV groups" in printed
    code, _, error = run(capsys, "latency", folder, "--shape", "2x1+200", "--quiet")
    assert (code, error) == (2, "cfsp: error: seqlen 201 is beyond the model's 128 positions\n")
    code, _, error = run(capsys, "latency", folder, "--shape", "2x1+", "--quiet")
    assert (code, error.count("\n")) == (2, 1)
    assert "expected batch x length, such as 1x1024, perhaps + context" in error


@pytest.mark.parametrize("more", ["", ",kv=0.5"])
def test_a_result_of_both_kinds_states_the_seconds_that_were_asked_for(
    more: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = wide()
    identity = table_identity(opened.model, opened.layout, torch.device("cpu"), 2, 1, 16)
    curves = (
        WidthCurve((8, 48), (1.6, 2.4)),
        WidthCurve((0, 1, 4), (1.2, 1.5, 2.4), groups=True),
    )
    known = LatencyTable(identity, 1.0, (curves,), (0,) * 5)
    save_table(known, tmp_path / "table.json")
    options = [
        *SMALL, *EXACT, *GROUPS, "--budget", f"latency=0.3@2x1+16{more}",
        "--latency-table", tmp_path / "table.json", "--scorer", "activation-norm",
    ]  # fmt: skip
    code, printed, error = run(capsys, "prune", folder, "--out", tmp_path / "out", *options)
    assert code == 0, error
    plan = cfsp.load_plan(tmp_path / "out" / "plan.json")
    counts = [count for block in plan.blocks for count in block.counts]
    assert 0.66 * 13 < known.predicted(counts) <= 0.7 * 13 + 1e-9
    assert f"latency, 2 x 1 tokens after 16: 13 s -> {known.predicted(counts):.4g} s" in printed
    assert any(count < 4 for count in counts[1::2])
    assert any(count < 48 for count in counts[::2])
    if more:
        assert sum(counts[1::2]) <= 10
    code, _, error = run(capsys, "prune", folder, "--dry-run", *options)
    assert code == 0, error
