"""``--dry-run`` and ``--max-memory``: what is printed, chosen and refused, before any work."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cfsp
from cfsp import api as pipeline
from cfsp.calibration.collect import BlockProgress
from cfsp.checkpoints.resume import check_resume
from cfsp.costs import dry_run
from cfsp.costs.dry_run import Request, estimate_opened
from cfsp.costs.hardware import (
    H100,
    RTX_4090,
    Hardware,
    MemoryBudget,
    host_memory,
    measured_flops,
    resident_bytes,
    this_machine,
)
from cfsp.errors import CfspError
from cfsp.models.blockwise import default_micro_batch
from cfsp.models.opening import open_any

from ..cli.test_cli import EXACT, SMALL, run
from ..conftest import TEXT, make_tiny
from ..models.test_families import make
from .test_estimate import CONFIGS, build

TINY_RUN = [*SMALL, *EXACT]


def estimated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, object]:
    code, printed, error = run(capsys, "prune", *arguments, "--dry-run", "--json", "--tflops", 1)
    assert code == 0, error
    return json.loads(printed)


def test_a_dry_run_reads_no_weights_and_writes_nothing(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_weights = estimated(capsys, tiny_folder, *TINY_RUN)
    monkeypatch.setattr("os.preadv", lambda *_: pytest.fail("weights were read"))
    assert estimated(capsys, tiny_folder, *TINY_RUN)["parameters"] == 47648
    (tiny_folder / "model.safetensors").unlink()
    without = estimated(capsys, tiny_folder, *TINY_RUN)
    from_file = estimated(capsys, tiny_folder / "config.json", *TINY_RUN)
    for key in ("parameters_after", "blocks", "stages", "device_parts", "dtype", "streamed"):
        assert with_weights[key] == without[key] == from_file[key], key
    assert sorted(path.name for path in tiny_folder.parent.iterdir()) == ["tiny"]
    assert (with_weights["windows"], with_weights["seqlen"], with_weights["refusal"]) == (
        3, 32, "",
    )  # fmt: skip


def test_what_is_stored_otherwise_or_not_streamed_is_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "m"
    make_tiny().to(torch.bfloat16).save_pretrained(folder)
    plain = estimated(capsys, folder, *TINY_RUN)
    cast = estimated(capsys, folder, *TINY_RUN, "--dtype", "float32")
    assert plain["largest_stored_block_bytes"] == cast["largest_stored_block_bytes"]
    assert cast["largest_block_bytes"] == 2 * plain["largest_block_bytes"]
    assert plain["device_parts"]["blocks"] == 2 * plain["largest_block_bytes"]
    assert cast["device_parts"]["blocks"] == 4 * plain["largest_block_bytes"]
    tensors = load_file(folder / "model.safetensors")
    up = "model.layers.2.mlp.up_proj.weight"
    tensors[up] = tensors[up].double()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    doubles = estimated(capsys, folder, *TINY_RUN)
    read = plain["largest_block_bytes"] + 6 * tensors[up].numel()
    assert doubles["largest_stored_block_bytes"] == read
    assert doubles["device_parts"]["blocks"] == 2 * read + plain["largest_block_bytes"]
    searching = ("--allocator", "search", "--search-windows", 1)
    whole = estimated(capsys, folder, *TINY_RUN, *searching)
    assert (plain["streamed"], doubles["streamed"], whole["streamed"]) == (True, True, False)
    assert whole["device_parts"]["blocks"] == 4 * plain["largest_block_bytes"]


def test_the_printed_tables_name_every_assumption(capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIGS / "Llama-3-70B.json"
    code, printed, _ = run(
        capsys, "prune", config, "--dry-run", "--hardware", "h100", "--scorer", "cfsp"
    )
    assert code == 0
    for text in (
        "70.55B -> 53.64B", "calibrate", "1.83e+16", "verify", "bound by", "hidden states",
        "5.93e+14 (60% of the data sheet", "4.02e+13 (60% of the data", "fp64, FLOP/s",
        "disk read, B/s", "assumed, NVMe", "host to device",
    ):  # fmt: skip
        assert text in printed, text
    _, printed, _ = run(
        capsys, "prune", config, "--dry-run", "--hardware", "H100", "--disk-gbps", 1, "--json",
    )  # fmt: skip
    assert json.loads(printed)["seconds"] > 300
    assert json.loads(printed)["hardware"]["sources"]["disk_read"] == "stated"


def test_scorers_that_read_weights_have_them_in_the_calibration_or_read_the_ffns_once_more(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_any(tiny_folder, None, "auto", torch.device("cpu"))
    for scorer, reads in (("cfsp", None), ("flap", 4 * 3 * 48 * 32 * 4)):
        stages = estimated(capsys, tiny_folder, *TINY_RUN, "--scorer", scorer)["stages"]
        assert [x["name"] for x in stages] == ["open", "calibrate", "prune", "verify"]
        assert stages[1]["bytes_read"] == stages[2]["bytes_read"]
        recipe = cfsp.Recipe(scorer=scorer, width_multiple=1)
        with_statistics = estimate_opened(opened, Request(recipe, 0), MemoryBudget(), measure=False)
        found = {stage.name: stage.bytes_read for stage in with_statistics.stages}
        assert found.get("score") == reads


@pytest.mark.parametrize("hardware", ["h100", "rtx4090"])
def test_the_default_prunes_a_70b_model_on_one_gpu_without_scratch_disk(
    hardware: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prune", CONFIGS / "Llama-3-70B.json", "--dry-run", "--hardware", hardware]
    code, printed, error = run(capsys, *arguments, "--json")
    assert (code, error) == (0, "")
    found = json.loads(printed)
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["open", "calibrate", "prune", "verify"]
    written = {name: stage["bytes_written"] for name, stage in stages.items()}
    # Only the result, in bf16, with less than a MiB of headers: no disk for anything else.
    result = 2 * found["parameters_after"]
    assert result < written.pop("prune") < result + (1 << 20)
    assert set(written.values()) == {0}
    assert stages["verify"]["bytes_read"] == stages["prune"]["bytes_written"]
    assert found["micro_batch"] == 8
    assert found["device_bytes"] < 20 << 30
    assert found["hardware"]["device_memory"] >= 24 << 30
    minutes = found["seconds"] / 60
    if hardware == "h100":
        assert minutes <= 2.0
    else:
        assert 2.0 < minutes < 10.0
    code, printed, _ = run(capsys, *arguments)
    assert code == 0
    assert f"{minutes:.1f} min" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dry-run", "--hardware", "x"], "unknown hardware 'x'; valid: h100, rtx4090"),
        (["--dry-run", "--tflops", "0"], "--tflops must be above 0, got 0.0"),
        (["--dry-run", "--disk-gbps", "nan"], "--disk-gbps must be above 0, got nan"),
        (["--dry-run", "--ranks", "0"], "ranks must be at least nodes"),
        (["--dry-run", "--seqlen", "200"], "seqlen 200 is beyond the model's 128 positions"),
        (["--dry-run", "--sparsity", "0.99"], "no widths meet sparsity 0.99"),
        (["--dry-run", "--eval-windows", "-1"], "eval_windows must be 0 or more, got -1"),
        (["--dry-run", "--plan", "p.json"], "--dry-run estimates a whole run; drop --plan"),
        (["--dry-run", "--max-memory", "much"], "not a size: 'much'"),
        (["--max-memory", "much"], "not a size: 'much'"),
        (["--max-memory", "1MiB"], "host memory: about "),
        (["--max-memory", "device=1MiB"], "host memory: about "),
        (["--dry-run", "--max-memory", "host=1MiB"], "host memory: about "),
        (["--ranks", "2"], "--ranks is for --dry-run"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    options: list[str], message: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tiny_folder.parent / "out"
    arguments = ["prune", tiny_folder, "--out", out, *SMALL, "--width-multiple", 1, *options]
    code, _, error = run(capsys, *arguments)
    assert code == 2
    assert error.startswith(f"cfsp: error: {message}")
    assert error.count("\n") == 1
    assert [path.name for path in tiny_folder.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sequential", "--ranks", "2"], "sequential and blockwise fitting run in one process"),
        (["--compensation", "blockwise", "--ranks", "4"], "sequential and blockwise fitting run"),
        (
            ["--allocator", "search", "--search-windows", "1", "--ranks", "2"],
            "allocator 'search' is for one process",
        ),
        (["--width-multiple", "512"], "width_multiple 512 is more than the 176 channels"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("llama").config.save_pretrained(tmp_path)
    code, _, error = run(capsys, "prune", tmp_path, "--dry-run", *SMALL, *options)
    assert (code, error.startswith(f"cfsp: error: {message}")) == (2, True), error


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"sequential": True}, "know no experts: use compensation 'least-squares' alone"),
        ({"compensation": "blockwise"}, "know no experts"),
        ({"compensation": "least-squares-bias"}, "can have none: use compensation 'least-squares'"),
        ({"compensation": "bias"}, "can have none: use compensation 'none'"),
    ],
)
def test_a_dry_run_refuses_what_experts_have_not(
    choice: dict[str, object], message: str, tmp_path: Path
) -> None:
    make("mixtral").config.save_pretrained(tmp_path)
    recipe = cfsp.Recipe(width_multiple=8, calibration=cfsp.Calibration(seqlen=32), **choice)
    with pytest.raises(CfspError, match=message):
        cfsp.estimate(tmp_path, recipe, hardware="h100")


def test_out_is_needed_but_for_a_dry_run(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(capsys, "prune", tiny_folder, *TINY_RUN)
    assert (code, error) == (2, "cfsp: error: cfsp prune needs --out DIR, or --dry-run\n")


def test_an_architecture_that_cannot_be_pruned_has_costs_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("bitnet").config.save_pretrained(tmp_path)
    code, printed, error = run(capsys, "prune", tmp_path, "--dry-run", *SMALL, "--json")
    found = json.loads(printed)
    assert (code, found["blocks"]) == (2, 2)
    assert "unsupported architecture 'bitnet': mlp of BitNetDecoderLayer does not compute" in error
    assert found["refusal"] in error
    before, after = found["parameters"], found["parameters_after"]
    assert before - after == pytest.approx(0.3 * 2 * 3 * 64 * 176, rel=0.01)


def test_the_estimate_comes_before_the_work_unless_quiet(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [option for option in SMALL if option != "--quiet"]
    for number, command in enumerate((["calibrate"], ["prune", *EXACT])):
        arguments = [command[0], tiny_folder, "--out", tmp_path / str(number), *command[1:]]
        _, _, error = run(capsys, *arguments, *options)
        lines = error.splitlines()
        assert all(line.startswith("estimate: ") for line in lines[:4]), lines[:4]
        assert "host memory" in lines[1]
        code, _, error = run(capsys, *arguments, *SMALL, "--overwrite")
        assert (code, "estimate" in error) == (0, False)


def gpu(free: int) -> Hardware:
    return Hardware("cuda", "a GPU", free, 1 << 40, 1e12)


def test_the_largest_micro_batch_that_fits_is_in_force_and_in_the_identity(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU whose free memory is stated; the work itself is done on the CPU."""
    calibration = cfsp.Calibration(dataset=TEXT, samples=40, seqlen=128)
    recipe = cfsp.Recipe(scorer="cfsp", width_multiple=1, calibration=calibration)
    default = default_micro_batch(torch.device("cuda"), 128)
    whole = cfsp.estimate(tiny_folder, recipe, hardware=gpu(1 << 40), eval_windows=0)
    assert whole.micro_batch == default == 64
    tight = whole.device_bytes - (whole.device_parts["micro-batch"] * 3) // 4
    monkeypatch.setattr(dry_run, "this_machine", lambda *_, **__: gpu(tight))
    seen = []
    identity = pipeline.Run.identity

    def spied(self: pipeline.Run, blocks: object) -> dict[str, object]:
        seen.append(identity(self, blocks))
        return seen[-1]

    monkeypatch.setattr(pipeline.Run, "identity", spied)
    options = {"recipe": recipe, "progress": False, "eval_windows": 0}
    result = cfsp.prune(tiny_folder, out=tmp_path / "out", **options)
    chosen = result.statistics.provenance["micro_batch"]
    assert 1 < chosen < default
    assert seen[0]["micro-batch"] == chosen
    assert cfsp.calibrate(tiny_folder, recipe=recipe, progress=False).provenance == (
        result.statistics.provenance
    )
    # A second pass of all windows, with Gram matrices, leaves less room than the first alone.
    fitted = replace(recipe, scorer="cfsp-output")
    least = cfsp.estimate(tiny_folder, fitted, hardware=gpu(tight), eval_windows=0).micro_batch
    first = cfsp.calibrate(tiny_folder, recipe=fitted, progress=False).provenance["micro_batch"]
    assert 1 <= least < chosen <= first
    fixed = cfsp.Recipe(**{**vars(recipe), "micro_batch": chosen + 20})
    with pytest.raises(CfspError, match=r"device memory: about .* lower `"):
        cfsp.prune(tiny_folder, out=tmp_path / "more", **{**options, "recipe": fixed})
    assert not (tmp_path / "more").exists()
    begun = tmp_path / "begun.partial" / ".cfsp-run"
    begun.mkdir(parents=True)
    document = {"format": "cfsp-run-1", "identity": {**seen[0], "micro-batch": 1}}
    (begun / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(CfspError, match="begun with another micro-batch;"):
        check_resume(begun.parent, seen[0])


def test_a_cpu_without_a_budget_runs_as_before(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = cfsp.Recipe(
        width_multiple=1, calibration=cfsp.Calibration(dataset=TEXT, samples=2, seqlen=32)
    )
    plain, _ = (
        cfsp.prune(
            tiny_folder, recipe=recipe, out=tmp_path / name, progress=False, max_memory=budget,
        )
        for name, budget in (("plain", None), ("roomy", "device=100GiB,host=50GiB"))
    )  # fmt: skip
    assert plain.statistics.provenance["micro_batch"] == 1
    for name in ("model.safetensors", "recipe.yaml"):
        files = [(tmp_path / out / name).read_text("latin1") for out in ("plain", "roomy")]
        assert files[0].partition("result:")[0] == files[1].partition("result:")[0]
    assert plain.report.plan.recipe.micro_batch is None


def test_this_machine_is_measured() -> None:
    slow, fast = 1e6, 1e16
    assert slow < measured_flops(torch.device("cpu"), torch.float32) < fast
    assert 50 << 20 < resident_bytes() < host_memory() < shutil.disk_usage("/").total * 1000
    assert dry_run.this_machine(torch.device("cpu"), torch.float32, measure=False).flops > fast
    measured = this_machine(torch.device("cpu"), torch.bfloat16)
    for figure in ("flops", "fp32_flops", "fp64_flops"):
        assert slow < getattr(measured, figure) < fast
        assert measured.sources[figure] == "60% of a matrix product's, measured"
    # What a card for games lacks is fp64, which only the exception and rankings take.
    assert 60 < RTX_4090.fp32_flops / RTX_4090.fp64_flops < 70
    assert H100.stated(tflops=1).flops == 1e12


def test_the_bar_says_how_fast_blocks_are_read() -> None:
    class Bar:
        def __init__(self) -> None:
            self.format_dict = {"elapsed": 2.0}
            self.said = ""

        def set_postfix_str(self, text: str) -> None:
            self.said = text

    bar = Bar()
    shown = BlockProgress(bar, 80)
    shown.turn(0, 0)
    assert bar.said == "block 1/80"
    shown.turn(1, 5 * 10**9)
    shown.turn(2, 10**9)
    assert bar.said == "block 3/80, 3.00 GB/s read"
