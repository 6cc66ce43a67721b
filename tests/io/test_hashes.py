"""``--verify``: a byte that changed on its way is found before any work."""

import hashlib
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import cfsp
from cfsp.errors import CfspError
from cfsp.io.hashes import known_hashes, sha256_of
from cfsp.models.finding import weight_files

from ..cli.test_cli import EXACT, SMALL, check_refusal, run
from ..conftest import TEXT, make_tiny, make_tokenizer


def list_hashes(folder: Path) -> None:
    """SHA256SUMS as coreutils write it."""
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    sums = subprocess.run(
        ["sha256sum", *names], cwd=folder, capture_output=True, text=True, check=True
    )
    (folder / "SHA256SUMS").write_text(sums.stdout)


def flip(file: Path) -> None:
    """Another value in the middle of a tensor; safetensors has no objection."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A tiny model of several shards with its hashes."""
    folder = tmp_path / "tiny"
    make_tiny().save_pretrained(folder, max_shard_size="40KB")
    make_tokenizer().save_pretrained(folder)
    list_hashes(folder)
    return folder


def command(model: Path | str, out: Path) -> list[object]:
    return ["prune", model, "--out", out, *EXACT, *SMALL, "--verify"]


def test_a_good_model_is_pruned_and_the_result_has_hashes_that_verify_it(
    listed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, *command(listed, tmp_path / "out"))[0] == 0
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(check, cwd=tmp_path / "out", capture_output=True).returncode == 0
    again = command(tmp_path / "out", tmp_path / "twice")
    assert run(capsys, *again)[0] == 0
    flip(tmp_path / "out" / "model.safetensors")
    check_refusal(capsys, tmp_path, [*again, "--overwrite"], "model.safetensors is corrupt")


def test_a_flipped_byte_is_named_with_its_shard(
    listed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = sorted(listed.glob("*.safetensors"))[1]
    flip(shard)
    check_refusal(
        capsys, tmp_path, command(listed, tmp_path / "out"), f"{shard} is corrupt: its SHA-256 is"
    )
    without = [part for part in command(listed, tmp_path / "out") if part != "--verify"]
    assert run(capsys, *without)[0] == 0  # nothing else can tell


def test_a_shard_that_is_not_listed_is_refused(listed: Path) -> None:
    lines = (listed / "SHA256SUMS").read_text().splitlines(keepends=True)
    (listed / "SHA256SUMS").write_text("".join(lines[1:]))
    with pytest.raises(CfspError, match=r"no hash is known of .*model-00001.*; `sha256sum model-"):
        known_hashes(weight_files(listed))
    (listed / "SHA256SUMS").write_bytes(b"\xff\xfe")
    with pytest.raises(CfspError, match="cannot read"):
        known_hashes(weight_files(listed))


def test_the_hubs_cache_names_its_blobs_by_their_hash(listed: Path, tmp_path: Path) -> None:
    (listed / "SHA256SUMS").unlink()
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in listed.glob("*.safetensors"):
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        file.symlink_to(blob)
    files = weight_files(listed)
    assert len(files) > 3
    known = known_hashes(files)
    assert list(known.values()) == sha256_of(files, progress=False)


def test_only_files_that_are_read_are_hashed(listed: Path) -> None:
    save_file({"of another program": torch.ones(1)}, listed / "consolidated.safetensors")
    assert "consolidated.safetensors" not in [file.name for file in weight_files(listed)]


def test_a_gguf_is_its_own_file_and_a_pickle_has_none(tmp_path: Path) -> None:
    with pytest.raises(CfspError, match="no such file"):
        weight_files(tmp_path / "model.gguf")
    with pytest.raises(CfspError, match="cannot read"):
        sha256_of([tmp_path / "model.gguf"], progress=False)
    (tmp_path / "model.gguf").touch()
    assert weight_files(tmp_path / "model.gguf") == [tmp_path / "model.gguf"]


def test_a_live_model_has_no_file_to_verify_but_its_result_has_hashes(tmp_path: Path) -> None:
    calibration = cfsp.Calibration(dataset=TEXT, samples=2, seqlen=32)
    cfsp.prune(
        make_tiny(),
        make_tokenizer(),
        cfsp.Recipe(width_multiple=1, calibration=calibration),
        tmp_path / "out",
        eval_windows=0,
        verify=True,
        progress=False,
    )
    sums = (tmp_path / "out" / "SHA256SUMS").read_text()
    assert sums == f"{sha256_of(weight_files(tmp_path / 'out'), progress=False)[0]}  " + (
        "model.safetensors\n"
    )
