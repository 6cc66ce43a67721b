"""Gram matrices of a calibration: the numbers, where they lie, and what is made of them."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import cfsp
from cfsp.calibration import gram_sums, grams
from cfsp.calibration.collect import collect_statistics
from cfsp.calibration.gram_sums import Split
from cfsp.calibration.grams import StoredGram, temporary_folder
from cfsp.calibration.statistics import (
    Statistics,
    gram_path,
    load_statistics,
    save_statistics,
    statistics_fingerprint,
)
from cfsp.distributed import Ranks
from cfsp.errors import CfspError
from cfsp.models.layouts import LAYOUTS

from ..conftest import make_tiny
from ..models.test_experts import routed_activations
from ..models.test_families import make
from ..models.test_streaming import RECIPE
from .test_statistics import whole_model_reference

WINDOWS = torch.randint(0, 256, (21, 12), generator=torch.Generator().manual_seed(1))
FITTED = 19  # windows; the last two are held out


def collect(
    model: PreTrainedModel, folder: Path | None, windows: torch.Tensor = WINDOWS, **options: object
) -> Statistics:
    layout = LAYOUTS[model.config.model_type]
    where = temporary_folder(folder) if folder is not None else None
    return collect_statistics(model, layout, windows, progress=False, grams=where, **options)


@pytest.fixture(scope="module", autouse=True)
def small_panels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grams, "PANEL", 20)  # of 48 channels
        yield


def assert_is(stored: StoredGram, fitted: torch.Tensor, held_out: torch.Tensor) -> None:
    """``fitted``, ``held_out``: activations [T, F]."""
    for found, x in ((stored.fit(), fitted), (stored.held_out(), held_out)):
        assert found is not None
        x = x.double()
        assert found.tokens == len(x)
        assert torch.allclose(found.sum, x.sum(0), rtol=1e-5, atol=1e-5)
        assert torch.allclose(found.product.double(), x.T @ x, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.product, found.product.T)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("micro_batch", [1, 4])  # windows 19 and 20: of two calls; of one's end
def test_they_are_those_of_an_ordinary_forward(
    fused: bool, micro_batch: int, tmp_path: Path
) -> None:
    model = make_tiny()
    activations, _ = whole_model_reference(model, WINDOWS)
    options = {"fused": fused, "micro_batch": micro_batch}
    found = collect(model, tmp_path / "g", **options)
    border = FITTED * WINDOWS.shape[1]
    for block, x in zip(found.blocks, activations, strict=True):
        assert block.gram is not None
        assert_is(block.gram, x[:border], x[border:])
    plain = collect(model, None, **options)
    for a, b in zip(found.blocks, plain.blocks, strict=True):
        assert torch.equal(a.sum, b.sum)
        assert torch.equal(a.sum_of_squares, b.sum_of_squares)
    assert found.provenance == {**plain.provenance, "held_out_windows": 2}


def test_each_expert_has_those_of_its_tokens(tmp_path: Path) -> None:
    model = make("deepseek_v3")
    parts = [routed_activations(model, part) for part in (WINDOWS[:FITTED], WINDOWS[FITTED:])]
    found = collect(model, tmp_path / "g", micro_batch=5)
    assert [len(block.grams) for block in found.blocks] == [1, 5, 5, 5]
    for number, expert in parts[0]:
        gram = found.blocks[number].ffns()[expert].gram
        assert gram is not None
        assert_is(gram, *(part[number, expert] for part in parts))


@pytest.mark.parametrize("windows", [1, 2, 9, 10, 21, 128, 160])
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_what_is_held_out_and_who_sums_it(windows: int, micro_batch: int) -> None:
    """By windows alone; and every rank has whole chunks."""
    split = Split(windows, 7, micro_batch)
    count = -(-windows // micro_batch)
    fitted, held = (sum(x) // 7 for x in zip(*map(split.tokens, range(count)), strict=True))
    assert (fitted, held) == (windows - held, 0 if windows == 1 else max(1, windows // 10))
    chunks = [split.chunk(index) for index in range(count)]
    assert chunks == sorted(chunks)
    for size in (1, 2, 4, 8):
        shares = [set(chunks[Ranks(rank, size).share(count)]) for rank in range(size)]
        assert sum(map(len, shares)) == len(set(chunks))
    with pytest.raises(CfspError, match="take 1, 2, 4 or 8 ranks, not 3"):
        gram_sums.check_ranks(3)


def test_the_files_round_trip(tmp_path: Path) -> None:
    found = collect(make_tiny(), tmp_path / "g")
    save_statistics(found, tmp_path / "s")
    back = load_statistics(tmp_path / "s")
    assert [block.grams for block in back.blocks] == [block.grams for block in found.blocks]
    assert statistics_fingerprint(back) == statistics_fingerprint(found)
    assert statistics_fingerprint(back) != statistics_fingerprint(found.without_grams())
    save_statistics(back, tmp_path / "s")
    save_statistics(back, tmp_path / "copy" / "s")
    del found
    assert not (tmp_path / "g").exists()
    shutil.rmtree(tmp_path / "s.grams")
    copy = load_statistics(tmp_path / "copy" / "s")
    assert copy.blocks[3].gram is not None
    assert copy.blocks[3].gram.fit().tokens == FITTED * 12
    save_statistics(copy.without_grams(), tmp_path / "copy" / "s")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["s"]


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of statistics with Gram matrices."""
    folder = tmp_path_factory.mktemp("statistics")
    save_statistics(collect(make_tiny(), folder / "g"), folder / "s")
    return folder / "s"


def test_files_that_are_missing_damaged_or_others_are_refused(
    statistics: Path, tmp_path: Path
) -> None:
    recipe = replace(RECIPE, compensation="least-squares")

    def refused(message: str, path: Path = tmp_path / "s") -> None:
        model = make_tiny()
        with pytest.raises(CfspError, match=message) as caught:
            cfsp.prune(model, recipe=recipe, statistics=path, progress=False)
        assert "\n" not in str(caught.value)
        assert model.model.layers[0].mlp.down_proj.in_features == 48

    shutil.copyfile(statistics, tmp_path / "s")
    refused(r"cannot read .*s\.grams/block-0000\.safetensors.* calibrate again")
    shutil.copytree(gram_path(statistics), tmp_path / "s.grams")
    file = tmp_path / "s.grams" / "block-0002.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    refused(r"block-0002\.safetensors is corrupt: .* calibrate again")
    shutil.copyfile(file.with_name("block-0001.safetensors"), file)
    refused(r"block-0002\.safetensors is not of these statistics")
    save_statistics(load_statistics(statistics).without_grams(), tmp_path / "without")
    message = "compensation 'least-squares' needs Gram matrices, which the statistics lack"
    refused(message, tmp_path / "without")


def test_nothing_but_gram_matrices_is_replaced(statistics: Path, tmp_path: Path) -> None:
    for name in ("new", "s.grams"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "block-0000.safetensors").touch()
    assert not list(temporary_folder(tmp_path / "new").path.iterdir())
    save_statistics(load_statistics(statistics), tmp_path / "s")
    (tmp_path / "s.grams" / "notes.txt").touch()
    before = (tmp_path / "s").read_bytes()
    with pytest.raises(CfspError, match=r"s\.grams is in the way: it holds notes\.txt"):
        save_statistics(load_statistics(statistics).without_grams(), tmp_path / "s")
    with pytest.raises(CfspError, match="is in the way"):
        temporary_folder(tmp_path)
    assert (tmp_path / "s").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "s.grams"]


def test_statistics_of_the_version_before_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cfsp.calibration.statistics.FORMAT", "cfsp-statistics-2")
    save_statistics(collect(make_tiny(), None), tmp_path / "s")
    monkeypatch.undo()
    assert load_statistics(tmp_path / "s").gram_folder is None


def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(CfspError, match=r"cannot write Gram matrices: .*No space left"):
        collect(make_tiny(), tmp_path / "g")
    assert not (tmp_path / "g").exists()
