"""Every command finds a bad place before any work, and no input is ever an output."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import cfsp
from cfsp.cli.main import main

from ..conftest import TEXT, make_tiny, make_tokenizer
from .test_cli import EXACT, SMALL, check_refusal, contents, run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, statistics of it, a plan, a pruned folder and texts."""
    here = tmp_path_factory.mktemp("places")
    make_tiny().save_pretrained(here / "m")
    make_tokenizer().save_pretrained(here / "m")
    (here / "data").mkdir()
    shutil.copy(TEXT, here / "data" / "text.txt")
    arguments = ("calibrate", here / "m", "--out", here / "stats", *SMALL)
    assert main([str(argument) for argument in arguments]) == 0
    plan = ("plan", here / "m", "--statistics", here / "stats", "--out", here / "plan.json")
    assert main([str(argument) for argument in (*plan, "--width-multiple", 1)]) == 0
    pruned = ("prune", here / "m", "--plan", here / "plan.json", "--eval-windows", 0, "--quiet")
    assert main([str(argument) for argument in (*pruned, "--out", here / "pruned")]) == 0
    return here


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it; no model is opened and no text is read while a place is refused."""
    folder = tmp_path / "here"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


def never(*_: object, **__: object) -> None:
    raise AssertionError("the work began")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("prune m --out m", "output m is the input"),
        ("prune m --out .", "output . is or holds the current directory"),
        ("prune m --out ..", "output .. is or holds the current directory"),
        ("prune m --out m/sub", "output m/sub is inside the input m"),
        ("prune . --out pruned2", "output pruned2 is inside the input ."),
        ("prune pruned/model.gguf --out pruned", "holds the input pruned/model.gguf"),
        ("prune m --out data --dataset data/text.txt", "output data holds the input data/text.txt"),
        ("prune m --out data --eval-dataset data/text.txt:2", "output data holds the input"),
        ("prune m --out pruned --plan pruned/plan.json", "pruned holds the input pruned/plan.json"),
        ("prune m --out pruned --recipe pruned/recipe.yaml", "pruned holds the input pruned/rec"),
        ("prune m --out pruned --statistics pruned/s", "output pruned holds the input pruned/s"),
        ("recover pruned --out pruned", "output pruned is the input"),
        ("recover pruned --out pruned/adapter", "output pruned/adapter is inside the input pruned"),
        ("recover pruned --out data --dataset data/text.txt", "output data holds the input"),
        ("recover pruned --out m --teacher m", "output m is the input"),
        ("export pruned --to padded --out pruned", "output pruned is the input"),
        ("export pruned --to padded --out .", "output . holds the input pruned"),
        ("export m --to gguf --out m/model.gguf", "output m/model.gguf is inside the input m"),
        ("export pruned --to gguf --out alien.gguf", "alien.gguf exists and cfsp did not write it"),
        ("calibrate m --out m/model.safetensors", "m/model.safetensors is inside the input m"),
        ("calibrate m --out data/text.txt --dataset data/text.txt", "data/text.txt is the input"),
        ("calibrate m --out recipe.yaml --recipe recipe.yaml", "output recipe.yaml is the input"),
        ("calibrate m --out data", "output data exists and is not a file"),
        ("plan m --statistics stats --out stats", "output stats is the input"),
        ("plan m --statistics stats --out m/config.json", "m/config.json is inside the input m"),
        ("plan m --statistics stats --out data/text.txt", "data/text.txt exists and cfsp did not"),
        ("latency m --out m/config.json", "output m/config.json is inside the input m"),
        ("latency m --out data/text.txt", "output data/text.txt exists and cfsp did not write it"),
        ("report pruned --out pruned/plan.json", "pruned/plan.json is inside the input pruned"),
        ("report pruned --out e.json --evaluation e.json", "output e.json is the input"),
        ("report pruned --out data/text.txt", "output data/text.txt exists and cfsp did not write"),
    ],
)
def test_no_command_writes_to_what_it_reads_or_somebody_else_wrote(
    command: str,
    message: str,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy("pruned/recipe.yaml", "recipe.yaml")
    Path("e.json").write_text('{"model": "m"}')
    Path("alien.gguf").write_bytes(b"GGUF\3\0\0\0somebody else's")
    if "model.gguf" in command and "prune " in command:
        Path("pruned/model.gguf").write_bytes(b"GGUF")
    if command.endswith("pruned/s"):
        shutil.copy("stats", "pruned/s")
    for opener in ("cfsp.api.open_any", "cfsp.recovery.run.open_model", "cfsp.cli.plan.open_any"):
        monkeypatch.setattr(opener, never)
    monkeypatch.setattr("cfsp.checkpoints.exports.open_source", never)
    monkeypatch.setattr("cfsp.cli.report.read_result", never)
    arguments = [*command.split(), "--overwrite"]
    if command.startswith("prune . "):
        monkeypatch.chdir(here / "m")
    check_refusal(capsys, here, list(arguments), message)


def test_a_plan_replaces_a_plan_where_that_is_asked(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (here / "plan.json").read_bytes()
    arguments = [
        "plan",
        "m",
        "--statistics",
        "stats",
        "--out",
        "plan.json",
        "--width-multiple",
        "8",
    ]
    check_refusal(capsys, here, list(arguments), "plan.json exists; --overwrite replaces it")
    assert run(capsys, *arguments, "--overwrite", "--quiet")[0] == 0
    assert (here / "plan.json").read_bytes() != before


def test_statistics_replace_statistics_and_nothing_else(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["calibrate", "m", *SMALL, "--overwrite", "--out"]
    assert run(capsys, *arguments, "stats")[0] == 0
    Path("empty").touch()
    assert run(capsys, *arguments, "empty")[0] == 0
    assert cfsp.load_statistics("empty").blocks
    shutil.copy("m/model.safetensors", "weights")
    check_refusal(capsys, here, [*arguments, "weights"], "weights exists and cfsp did not write it")
    statistics = cfsp.load_statistics("stats")
    for path in ("weights", "m/config.json", "data/text.txt"):
        with pytest.raises(cfsp.CfspError, match=f"{path} exists and cfsp did not write it"):
            cfsp.save_statistics(statistics, path)
        with pytest.raises(cfsp.CfspError, match=f"{path} exists and cfsp did not write it"):
            cfsp.save_plan(cfsp.load_plan("plan.json"), path)


def test_pages_and_pictures_replace_their_like_and_nothing_else(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["report", "pruned", "--png", "pictures"]
    assert run(capsys, *arguments)[0] == 0
    first = contents(here)
    check_refusal(capsys, here, list(arguments), "report.html exists; --overwrite replaces it")
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    assert contents(here).keys() == first.keys()
    Path("pictures/pruned-widths.png").write_bytes(b"\x89PNG\r\n\x1a\nholiday")
    check_refusal(
        capsys, here, [*arguments, "--overwrite"], "pruned-widths.png exists and cfsp did not write"
    )


@pytest.mark.parametrize("what", ["p.json.partial", "r.html.partial", "s.partial"])
def test_a_link_with_a_temporary_name_is_not_followed(
    what: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("target").write_text("precious")
    Path(what).symlink_to("target")
    command = {
        "p": ["plan", "m", "--statistics", "stats", "--out", "p.json"],
        "r": ["report", "pruned", "--out", "r.html"],
        "s": ["calibrate", "m", "--out", "s", *SMALL],
    }[what[0]]
    check_refusal(capsys, here, list(command), f"{what} is in the way")
    assert Path("target").read_text() == "precious"


def test_prune_claims_its_output_before_it_opens_a_model(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def opened(*_: object, **__: object) -> None:
        seen.append(sorted(path.name for path in here.glob("*.partial")))
        raise cfsp.CfspError("seen")

    monkeypatch.setattr("cfsp.api.open_any", opened)
    before = contents(here)
    for model in ("m", make_tiny()):
        for out in (None, "new"):
            with pytest.raises(cfsp.CfspError, match="seen"):
                cfsp.prune(model, make_tokenizer(), out=out, progress=False)
    assert seen == [[], ["new.partial"]] * 2
    assert contents(here) == before


KILL = """
import os, signal, sys
from cfsp.cli.main import main
from cfsp.{module} import {name} as function
def killed(*given, **options):
    os.kill(os.getpid(), signal.SIGKILL)
import cfsp.{module}
setattr(cfsp.{module}, "{name}", killed)
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("command", "module", "name"),
    [
        ("calibrate m --out s", "cli.calibrate", "save_statistics"),
        ("export pruned --to padded --out padded", "checkpoints.exports.padded", "write_settings"),
        ("report pruned --out r.html", "cli.report", "report_html"),
    ],
)
def test_what_a_killed_command_leaves_the_next_one_clears(
    command: str, module: str, name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command.split() + (list(SMALL) if "calibrate" in command else [])
    before = set(os.listdir(here))
    script = [sys.executable, "-c", KILL.format(module=module, name=name), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    out = next(name for name in arguments[arguments.index("--out") + 1 :])
    assert set(os.listdir(here)) - before == {f"{out}.partial"}
    assert run(capsys, *arguments)[0] == 0
    assert set(os.listdir(here)) - before == {out}


def test_two_prunes_at_once_give_one_result_and_one_line(here: Path) -> None:
    arguments = ["prune", "m", "--out", "new", *EXACT, *SMALL, "--overwrite"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "cfsp", *map(str, arguments)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    told = [run.communicate()[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert 0 in codes
    for code, lines in zip(codes, told, strict=True):
        if code:
            assert (code, lines) == (2, "cfsp: error: another run is writing new\n")
    assert json.loads(Path("new/cfsp.json").read_text())["format"] == "cfsp-folder-1"
    assert not Path("new.partial").exists()
    assert cfsp.load("new", device="cpu").config.model_type


def test_the_texts_of_a_plan_are_inputs_too(here: Path) -> None:
    plan = cfsp.load_plan(here / "plan.json")
    calibration = replace(plan.recipe.calibration, dataset="data")
    with pytest.raises(cfsp.CfspError, match="output data/out is inside the input data"):
        cfsp.prune(
            "m",
            out="data/out",
            plan=replace(plan, recipe=replace(plan.recipe, calibration=calibration)),
            progress=False,
        )
