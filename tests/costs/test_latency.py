"""Latency budgets: widths by a table, exactly; tables of tiny models, kept and refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cfsp
from cfsp.apportion import Steps
from cfsp.costs import latency_measurement as latency_measure
from cfsp.costs.latency import LatencyLimit, LatencyTable, WidthCurve, load_table
from cfsp.costs.latency_measurement import cached_table, known_table, table_identity
from cfsp.errors import CfspError
from cfsp.models.opening import adopt

from ..cli.test_cli import EXACT, SMALL, run
from ..conftest import make_tiny, make_tokenizer
from ..models.test_hybrids import BARE
from .test_estimate import build

IDENTITY = {"model": "m", "batch": 1, "length": 16, "context": 0}
LINEAR = WidthCurve((8, 64), (1.0 + 8, 1.0 + 64))
STAIRS = WidthCurve(
    tuple(range(1, 65)), tuple(1.0 + 16 * -(-width // 16) for width in range(1, 65))
)
"""A second, and one for each channel; of whole tiles of 16."""


def table(*kinds: WidthCurve, blocks: tuple[int, ...]) -> LatencyTable:
    return LatencyTable(IDENTITY, 10.0, tuple((kind,) for kind in kinds), blocks)


def even(sizes: list[int], multiple: int):
    def widths_at(sparsity: float) -> tuple[int, ...]:
        return tuple(max(1, round((1 - sparsity) * s / multiple)) * multiple for s in sizes)

    return widths_at


def steps(sizes: list[int], multiple: int) -> list[Steps]:
    return [Steps(size, multiple) for size in sizes]


def test_seconds_are_those_of_the_table_and_linear_between() -> None:
    known = table(LINEAR, STAIRS, blocks=(0, 1, 0))
    assert known.dense_seconds == 10 + 3 * 65
    assert known.predicted([64, 64, 64]) == known.dense_seconds
    assert known.predicted([36, 17, 8]) == 10 + 37 + 33 + 9
    assert known.predicted([4, 64, 64]) == 10 + 9 + 65 + 65  # never faster than was measured


def test_ffns_of_one_block_add_up() -> None:
    other = WidthCurve((8, 32), (41.0, 65.0))
    known = LatencyTable(IDENTITY, 10.0, ((LINEAR, other),), (0, 0))
    assert known.dense_seconds == 10 + 2 * 65
    assert known.predicted([64, 32, 60, 30]) == 10 + 65 + (65 - 4 - 2)


@settings(max_examples=80, deadline=None)
@given(
    blocks=st.lists(st.integers(0, 1), min_size=1, max_size=8),
    keep=st.floats(0.4, 1.0),
    multiple=st.sampled_from([1, 4, 8, 16]),
)
def test_the_limit_is_met_as_closely_as_one_step(
    blocks: list[int], keep: float, multiple: int
) -> None:
    known = table(LINEAR, STAIRS, blocks=tuple(blocks))
    limit = LatencyLimit(known, keep * known.dense_seconds, "latency")
    sizes = [64] * len(blocks)
    try:
        widths = limit.fitted(even(sizes, multiple), steps(sizes, multiple))
    except CfspError:
        assert known.predicted([multiple] * len(blocks)) > limit.seconds
        return
    spent = known.predicted(widths)
    assert spent <= limit.seconds + 1e-9
    assert all(width % multiple == 0 and multiple <= width <= 64 for width in widths)
    for ffn, width in enumerate(widths):
        if width < 64:  # any one more step is too slow
            wider = [*widths[:ffn], width + multiple, *widths[ffn + 1 :]]
            assert known.predicted(wider) > limit.seconds - 1e-9


def test_a_width_gives_way_to_the_next_that_is_no_slower() -> None:
    known = table(STAIRS, blocks=(0,) * 4)
    limit = LatencyLimit(known, known.predicted([48] * 4), "latency")
    assert limit.fitted(even([64] * 4, 1), steps([64] * 4, 1)) == (48,) * 4
    # 40 is a third of a tile above 32, and costs what 48 does
    assert limit.fitted(lambda _: (40,) * 4, steps([64] * 4, 1)) == (48,) * 4
    dip = WidthCurve((8, 16, 24, 32), (9.0, 20.0, 12.0, 33.0))
    dipped = LatencyLimit(table(dip, blocks=(0,)), 10 + 20.0, "latency")
    assert dipped.fitted(lambda _: (16,), steps([32], 8)) == (24,)


def test_equal_widths_stay_equal() -> None:
    known = table(LINEAR, STAIRS, blocks=(0, 1, 1))
    limit = LatencyLimit(known, 0.7 * known.dense_seconds, "latency")
    widths = limit.fitted(even([64] * 3, 4), steps([64] * 3, 4), equal=True)
    assert len(set(widths)) == 1
    assert known.predicted(widths) <= limit.seconds
    assert known.predicted([width + 4 for width in widths]) > limit.seconds


def test_channels_that_cost_more_seconds_cost_more() -> None:
    steep = WidthCurve((8, 64), (9.0, 9.0 + 4 * 56))
    known = table(LINEAR, steep, blocks=(0, 1))
    assert LatencyLimit(known, 1.0, "").costs([64, 64]) == (1, 4)
    flat = WidthCurve((8, 64), (65.0, 65.0))
    assert LatencyLimit(table(flat, blocks=(0, 0)), 1.0, "").costs([64, 64]) == (1, 1)


def test_what_the_table_cannot_reach_is_told() -> None:
    limit = LatencyLimit(table(LINEAR, blocks=(0, 0)), 20.0, "latency=0.9")
    with pytest.raises(CfspError, match=r"latency=0.9 is out of reach: .* latency=0.0000 to 0.8"):
        limit.fitted(even([64] * 2, 8), steps([64] * 2, 8))


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny(intermediate_size=96).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for every test, and few rounds: what is measured is not judged here."""
    monkeypatch.setenv("CFSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latency_measure, "ROUNDS", 1)
    monkeypatch.setattr(latency_measure, "POINTS", 4)
    return tmp_path / "cache" / "latency"


def test_the_command_measures_once_and_writes(
    tiny_folder: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["latency", tiny_folder, "--shape", "2x16", "--quiet", "--json", "--out"]
    code, printed, error = run(capsys, *arguments, tmp_path / "a.json")
    assert code == 0, error
    found = load_table(tmp_path / "a.json")
    assert json.loads(printed)["dense_seconds"] == found.dense_seconds > 0
    assert (found.batch, found.length, found.blocks) == (2, 16, (0,) * 4)
    assert found.kinds[0][0].widths == (24, 48, 72, 96)
    assert len(list(cache.iterdir())) == 1
    assert run(capsys, *arguments, tmp_path / "b.json")[0] == 0
    assert load_table(tmp_path / "b.json") == found  # looked up
    code, _, error = run(capsys, *arguments, tmp_path / "b.json")
    assert (code, error) == (
        2, f"cfsp: error: output {tmp_path / 'b.json'} exists; --overwrite replaces it\n",
    )  # fmt: skip
    assert run(capsys, *arguments, tmp_path / "b.json", "--again", "--overwrite")[0] == 0
    assert load_table(tmp_path / "b.json") != found
    code, printed, _ = run(capsys, "latency", tiny_folder, "--shape", "2x16", "--quiet")
    assert (code, "of the dense model" in printed, "100.0%" in printed) == (0, True, True)


def test_a_block_takes_what_the_ones_in_the_model_add(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = adopt(make_tiny(intermediate_size=96, num_hidden_layers=6), None)
    identity = table_identity(opened.model, opened.layout, torch.device("cpu"), 2, 16)
    logits: list[torch.Tensor] = []

    def timed(cases, device):
        logits.extend(case().logits for case in cases)
        drifting = [[0.5, 0.7, 0.9, 1.1, 1.3], [1.5, 1.7, 1.9, 2.1, 2.3], [1.5, 1.7, 1.9, 2.1, 2.3]]
        return [seconds[: len(cases)] for seconds in drifting]

    monkeypatch.setattr(latency_measure, "_timed", timed)
    table = latency_measure.measure_table(opened, identity, progress=False)
    assert table.outer_seconds == 1.5
    assert table.kinds[0][0].widths == (24, 48, 72, 96)
    assert table.kinds[0][0].seconds == pytest.approx((0.05, 0.1, 0.15, 0.2))  # four of six ran
    assert table.dense_seconds == pytest.approx(1.5 + 6 * 0.2)
    assert {tuple(found.shape) for found in logits} == {(2, 16, 260)}
    embedding, norm = opened.model.get_input_embeddings(), opened.model.model.norm
    tokens = torch.randint(0, 260, (2, 16), generator=torch.Generator().manual_seed(0))
    alone = opened.model.lm_head(norm(embedding(tokens)))
    torch.testing.assert_close(logits[0], alone)
    assert not any(torch.allclose(found, alone) for found in logits[1:])


def slow(folder: Path, shape: tuple[int, int] = (1, 16)) -> LatencyTable:
    """A made-up table of the tiny model: a block takes 1 s, and 0.01 s a channel."""
    opened = adopt(make_tiny(intermediate_size=96), None)
    identity = table_identity(opened.model, opened.layout, torch.device("cpu"), *shape)
    curve = WidthCurve((8, 96), (1.08, 1.96))
    return LatencyTable(identity, 1.0, ((curve,),), (0,) * 4)


def test_a_result_states_the_seconds_that_were_asked_for(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = slow(tiny_folder)
    latency_measure.save_table(known, tmp_path / "table.json")
    given_table = ["--budget", "latency=0.2@1x16", "--latency-table", tmp_path / "table.json"]
    options = [*SMALL, *EXACT, *given_table]
    code, printed, error = run(capsys, "prune", tiny_folder, "--out", tmp_path / "out", *options)
    assert code == 0, error
    dry = json.loads(run(capsys, "prune", tiny_folder, "--dry-run", "--json", *options)[1])
    for sizes in (dry["sizes"], json.loads(plan_json(capsys, tiny_folder, tmp_path, given_table))):
        assert sizes["before"]["seconds"] == known.dense_seconds == 8.84
        assert 0.796 * 8.84 < sizes["after"]["seconds"] <= 0.8 * 8.84
    assert "latency, 1 x 16 tokens: 8.84 s -> 7.0" in printed
    assert "| latency, 1 x 16 tokens | 8.84 s | 7.0" in (tmp_path / "out" / "README.md").read_text()
    recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    assert "outer_seconds: 1.0" in recipe
    assert cfsp.load_plan(tmp_path / "out" / "plan.json").sparsity > 0.3


def plan_json(capsys, folder: Path, tmp_path: Path, options: list[object]) -> str:
    """Sizes of the plan that statistics make, by ``cfsp plan`` and a live model's result."""
    stats, out = tmp_path / "s.safetensors", tmp_path / "plan.json"
    run(capsys, "calibrate", folder, "--out", stats, *SMALL)
    code, _, error = run(
        capsys, "plan", folder, "--statistics", stats, "--width-multiple", 1, "--out", out,
        *options, "--quiet",
    )  # fmt: skip
    assert code == 0, error
    result = cfsp.prune(
        folder, plan=cfsp.load_plan(out), latency_table=tmp_path / "table.json", progress=False
    )
    return json.dumps(result.report.sizes.to_dict())


def test_without_a_table_one_is_measured_and_kept(
    tiny_folder: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, *EXACT, "--budget", "latency=0.0@1x16"]
    code, _, error = run(capsys, "prune", tiny_folder, "--dry-run", *options)
    assert code == 2
    assert "latency=0.0@1x16 needs a latency table: `cfsp latency MODEL` makes one" in error
    out = tmp_path / "out"
    assert run(capsys, "prune", tiny_folder, "--out", out, *options)[0] == 0
    assert len(list(cache.iterdir())) == 1
    assert run(capsys, "prune", tiny_folder, "--dry-run", *options)[0] == 0


def test_tables_of_something_else_are_refused(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = adopt(make_tiny(intermediate_size=96), None)
    budget = cfsp.Recipe(budget="latency=0.2@1x16").model_budget
    where = (opened.model, opened.layout, torch.device("cpu"), budget)
    assert known_table(*where, slow(tiny_folder)) == slow(tiny_folder)
    with pytest.raises(CfspError, match=r"of 2 x 16 tokens, budget latency=0.2@1x16 of 1 x 16"):
        known_table(*where, slow(tiny_folder, (2, 16)))
    wider = adopt(make_tiny(intermediate_size=104), None)
    with pytest.raises(CfspError, match="is of another model"):
        known_table(wider.model, wider.layout, *where[2:], slow(tiny_folder))
    other = replace(slow(tiny_folder), identity={**slow(tiny_folder).identity, "dtype": "x"})
    latency_measure.save_table(other, latency_measure._cache_file(slow(tiny_folder).identity))
    assert cached_table(slow(tiny_folder).identity) is None
    known = table_identity(*where[:3], 1, 16)
    latency_measure.save_table(replace(other, identity=known), latency_measure._cache_file(known))
    assert cached_table(known) is not None
    monkeypatch.setattr(latency_measure, "MEASURING", latency_measure.MEASURING + 1)
    assert cached_table(table_identity(*where[:3], 1, 16)) is None
    with pytest.raises(CfspError, match="cannot read latency table"):
        load_table(tmp_path / "absent.json")


KIND = {"widths": [8, 64], "seconds": [0.5, 1.0]}
TABLE = {
    "format": "cfsp-latency-2",
    "identity": {"model": "m", "batch": 1, "length": 16, "context": 0},
    "outer_seconds": 0.5,
    "kinds": [[KIND]],
    "blocks": [0, 0],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": 3}, "kinds must be a list, got 3"),
        ({"kinds": [[]]}, r"kinds\[0\] must be of 1 or more parts"),
        ({"kinds": [[{**KIND, "seconds": [-1.0, 1.0]}]]}, r"seconds\[0\] must be 0 or more"),
        ({"kinds": [[{**KIND, "seconds": [1.0]}]]}, "more or fewer seconds than widths"),
        ({"kinds": [[{**KIND, "widths": [64, 8]}]]}, "widths must be ascending"),
        ({"kinds": [[{**KIND, "widths": [8, 8]}]]}, "widths must be ascending"),
        (
            {"identity": {"batch": 1, "length": 1}},
            "identity.context must be a whole number, got None",
        ),
        ({"kinds": [[{**KIND, "widths": [-1, 8]}]]}, r"widths\[0\] must be in \[0, "),
        ({"kinds": [[{**KIND, "widths": []}]]}, "widths must be ascending"),
        ({"outer_seconds": -0.1}, "outer_seconds must be 0 or more"),
        ({"outer_seconds": "1"}, "outer_seconds must be a number, got '1'"),
        ({"outer_seconds": 10**400}, "outer_seconds must be a finite number"),
        ({"blocks": [0, 1]}, "blocks must be below 1"),
        ({"blocks": [True]}, r"blocks\[0\] must be a whole number, got True"),
        ({"identity": {"batch": 1}}, "identity.length must be a whole number, got None"),
        ({"identity": {"batch": "x", "length": 1}}, "identity.batch must be a whole number"),
        ({"identity": {"batch": 0, "length": 1}}, r"identity.batch must be in \[1, "),
        ({"more": 1}, "has the unknown key 'more'"),
        (
            {"outer_seconds": 0, "kinds": [[{**KIND, "seconds": [0, 0]}]]},
            "the dense model takes 0.0 seconds",
        ),
    ],
)
def test_a_table_of_other_values_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "t.json"
    file.write_text(json.dumps(TABLE))
    assert load_table(file).to_dict() == TABLE
    file.write_text(json.dumps({**TABLE, **changes}))
    with pytest.raises(CfspError, match=f"t.json is not a valid latency table: .*{message}"):
        load_table(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is not a latency table of this version"),
        ("[1", "cannot read latency table"),
        (json.dumps(TABLE).replace("1.0", "NaN"), "'NaN'|NaN is not a finite number"),
        (json.dumps(TABLE).replace("1.0", "1e999"), "1e999 is not a finite number"),
        (json.dumps(TABLE)[:-1] + ', "blocks": [0]}', "key 'blocks' is there twice"),
    ],
)
def test_a_file_that_is_no_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(CfspError, match=message):
        load_table(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("model_type", "kinds", "ffns"),
    [
        ("mixtral", 1, 1),
        ("deepseek_v3", 2, 2),
        ("opt", 1, 1),
        ("gpt2", 1, 1),
        ("phi3", 1, 1),
        ("nemotron_h", 3, 1),
    ],
)
def test_blocks_of_every_kind_are_measured(model_type: str, kinds: int, ffns: int) -> None:
    shapes = {
        "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
        "gpt2": {"n_inner": 96, "n_embd": 64, "n_head": 8, "n_layer": 2},
        "phi3": {"pad_token_id": 0},
        "nemotron_h": {**BARE, "ssm_state_size": 16},
    }
    model = build(model_type, **shapes.get(model_type, {}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = cfsp.latency_table(model, length=8, progress=False)
    assert (len(found.kinds), max(map(len, found.kinds))) == (kinds, ffns)
    sizes = [curve.widths[-1] for curve in found.curves]
    assert found.predicted(sizes) == found.dense_seconds
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(module.forward.__self__ is module for module in model.modules())
