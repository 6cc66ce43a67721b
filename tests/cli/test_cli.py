"""The command line: what it prints, and every user's mistake as one line with exit code 2."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cfsp
from cfsp import CfspError
from cfsp.cli.main import build_parser, main
from cfsp.pruning.recipe import load_recipe

from ..conftest import TEXT, make_tiny, make_tokenizer

SMALL = ["--dataset", TEXT, "--samples", "3", "--seqlen", "32", "--quiet"]
EXACT = ["--width-multiple", "1", "--eval-windows", "0"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command in this process."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_calibrate_plan_prune_evaluate(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats, plan, out = (tmp_path / name for name in ("s.safetensors", "plan.json", "out"))
    code, printed, _ = run(capsys, "calibrate", tiny_folder, "--out", stats, *SMALL, "--json")
    assert (code, json.loads(printed)["tokens"]) == (0, 96)
    code, printed, _ = run(
        capsys, "plan", tiny_folder, "--statistics", stats, "--out", plan, "--width-multiple", 1
    )
    assert code == 0
    assert "30.21% of FFN channels removed" in printed
    code, printed, _ = run(
        capsys, "prune", tiny_folder, "--out", out, "--plan", plan, "--eval-windows", 2, "--json",
        "--quiet", "--eval-dataset", "builtin",
    )  # fmt: skip
    result = json.loads(printed.splitlines()[-1])
    assert code == 0
    assert result["out"] == str(out)
    assert result["perplexity_after"]["windows"] == 2
    code, printed, _ = run(
        capsys, "evaluate", out, "--dataset", "builtin", "--windows", 2, "--seqlen", 32, "--json",
        "--quiet",
    )  # fmt: skip
    measured = json.loads(printed.splitlines()[-1])
    assert {"perplexity", "windows", "tokens"} <= set(measured)
    assert measured["perplexity"] == pytest.approx(result["perplexity_after"]["perplexity"])


def test_a_recipe_file_repeats_a_result(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--scorer", "wifn", "--sparsity", "0.25", *EXACT, *SMALL]
    assert run(capsys, "prune", tiny_folder, "--out", tmp_path / "a", *options)[0] == 0
    recipe = tmp_path / "a" / "recipe.yaml"
    code, _, _ = run(
        capsys, "prune", tiny_folder, "--out", tmp_path / "b", "--recipe", recipe, "--quiet",
        "--eval-windows", 0,
    )  # fmt: skip
    assert code == 0
    for name in ("model.safetensors", "recipe.yaml", "plan.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_overwrite_replaces_the_folder_whole(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["prune", tiny_folder, "--out", out, *EXACT, *SMALL]
    assert run(capsys, *arguments, "--verify")[0] == 2  # no hash is known of the model
    assert not out.exists()
    assert run(capsys, *arguments, "--uniform")[0] == 0
    assert not (out / "modeling_cfsp.py").exists()
    exists = f"output {out} exists; --overwrite replaces it"
    check_refusal(capsys, tmp_path, arguments, exists)
    (out / "stale").write_text("x")
    foreign = (
        f"output {out} exists and holds stale, which cfsp did not write; choose another folder"
    )
    check_refusal(capsys, tmp_path, arguments, foreign)
    check_refusal(capsys, tmp_path, [*arguments, "--overwrite"], foreign)
    (out / "stale").unlink()
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    assert (out / "modeling_cfsp.py").exists()
    assert run(capsys, *arguments, "--uniform", "--overwrite")[0] == 0
    assert not (out / "modeling_cfsp.py").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scorer", "x"], "unknown scorer 'x'; valid: cfsp, cfsp-eq8, cfsp-output, cfsp-balan"),
        (["--allocator", "x"], "unknown allocator 'x'; valid: cfsp, cfsp-filled, uniform"),
        (["--compensation", "x"], "unknown compensation 'x'; valid: none, bias"),
        (["--importance", "x"], "unknown importance metric 'x'; valid: angular, cosine, mse, mae"),
        (["--dataset", "x"], "unknown dataset 'x'; valid: wikitext2, c4, ptb, builtin, or the pat"),
        (["--bos", "x"], "unknown bos 'x'; valid: auto, always, never"),
        (["--dtype", "x"], "unknown dtype 'x'; valid: auto, float32, bfloat16, float16"),
        (["--device", "x"], "device 'x': "),
        (["--sparsity", "1"], "sparsity must be in [0, 1), got 1.0"),
        (["--sparsity", "-0.1"], "sparsity must be in [0, 1), got -0.1"),
        (["--sparsity", "nan"], "sparsity must be in [0, 1), got nan"),
        (["--sparsity", "0.99"], "no widths meet sparsity 0.99 in multiples of 1: 4 FFNs can re"),
        (["--sparsity", "much"], "argument --sparsity: invalid float value: 'much'"),
        (["--width-multiple", "64"], "width_multiple 64 is more than the 48 channels of FFN 0"),
        (["--width-multiple", "0"], "width_multiple must be 1 or more, got 0"),
        (["--seqlen", "200"], "seqlen 200 is beyond the model's 128 positions"),
        (["--samples", "0"], "samples must be 1 or more, got 0"),
        (["--micro-batch", "0"], "micro_batch must be 1 or more, got 0"),
        (["--recipe", "absent.yaml"], "cannot read recipe absent.yaml"),
        (["--plan", "absent.json"], "cannot read plan absent.json"),
        (["--eval-dataset", "x", "--eval-windows", "1"], "unknown dataset 'x'"),
        (["--eval-windows", "-1"], "eval_windows must be 0 or more, got -1"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    options: list[str],
    message: str,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    defaults = [] if "--plan" in options else [*EXACT, *SMALL]
    arguments = ["prune", tiny_folder, "--out", tmp_path / "out", *defaults, *options]
    check_refusal(capsys, tmp_path, arguments, message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("width_windows: 2.5", "width_windows must be a whole number, got 2.5"),
        ("width_windows: null", "width_windows must be a whole number, got None"),
        ("width_windows: '7'", "width_windows must be a whole number, got '7'"),
        ("epochs: true", "epochs must be a whole number, got True"),
        ("micro_batch: 1.5", "micro_batch must be a whole number, got 1.5"),
        ("calibration: {samples: 2.5}", "samples must be a whole number, got 2.5"),
        ("damping: '0.3'", "damping must be a number, got '0.3'"),
        ("damping: true", "damping must be a number, got True"),
        ("sequential: 'no'", "sequential must be true or false, got 'no'"),
        ("uniform: 3", "uniform must be true or false, got 3"),
    ],
)
def test_a_recipe_with_a_value_of_another_type_is_refused(
    values: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(values)
    with pytest.raises(CfspError, match=re.escape(message)):
        load_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("damping: 1\nmicro_batch: null\nbudget: null")
    assert load_recipe(tmp_path / "r.yaml") == cfsp.Recipe(damping=1)


def check_refusal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[object], message: str
) -> None:
    before = contents(tmp_path)
    code, printed, error = run(capsys, *arguments)
    lines = [line for line in error.splitlines() if "error:" in line]
    assert code == 2
    assert len(lines) == 1, error
    assert message in lines[0]
    assert not printed
    assert "Traceback" not in error
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def broken(kind: str, folder: Path, tmp_path: Path) -> tuple[Path, Path, str]:
    """(model, out, message) for a model that cannot be pruned."""
    out, weights = tmp_path / "out", folder / "model.safetensors"
    match kind:
        case "absent":
            return tmp_path / "absent", out, "no such model folder"
        case "mistyped":
            message = "no folder nonexist here, and cannot load it from the hub: "
            return Path("nonexist"), out, message
        case "not a folder":
            (tmp_path / "file").write_text("x")
            return tmp_path / "file", out, "is not a folder; a model is a folder"
        case "no config":
            (folder / "config.json").unlink()
            return folder, out, "is not a model folder: no config.json"
        case "no weights":
            weights.unlink()
            return folder, out, "has no safetensors weights"
        case "only pickled weights":
            weights.rename(folder / "pytorch_model.bin")
            return folder, out, "only pytorch_model.bin: convert it to safetensors first"
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[:-100])
            return folder, out, "model.safetensors is corrupt"
        case "corrupt header":
            weights.write_bytes(b"\xff" * 64)
            return folder, out, "model.safetensors is corrupt"
        case "missing tensor":
            tensors = load_file(weights)
            del tensors["model.layers.1.mlp.up_proj.weight"]
            save_file(tensors, weights, metadata={"format": "pt"})
            return folder, out, "model.layers.1.mlp.up_proj.weight"
        case "wrong shapes":
            config = json.loads((folder / "config.json").read_text())
            config["intermediate_size"] = 64
            (folder / "config.json").write_text(json.dumps(config))
            return folder, out, "cannot load"
        case "no tokenizer":
            for file in folder.glob("token*"):
                file.unlink()
            return folder, out, "cannot load"
        case "unsupported architecture":
            config = json.loads((folder / "config.json").read_text())
            config["model_type"] = "t5"
            (folder / "config.json").write_text(json.dumps(config))
            return folder, out, "unsupported architecture 't5': an encoder-decoder"
        case "bad json":
            (folder / "config.json").write_text("{")
            return folder, out, "cannot load"
        case "NaN weights":
            tensors = load_file(weights)
            tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = torch.nan
            save_file(tensors, weights, metadata={"format": "pt"})
            return folder, out, "block 2: mlp.down_proj.weight holds NaN or infinite values"
        case "out is the input":
            return folder, folder, "is the input; choose another folder"
        case "out exists":
            out.mkdir()
            return folder, out, "exists; --overwrite replaces it"
        case "out is a file":
            out.write_text("x")
            return folder, out, "exists and is not a folder"
        case _:
            (tmp_path / "blocker").write_text("x")
            return folder, tmp_path / "blocker" / "out", "cannot write"


@pytest.mark.parametrize(
    "kind",
    [
        "absent", "mistyped", "not a folder", "no config", "no weights", "only pickled weights",
        "truncated weights", "corrupt header", "missing tensor", "wrong shapes",
        "no tokenizer", "unsupported architecture",
        "bad json", "NaN weights", "out is the input", "out exists", "out is a file",
        "out under a file",
    ],
)  # fmt: skip
def test_bad_models_and_outputs_are_one_line_and_leave_nothing(
    kind: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out, message = broken(kind, tiny_folder, tmp_path)
    check_refusal(capsys, tmp_path, ["prune", model, "--out", out, *EXACT, *SMALL], message)


@pytest.mark.parametrize("kind", ["truncated weights", "corrupt header", "NaN weights"])
def test_a_bad_model_leaves_a_finished_output_as_it_was(
    kind: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = ["prune", tiny_folder, "--out", tmp_path / "out", *EXACT, *SMALL]
    assert run(capsys, *finished)[0] == 0
    _, _, message = broken(kind, tiny_folder, tmp_path)
    check_refusal(capsys, tmp_path, [*finished, "--overwrite"], message)


def test_bad_statistics_are_one_line(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny(seed=1).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    stats = tmp_path / "s.safetensors"
    assert run(capsys, "calibrate", tmp_path / "other", "--out", stats, *SMALL)[0] == 0
    base = ["prune", tiny_folder, "--out", tmp_path / "out", *EXACT, "--quiet"]
    for options, message in (
        (["--statistics", stats], "of another model: same shapes, different weights"),
        (["--statistics", tmp_path / "absent"], "cannot read statistics"),
        (["--recipe", stats], f"cannot read recipe {stats}: it is not UTF-8, at byte"),
        (["--statistics", stats, "--seed", "1"], "--statistics fixes the calibration; drop --seed"),
        (["--statistics", stats, "--width-windows", "1"], "--statistics fixes the calibration; dr"),
    ):
        check_refusal(capsys, tmp_path, [*base, *options], message)
    check_refusal(
        capsys, tmp_path, ["calibrate", tiny_folder, "--out", stats, *SMALL], "--overwrite"
    )


def test_too_few_tokens_are_refused(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("short")
    arguments = ["prune", tiny_folder, "--out", tmp_path / "out", *EXACT, *SMALL]
    check_refusal(
        capsys,
        tmp_path,
        [*arguments, "--dataset", tmp_path / "short.txt"],
        "the calibration text has 5 tokens; a window of 32 needs 34 or more",
    )
    evaluation = ["evaluate", tiny_folder, "--dataset", tmp_path / "short.txt", "--seqlen", 32]
    told = "the evaluation text has 5 tokens; a window of 32 needs 32 or more"
    check_refusal(capsys, tmp_path, [*evaluation, "--quiet"], told)


def test_an_unknown_command_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capsys, "prun")
    assert code == 2
    assert len(error.splitlines()) == 1
    assert "prune" in error


def test_help_names_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("demo", "calibrate", "plan", "prune", "evaluate"):
        code, printed, _ = run(capsys, command, "--help")
        assert code == 0
        assert "default" in printed
    assert build_parser().prog == "cfsp"


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cfsp", "evaluate", str(tmp_path / "absent")],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == f"cfsp: error: no such model folder: {tmp_path / 'absent'}"
    version = subprocess.run(
        [sys.executable, "-m", "cfsp", "--version"], capture_output=True, text=True
    )
    assert version.stdout.strip() == f"cfsp {cfsp.__version__}"
    command = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cfsp", "prune", "--help"],
        capture_output=True,
        text=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in command.stderr.splitlines()}
    assert {"torch", "transformers", "cfsp.api"} <= imported
    heavy = {"datasets", "pyarrow", "pandas", "matplotlib", "gguf", "peft", "lm_eval"}
    assert not imported & heavy


def test_an_interrupted_write_leaves_the_old_result(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["prune", tiny_folder, "--out", tmp_path / "out", *EXACT, *SMALL, "--overwrite"]
    assert run(capsys, *arguments)[0] == 0
    kept = shutil.copytree(tmp_path / "out", tmp_path / "kept")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cfsp.run.disk_to_disk.write_documents", interrupt)
    assert run(capsys, *arguments)[0] == 130
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert sorted(names) == sorted(path.name for path in kept.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "out", "tiny"]


FAULTS = """
import resource, sys
import torch
from cfsp.cli.process import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
for turn in range(40):  # each a little larger than any before, from 8 MiB on
    if turn == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = torch.ones((8 << 18) + (turn << 17))
    kept = None
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_is_kept_between_calls() -> None:
    def faults(way: str) -> int:
        command = [sys.executable, "-c", FAULTS, way]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return int(run.stdout)

    assert faults("kept") < 0.2 * faults("plain")
