"""License, notice and policy files go where the weights go, and the card says the license."""

import os
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import cfsp
from cfsp.checkpoints.terms import MAX_BYTES, copy_terms, front_matter_terms
from cfsp.models.finding import HUB_FILES

from ..conftest import TEXT

CALIBRATION = cfsp.Calibration(dataset=TEXT, samples=2, seqlen=32)
RECIPE = cfsp.Recipe(scorer="cfsp", width_multiple=1, calibration=CALIBRATION)
NAMES = ("LICENSE", "License.txt", "LICENCE-MIT", "notice.md", "NOTICE", "USE_POLICY.md")
FRONT = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\ntags: [x]\n---\n# m\n"


@pytest.fixture
def dense(tiny_folder: Path) -> Path:
    for name in NAMES:
        (tiny_folder / name).write_text(f"terms of {name}")
    (tiny_folder / "README.md").write_text(FRONT)
    return tiny_folder


def assert_terms(folder: Path) -> None:
    for name in NAMES:
        assert (folder / name).read_text() == f"terms of {name}"


def prune(model: object, out: Path, tokenizer: object = None) -> None:
    options = {"recipe": RECIPE, "eval_windows": 0, "progress": False}
    cfsp.prune(model, tokenizer, out=out, **options)


def test_a_result_has_the_terms_of_its_model(dense: Path, tmp_path: Path) -> None:
    prune(dense, tmp_path / "streamed")
    model = AutoModelForCausalLM.from_pretrained(dense)
    prune(model, tmp_path / "live", AutoTokenizer.from_pretrained(dense))
    for out in (tmp_path / "streamed", tmp_path / "live"):
        assert_terms(out)
        said = ModelCard.load(out / "README.md").data
        assert (said.license, said.license_name, said.license_link) == ("other", "own", "LICENSE")
        assert said.tags == ["pruned", "cfsp"]
    for format in ("padded", "nemotron-nas"):
        cfsp.export(tmp_path / "streamed", format, tmp_path / format, progress=False)
        assert_terms(tmp_path / format)


def test_a_recovered_model_keeps_them(dense: Path, tmp_path: Path) -> None:
    prune(dense, tmp_path / "out")
    settings = cfsp.Recovery(method="ffn", dataset=TEXT, steps=1, seqlen=16, batch_size=1)
    cfsp.recover(tmp_path / "out", tmp_path / "back", settings, eval_windows=0, progress=False)
    assert_terms(tmp_path / "back")
    assert ModelCard.load(tmp_path / "back" / "README.md").data.license == "other"


@pytest.mark.parametrize("name", [*NAMES, "README.md", "config.json", "tokenizer.model"])
def test_the_hub_is_asked_for_them(name: str) -> None:
    assert any(fnmatchcase(name, pattern) for pattern in HUB_FILES)


def test_only_regular_files_of_the_folder_are_copied(tmp_path: Path) -> None:
    source, out, secret = (tmp_path / name for name in ("source", "out", "secret"))
    source.mkdir()
    out.mkdir()
    secret.write_text("secret")
    (source / "LICENSE").symlink_to(secret)
    (source / "LICENSE-dangling").symlink_to(tmp_path / "absent")
    os.mkfifo(source / "NOTICE")
    (source / "NOTICE-folder").mkdir()
    (source / "USE_POLICY").write_bytes(bytes(MAX_BYTES + 1))
    (source / "license.safetensors").write_text("x")
    with pytest.warns(UserWarning, match="is not copied") as told:
        copy_terms(source, out)
    assert len(told) == 5
    assert not list(out.iterdir())
    (source / "LICENSE").unlink()
    (source / "kept").write_text("terms")
    (source / "LICENSE").symlink_to("kept")
    with pytest.warns(UserWarning, match="is not copied"):
        copy_terms(source, out)
    assert [(file.name, file.is_symlink()) for file in out.iterdir()] == [("LICENSE", False)]


def test_the_hub_cache_links_its_files(tmp_path: Path) -> None:
    blobs, snapshot, out = tmp_path / "blobs", tmp_path / "snapshots" / "0123", tmp_path / "out"
    for folder in (blobs, snapshot, out):
        folder.mkdir(parents=True)
    (blobs / "abc").write_text("terms")
    (blobs / "def").write_text(FRONT)
    (snapshot / "LICENSE").symlink_to("../../blobs/abc")
    (snapshot / "README.md").symlink_to("../../blobs/def")
    copy_terms(snapshot, out)
    assert (out / "LICENSE").read_text() == "terms"
    assert front_matter_terms(snapshot)["license"] == "other"


@pytest.mark.parametrize(
    ("card", "terms"),
    [
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlicense: [mit]\nlicense_name: 3\n---\n", {}),
        ("# no front matter\nlicense: mit\n", {}),
        ("---\n- license\n---\n", {}),
        ("---\nlicense: {\n---\n", {}),
        (f"---\nlicense: {'[' * 5000}\n---\n", {}),
        ("---\nlicense: !!python/object/apply:os.system [true]\n---\n", {}),
        ("\xff\xfe", {}),
    ],
)
def test_a_card_that_says_no_license_adds_none(
    card: str, terms: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(card, encoding="latin-1")
    assert front_matter_terms(tmp_path) == terms
