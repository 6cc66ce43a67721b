"""The generator of checkpoints, and what measures the disk and memory with them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.jobs import memory, second_pass, synthetic


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "tiny"
    assert synthetic.main(["--model", "tiny", "--blocks", "3", "--out", str(out)]) == 0
    return out


def test_a_synthetic_checkpoint_loads_and_is_the_same_each_time(
    checkpoint: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    synthetic.main(["--config", str(checkpoint), "--out", str(again)])
    weights = "model.safetensors"
    assert (checkpoint / weights).read_bytes() == (again / weights).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    assert (model.dtype, len(model.model.layers)) == (torch.bfloat16, 3)
    matrix = model.model.layers[1].mlp.up_proj.weight.float()
    assert len(matrix.unique(dim=0)) == len(matrix)
    assert float(matrix.std()) == pytest.approx(synthetic.DEVIATION, rel=0.1)
    assert (model.model.norm.weight == 1).all()
    with pytest.raises(SystemExit):  # it is not overwritten
        synthetic.main(["--model", "tiny", "--out", str(again)])


def test_the_second_pass_is_timed_beside_cp(checkpoint: Path, tmp_path: Path) -> None:
    work, found = tmp_path / "work", tmp_path / "result.json"
    second_pass.main(
        [*("--checkpoint", str(checkpoint), "--work", str(work)), "--rounds=2", f"--json={found}"]
    )
    result = json.loads(found.read_text())
    assert len(result["rounds"]) == 2
    for measured in result["rounds"]:
        assert 0 < measured["second_pass"] <= measured["second_pass_and_sync"]
        assert 0.6 < measured["second_pass_bytes"] / measured["cp_bytes"] < 1
    assert not work.exists()


def test_memory_is_measured_under_its_limit(checkpoint: Path, tmp_path: Path) -> None:
    work, found = tmp_path / "work", tmp_path / "result.json"
    options = ["--checkpoint", str(checkpoint), "--work", str(work), f"--json={found}"]
    memory.main([*options, "--samples=2", "--seqlen=32", "--limit-gib=8"])
    (run,) = json.loads(found.read_text())["runs"]
    assert run["loading_whole_exit"] == 0  # it is tiny
    assert run["blocks"] == 3
    assert 1e8 < run["peak_resident_bytes"] < run["estimated_resident_bytes"] < 2e9
    assert run["peak_address_space_bytes"] < 8 * 2**30
    with pytest.raises(SystemExit, match="cfsp prune ended with"):
        memory.main([*options, "--limit-gib=0.5"])
