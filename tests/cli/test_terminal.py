"""What reaches the terminal: one line for a warning, nothing that moves a cursor, good guesses."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cfsp.errors import printable
from cfsp.models.loading import folder_name

from ..conftest import TEXT
from .test_cli import run

SMALL = ["--dataset", TEXT, "--samples", 4, "--seqlen", 32, "--eval-windows", 0, "--device", "cpu"]
CONTROLS = [
    "a\x1b[31mred",
    "b\x07ell",
    "c\nline",
    "d\x9b2J",
    "e\u202egnp",
    "f\u2066x\x7f",
    "[bold]",
]


@pytest.mark.parametrize("name", CONTROLS)
def test_names_are_shown_by_their_escapes(
    name: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, out = tmp_path / name, tmp_path / f"{name}-out"
    shutil.copytree(tiny_folder, dense)
    speed = ["--speed", "--rounds", 1, "--new-tokens", 2, "--prompt-tokens", 4, "--windows", 0]
    for arguments in (
        ["prune", dense, "--out", out, *SMALL, "--width-multiple", 1],
        ["prune", dense, "--dry-run", *SMALL[:-4]],
        ["evaluate", dense, out, *speed],
        ["export", out, "--to", "padded", "--out", tmp_path / f"{name}-padded"],
        ["report", out, "--out", tmp_path / f"{name}.html"],
        ["evaluate", tmp_path / f"{name}-absent"],
        ["prune", dense, "--out", out, "--scorer", name],
    ):
        code, printed, told = run(capsys, *arguments)
        assert code in (0, 2)
        assert all(letter.isprintable() or letter in "\n\r" for letter in printed + told)
    code, printed, _ = run(capsys, "evaluate", dense, out, *speed)
    assert printable(name)[:6] in printed


@pytest.mark.parametrize("option", ["--out", "--dataset", "--recipe"])
def test_names_that_are_not_utf8_are_refused_at_once(
    option: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, told = run(capsys, "prune", tiny_folder, option, os.fsdecode(b"x\xff\xfe"))
    assert (code, told) == (2, "cfsp: error: x\\udcff\\udcfe is not UTF-8\n")


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_a_warning_is_one_line(
    quiet: list[str], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = ["--width-multiple", 48, "--sparsity", 0.05]
    code, _, told = run(
        capsys, "prune", tiny_folder, "--out", tmp_path / "o", *SMALL, *wide, *quiet
    )
    warned = [line for line in told.splitlines() if "warn" in line.lower()]
    assert code == 0
    assert warned[0].startswith(
        "cfsp: warning: the plan removes nothing, in multiples of 48; a smal"
    )
    assert "--width-multiple" in warned[0]
    assert all(line.startswith("cfsp: warning: ") for line in warned)
    assert "cfsp/" not in told.replace(str(tmp_path), "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--sparsity", 0.3, "--width-multiple", 24],
            "removes 25.00% of the FFN channels, not 30.0",
        ),
        (
            ["--sparsity", 0.1, "--width-multiple", 24],
            "removes 12.50% of the FFN channels, not 10.0",
        ),
        (["--sparsity", 0, "--width-multiple", 1], "removes nothing, in multiples of 1\n"),
        (
            ["--sparsity", 0.02, "--width-multiple", 16, "--uniform"],
            "removes nothing, in multiples",
        ),
        (["--sparsity", 0.3, "--width-multiple", 1], None),
        (["--sparsity", 0.25, "--width-multiple", 24], None),
    ],
)
def test_a_plan_that_misses_its_sparsity_says_so(
    options: list[object],
    said: str | None,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stats = tmp_path / "s.safetensors"
    text = ["--dataset", TEXT, "--samples", 4, "--seqlen", 32, "--scorer", "cfsp", "--quiet"]
    assert run(capsys, "calibrate", tiny_folder, "--out", stats, *text)[0] == 0
    made = ["--out", tmp_path / "plan.json", "--scorer", "cfsp", "--quiet"]
    code, _, told = run(capsys, "plan", tiny_folder, "--statistics", stats, *made, *options)
    assert code == 0
    assert said in told if said else "warning" not in told
    if said and "nothing" in said:
        out = ["--out", tmp_path / "o", "--quiet", "--eval-windows", 0]
        code, _, told = run(capsys, "prune", tiny_folder, "--plan", tmp_path / "plan.json", *out)
        assert (code, said in told) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["prune", "m", "--sparcity", "0.3"],
            "unknown option --sparcity (did you mean --sparsity?)",
        ),
        (["prune", "m", "--ouput=x"], "unknown option --ouput (did you mean --out?)"),
        (["evaluate", "m", "--window", "2", "--sped"], "--sped (did you mean --speed?)"),
        (["recover", "m", "--step-count", "2"], "unknown option --step-count"),
        (
            ["prune", "m", "--out", "o", "--scorer", "wanda_sp"],
            "'wanda_sp' (did you mean wanda-sp?)",
        ),
        (
            ["prune", "m", "--out", "o", "--allocator", "serch"],
            "'serch' (did you mean search?); val",
        ),
        (
            ["prune", "m", "--out", "o", "--importance", "angle"],
            "'angle' (did you mean angular?); valid: ",
        ),
        (
            ["export", "m", "--out", "o", "--to", "paded"],
            "'paded' (did you mean padded?); valid: ",
        ),
    ],
)
def test_the_nearest_name_is_suggested(
    arguments: list[str], said: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [tiny_folder if argument == "m" else argument for argument in arguments]
    code, _, told = run(capsys, *given)
    assert code == 2
    assert said in told
    assert len(told.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "SmolLM2", "--out", "o"],
        ["evaluate", "pruned-3"],
        ["prune", "someone/absent", "--dry-run"],
        ["calibrate", "some one", "--out", "o"],
        ["export", "absent", "--to", "padded", "--out", "o"],
    ],
)
def test_a_model_that_is_nowhere_is_told_at_once(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    started = time.perf_counter()
    code, _, told = run(capsys, *arguments)
    assert time.perf_counter() - started < 5
    assert code == 2
    message = f"cfsp: error: no folder {arguments[1]} here, and cannot load it from the hub: "
    assert told.splitlines()[-1].startswith(message)
    assert not list(tmp_path.iterdir())


def test_where_there_is_no_network_nothing_is_tried_again(tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "cfsp", "evaluate", "someone/absent"],
        capture_output=True,
        text=True,
        timeout=20,  # transformers alone tries for longer
        env={**os.environ, **nowhere},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "cfsp: error: no folder someone/absent here, and cannot load it from the hub: "
        "it cannot be reached\n"
    )


@pytest.mark.parametrize("name", ["nothere/", "./nothere", "~/nothere", "a/b/c"])
def test_a_path_is_no_hub_id(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, told = run(capsys, "evaluate", name)
    assert (code, told) == (2, f"cfsp: error: no such model folder: {name}\n")


@pytest.mark.parametrize(
    "given", [".", "./", "../tiny", "sub/..", "../link", "../link/", "../tiny/."]
)
def test_a_model_is_called_by_its_folder(
    given: str,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tiny_folder / "sub").mkdir()
    (tmp_path / "link").symlink_to(tiny_folder)
    monkeypatch.chdir(tiny_folder)
    options = ["--out", tmp_path / "o", *SMALL, "--width-multiple", 1, "--quiet"]
    assert run(capsys, "prune", given, *options)[0] == 0
    name = "link" if "link" in given else tiny_folder.name
    assert folder_name(Path(given)) == name
    document = yaml.safe_load((tmp_path / "o" / "recipe.yaml").read_text())
    assert document["provenance"]["model"] == name
    assert f"\nbase_model: {name}\n" in (tmp_path / "o" / "README.md").read_text()
