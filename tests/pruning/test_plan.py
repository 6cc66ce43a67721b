"""Selection, and plans that are saved, edited and read again."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfsp.calibration.curves import ErrorCurve
from cfsp.errors import CfspError
from cfsp.models.parts.channels import Units
from cfsp.pruning.plan import BlockPlan, PruningPlan
from cfsp.pruning.plan_file import from_pairs, from_ranges, load_plan, save_plan, to_ranges
from cfsp.pruning.planning import score_quantiles, select_channels
from cfsp.pruning.recipe import Recipe


def test_selection_keeps_the_highest_in_ascending_order_with_ties_by_index() -> None:
    scores = torch.tensor([1.0, 5.0, 3.0, 5.0, 3.0, 3.0])
    assert select_channels(scores, 3).tolist() == [1, 2, 3]
    assert select_channels(torch.zeros(5), 2).tolist() == [0, 1]


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=30), st.data())
def test_selection_is_exact_and_no_removed_channel_scores_more(
    values: list[float], data: st.DataObject
) -> None:
    width = data.draw(st.integers(1, len(values)))
    scores = torch.tensor(values)
    kept = select_channels(scores, width)
    removed = [i for i in range(len(values)) if i not in set(kept.tolist())]
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == width
    assert all((scores[r], -r) < (scores[k], -k) for r in removed for k in kept.tolist())


def test_selection_refuses_nan_and_widths_out_of_range() -> None:
    with pytest.raises(CfspError, match="score of channel 1 is NaN"):
        select_channels(torch.tensor([0.0, float("nan")]), 1)
    with pytest.raises(CfspError, match=r"width must be in \[0, 2\], got 3"):
        select_channels(torch.zeros(2), 3)


def test_score_quantiles_run_from_the_lowest_finite_score_to_the_highest() -> None:
    scores = torch.arange(321.0)[torch.randperm(321)]
    assert score_quantiles(scores) == tuple(float(10 * part) for part in range(33))
    with_infinite = torch.cat([scores, torch.tensor([float("inf"), float("-inf")])])
    assert score_quantiles(with_infinite) == score_quantiles(scores)
    assert score_quantiles(torch.tensor([float("inf")])) == ()
    assert score_quantiles(torch.tensor([1.2345678])) == (1.2346,) * 33


@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_round_trip(kept: set[int]) -> None:
    assert from_ranges(to_ranges(torch.tensor(sorted(kept))), 61).tolist() == sorted(kept)


QUANTILES = (-1e-9, *[0.25] * 31, 3e7)
CURVE = ErrorCurve(torch.tensor([0, 3, 8]), torch.tensor([2.0, 1.23456789e-7, 0.0]).double())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    blocks = (
        BlockPlan(
            (torch.tensor([[0, 1, 2, 5]]),),
            0.5,
            (Units(8),),
            QUANTILES,
            (CURVE,),
        ),
        BlockPlan((torch.tensor([[7]]),), 0.1, (Units(8),)),
    )
    save_plan(PruningPlan(blocks, "abc", Recipe(sparsity=0.6, width_multiple=1)), tmp_path / "p")
    return tmp_path / "p"


def edit(path: Path, **changes: object) -> None:
    document = json.loads(path.read_text())
    document["blocks"][0].update(changes)
    path.write_text(json.dumps(document))


def test_a_plan_round_trips_and_can_be_edited(saved: Path) -> None:
    plan = load_plan(saved)
    assert plan.widths == (4, 1)
    assert plan.blocks[0].removed.tolist() == [3, 4, 6, 7]
    assert plan.recipe == Recipe(sparsity=0.6, width_multiple=1)
    assert [block.score_quantiles for block in plan.blocks] == [QUANTILES, ()]
    (curve,) = plan.blocks[0].error_curves
    assert plan.blocks[1].error_curves == ()
    assert curve.widths.tolist() == [0, 3, 8]
    assert curve.errors.tolist() == [2.0, 1.2346e-7, 0.0]
    assert curve.at(torch.tensor([0])).tolist() == [2.0]
    edit(saved, kept="0-2,4-5", width=5)
    assert load_plan(saved).blocks[0].flat_kept.tolist() == [0, 1, 2, 4, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 3}, "width is 3 but kept names 4 channels"),
        ({"kept": "0-2,2"}, "distinct channels"),
        ({"kept": "0-2,9"}, r"channels in \[0, 7\]"),
        ({"kept": "x"}, "distinct channels in .* got 'x'"),
        ({"kept": ""}, "width is 4 but kept names 0 channels"),
        ({"kept": "0-999999999999"}, "distinct channels in .* got '0-999999999999'"),
        ({"kept": "0-400000000", "width": 400000001}, "distinct channels"),
        ({"kept": "3-0"}, "distinct channels"),
        ({"kept": "-1"}, "distinct channels"),
        ({"kept": "٣"}, "distinct channels"),
        ({"kept": "0," * 5}, "distinct channels"),
        ({"kept": 5}, r"not a valid plan: blocks\[0\].kept must be text, got 5"),
        ({"width": "4"}, r"blocks\[0\].width must be a whole number, got '4'"),
        ({"width": 4.0}, r"blocks\[0\].width must be a whole number, got 4.0"),
        ({"width": True}, r"blocks\[0\].width must be a whole number, got True"),
        ({"intermediate_size": 10**12}, r"intermediate_size must be in \[0, "),
        ({"intermediate_size": -1}, r"intermediate_size must be in \[0, "),
        ({"intermediate_size": 0}, "it has no FFN, so kept must be empty, got '0-2,5'"),
        ({"intermediate_size": 0, "kept": ""}, "width is 4 but kept names 0 channels"),
        (
            {"intermediate_size": 0, "kept": "", "width": 0},
            r"curves end at widths \[8\], its parts",
        ),
        ({"intermediate_size": 9}, "ends at|end at widths"),
        ({"importance": None}, r"importance must be a number, got None"),
        ({"importance": [1]}, r"importance must be a number, got \[1\]"),
        ({"block": 1}, "block 0: it says that it is block 1"),
        ({"more": 1}, r"blocks\[0\] has the unknown key 'more'"),
        ({"score_quantiles": 5}, r"score_quantiles must be text, got 5"),
        ({"score_quantiles": "1 2 3"}, "33 ascending numbers"),
        ({"score_quantiles": " ".join(["2"] * 32 + ["1"])}, "33 ascending numbers"),
        ({"score_quantiles": " ".join(["nan"] * 33)}, "must be a finite number, got nan"),
        ({"score_quantiles": "a"}, "could not convert string to float: 'a'"),
        ({"error_curves": ["0:1 8:inf"]}, "must be a finite number, got inf"),
        ({"error_curves": ["0:1 8.5:0"]}, "must ascend from 0"),
        ({"error_curves": [5]}, r"error_curves\[0\] must be text, got 5"),
        ({"error_curves": ["0:1 9:0"]}, r"error curves end at widths \[9\], its parts have \[8\]"),
        ({"error_curves": ["0:1 8:0"] * 2}, r"end at widths \[8, 8\], its parts have \[8\]"),
        ({"error_curves": ["0:1 8:0 3:1"]}, "must ascend from 0, got '0:1 8:0 3:1'"),
        ({"error_curves": ["0:1 8"]}, "could not convert string to float: ''"),
        ({"ffns": [{"experts": 0, "intermediate_size": 8}]}, r"experts must be in \[1, .* got 0"),
        ({"ffns": [{"experts": -1, "intermediate_size": 8}]}, r"experts must be in \[1, .* got -1"),
        ({"ffns": [{"experts": 1, "intermediate_size": 0}]}, r"size must be in \[1, .* got 0"),
        ({"ffns": [{"experts": 1, "intermediate_size": 9}]}, "9 channels in all, not 8"),
        ({"ffns": [{"experts": 2}]}, r"ffns\[0\].intermediate_size is missing"),
        ({"ffns": "x"}, r"ffns must be a list, got 'x'"),
    ],
)
def test_a_broken_edit_is_one_clear_error(
    saved: Path, changes: dict[str, object], message: str
) -> None:
    edit(saved, **changes)
    with pytest.raises(CfspError, match=message):
        load_plan(saved)


def test_a_file_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("{}")
    with pytest.raises(CfspError, match="is not a plan of this version"):
        load_plan(tmp_path / "x")
    with pytest.raises(CfspError, match="cannot read plan"):
        load_plan(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xb8\x00")
    with pytest.raises(CfspError, match=r"cannot read plan .*binary: it is not UTF-8, at byte 0"):
        load_plan(tmp_path / "binary")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": []}, "blocks must be 1 to 10000 blocks"),
        ({"blocks": 5}, "blocks must be a list, got 5"),
        ({"blocks": [{}]}, r"blocks\[0\].importance is missing"),
        ({"model_fingerprint": 7}, "model_fingerprint must be text, got 7"),
        ({"recipe": []}, r"recipe must be a mapping"),
        ({"recipe": {"budget": 5}}, "budget must be text, got 5"),
        ({"recipe": {"calibration": {"seed": None}}}, "seed must be a whole number, got None"),
        ({"recipe": {"uniform": "false"}}, "uniform must be true or false, got 'false'"),
    ],
)
def test_a_document_of_other_values_is_refused(
    saved: Path, changes: dict[str, object], message: str
) -> None:
    saved.write_text(json.dumps({**json.loads(saved.read_text()), **changes}))
    with pytest.raises(CfspError, match=message):
        load_plan(saved)


def test_an_endless_number_in_a_plan_is_told_in_short() -> None:
    with pytest.raises(CfspError, match="could not convert") as told:
        from_pairs("0:8 24:" + "9" * 10**5 + "x", "error_curves")
    assert len(str(told.value)) < 400
