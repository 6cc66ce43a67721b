"""Where results may go, and that nothing of anybody's is lost, whatever happens meanwhile."""

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from cfsp.errors import CfspError, Stopped
from cfsp.io import outputs
from cfsp.io.files import whole_file
from cfsp.io.outputs import MANIFEST, new_file, new_folder
from cfsp.io.places import OURS

ROOT = Path(__file__).resolve().parents[2]
PAGE = '<!doctype html>\n<meta name="generator" content="cfsp">\n'


def everything(folder: Path) -> dict[str, str]:
    """What is below a folder, and what it says or leads to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            found[name] = path.read_bytes().decode("latin-1") if path.is_file() else ""
    return found


def put(folder: Path, text: str = "new") -> None:
    (folder / "model").write_text(text)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights").write_text(text)


def result(out: Path, text: str = "old", **options: bool) -> Path:
    with new_folder(out, **{"overwrite": False, **options}) as folder:
        put(folder, text)
    return out


def during(entered: AbstractContextManager[Path], work: Callable[[Path], object]) -> None:
    """A run that does this."""
    with entered as place:
        work(place)


def raises(error: BaseException) -> Callable[[Path], None]:
    def work(_: Path) -> None:
        raise error

    return work


def refused(message: str, entered: AbstractContextManager[Path], beside: Path) -> None:
    """In one line, before the work, with everything left as it was."""
    before = everything(beside)
    with pytest.raises(CfspError, match=message) as told:
        during(entered, raises(AssertionError("the work began")))
    assert "\n" not in str(told.value)
    assert everything(beside) == before


def test_a_result_lists_what_is_in_it_and_nothing_else_stays(tmp_path: Path) -> None:
    out = result(tmp_path / "a" / "b" / "out")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    marker = json.loads((out / "cfsp.json").read_text())
    files = ["adapter/weights", "model"]
    assert (marker["format"], sorted(marker["files"])) == ("cfsp-folder-1", files)
    other = result(tmp_path / "other")
    assert everything(other) == everything(out)


@pytest.mark.parametrize("change", [b"new", b"longer than it was", b""])
def test_what_was_changed_since_is_not_replaced(change: bytes, tmp_path: Path) -> None:
    out = result(tmp_path / "out")
    before = (out / "model").read_bytes()
    (out / "model").write_bytes(change)
    refused("holds model, which has changed since cfsp wrote it", new_folder(out, True), tmp_path)
    (out / "model").write_bytes(before)
    result(out, "new", overwrite=True)


def test_a_strangers_file_in_an_interrupted_run_stays(tmp_path: Path) -> None:
    def begin(folder: Path) -> None:
        (folder.parent / MANIFEST).parent.mkdir()
        (folder.parent / MANIFEST).write_text("{}")
        raise Stopped

    with pytest.raises(Stopped):
        during(new_folder(tmp_path / "out", False), begin)
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    for options in ({"overwrite": True}, {"overwrite": False, "resume": True}):
        refused("out.partial is in the way", new_folder(tmp_path / "out", **options), tmp_path)


@pytest.mark.parametrize("make", [new_folder, new_file])
def test_an_error_leaves_nothing_not_even_folders_above(
    make: Callable[..., AbstractContextManager[Path]], tmp_path: Path
) -> None:
    for error in (RuntimeError("defect"), KeyboardInterrupt(), Stopped(), CfspError("bad")):
        with pytest.raises(type(error)):
            during(make(tmp_path / "a" / "b" / "out", False), raises(error))
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (".", "is or holds the current directory"),
        ("", "is or holds the current directory"),
        ("..", "is or holds the current directory"),
        ("/", "holds the input"),
        ("here", "is or holds the current directory"),
        ("model", "is the input; choose another folder"),
        ("alias", "is the input; choose another folder"),
        ("model/sub/out", "is inside the input"),
        ("alias/out", "is inside the input"),
        ("around", "holds the input"),
        ("x.partial", r"\.partial is for results under way"),
        ("other.partial/result/out", r"\.partial is for results under way"),
        ("loop", "is a link that leads back to itself"),
        ("caf\udce9", "expected a path in UTF-8"),
        ("nul\0", "expected a path in UTF-8"),
        ("text.txt", "exists and is not a folder"),
        ("text.txt/out", "cannot write .*text.txt"),
        ("x" * 250, "cannot write .*File name too long"),
        ("mounted", "is a mount point"),
        ("new", "cannot write .*Read-only file system"),
    ],
)
def test_places_that_cannot_be_are_refused_before_the_work(
    out: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here/below", "model/sub", "around/a/b", "mounted", "other.partial/result"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("text.txt", "model/config.json", "around/a/b/text.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "other.partial" / "cfsp.json").write_text('{"format": "cfsp-staging-1"}')
    (tmp_path / "alias").symlink_to("model")
    (tmp_path / "loop").symlink_to("pool")
    (tmp_path / "pool").symlink_to("loop")
    below = "here/below" if out in ("here", "..") else "here" if len(out) < 2 else "."
    monkeypatch.chdir(tmp_path / below)
    place = Path(out) if below != "." and out != "here" else tmp_path / out
    mounted, mkdir = tmp_path / "mounted", Path.mkdir

    def make(path: Path, *given: object, **options: object) -> None:
        if path.name == "new.partial":
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        mkdir(path, *given, **options)

    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == mounted)
    monkeypatch.setattr(Path, "mkdir", make)
    inputs = [tmp_path / "model", str(tmp_path / "around/a/b/text.txt"), "someone/on-the-hub", None]
    for overwrite in (False, True):
        refused(message, new_folder(place, overwrite, inputs=inputs), tmp_path)


def test_an_input_is_no_output_by_another_path_either(tmp_path: Path) -> None:
    stats, folder = tmp_path / "stats", tmp_path / "folder"
    stats.write_text("")  # what may be replaced if it is no input
    os.link(stats, tmp_path / "hard")
    (tmp_path / "soft").symlink_to("stats")
    folder.mkdir()
    (folder / "plan.json").symlink_to(stats)
    for name in ("stats", "hard", "soft", "folder/../stats"):
        for given in (stats, tmp_path / "soft", folder):
            message = "is inside the input" if given == folder else "is the input; choose another"
            refused(message, new_file(tmp_path / name, True, [given]), tmp_path)


@pytest.mark.parametrize("links", [["out"], ["out", "middle"], ["out", "far/away/middle"]])
@pytest.mark.parametrize("dangles", [True, False])
def test_a_result_goes_where_links_lead(links: list[str], dangles: bool, tmp_path: Path) -> None:
    real = tmp_path / "disk" / "real"
    if not dangles:
        real.mkdir(parents=True)
    for link, goal in zip(links, [*links[1:], "disk/real"], strict=True):
        (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / link).symlink_to(tmp_path / goal)
    result(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert (real / "model").read_text() == "old"
    result(tmp_path / "out", "new", overwrite=True)
    assert (real / "model").read_text() == "new"
    assert [path.name for path in real.parent.iterdir()] == ["real"]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_file_goes_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "page.html").symlink_to("real/page.html")
    for text in (PAGE, PAGE + "again"):
        with new_file(tmp_path / "page.html", overwrite=True) as file:
            file.write_text(text)
        assert (tmp_path / "page.html").is_symlink()
        assert (tmp_path / "real" / "page.html").read_text() == text
    assert sorted(everything(tmp_path)) == ["page.html", "real", "real/page.html"]


@pytest.mark.parametrize(
    "name", ["thesis.tex", ".hidden", "adapter/mine", "notes/", "deep/er/notes", "link"]
)
def test_a_folder_with_anything_of_somebody_elses_is_not_replaced(
    name: str, tmp_path: Path
) -> None:
    out = result(tmp_path / "out")
    if name.endswith("/"):
        (out / name).mkdir()
    elif name == "link":
        (out / name).symlink_to(tmp_path)
    else:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    message = f"holds {name.rstrip('/')}, which cfsp did not write"
    for overwrite in (False, True):
        refused(message, new_folder(out, overwrite), tmp_path)


@pytest.mark.parametrize(
    "marker", ["", "{", "[]", '{"files": ["model"]}', "[" * 100_000, '{"format": "cfsp-folder-1"}']
)
def test_a_folder_that_proves_nothing_is_not_replaced(marker: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "cfsp.json").write_text(marker)
    refused("holds cfsp.json, which cfsp did not write", new_folder(out, True), tmp_path)
    (out / "cfsp.json").unlink()
    (out / "model").write_text("x")
    refused("holds model, which cfsp did not write", new_folder(out, True), tmp_path)


def test_one_of_ours_and_an_empty_one_are_replaced_only_where_that_is_asked(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (result(tmp_path / "out"), tmp_path / "empty"):
        refused("exists; `overwrite=True` replaces it", new_folder(out, False), tmp_path)
        result(out, "new", overwrite=True)
        assert (out / "model").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


@pytest.mark.parametrize(
    "content",
    [
        b"x",
        b'{"model_type": "llama"}',
        b"\0" * 5000,
        b"GGUF\3\0\0\0" + b"general.architecture" * 9,
        b'X\0\0\0\0\0\0\0{"__metadata__":{"format":"pt"},"a":',
        b"\x89PNG\r\n",
        b"<!doctype html>\n<p>",
    ],
)
def test_a_file_of_somebody_elses_is_not_replaced(content: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(content)
    for overwrite in (False, True):
        refused("exists and cfsp did not write it", new_file(out, overwrite), tmp_path)


def test_files_that_begin_as_ours_do_and_empty_ones_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for content in (PAGE, "", '{\n "format": "cfsp-plan-1",\n'):
        out.write_text(content)
        refused("exists; `overwrite=True` replaces it", new_file(out, False), tmp_path)
        with new_file(out, True) as file:
            file.write_text("new")
        assert everything(tmp_path) == {"out": "new"}
    assert OURS.match(b"say: cfsp") is None


@pytest.mark.parametrize("what", ["file", "link", "dangling", "folder", "result", "forged"])
@pytest.mark.parametrize("make", [new_folder, new_file])
def test_what_has_the_name_of_the_staging_folder_is_not_touched(
    what: str, make: Callable[..., AbstractContextManager[Path]], tmp_path: Path
) -> None:
    partial, target = tmp_path / "out.partial", tmp_path / "target"
    target.mkdir()
    if what == "file":
        partial.write_text("mine")
    elif what in ("link", "dangling"):
        partial.symlink_to(target if what == "link" else tmp_path / "nowhere")
    elif what == "result":
        result(tmp_path / "x").rename(partial)
    else:
        partial.mkdir()
        (partial / "mine").write_text("mine")
        (partial / "cfsp.json").write_text("{" if what == "forged" else '{"format": "mine"}')
    for overwrite in (False, True):
        refused("is in the way", make(tmp_path / "out", overwrite), tmp_path)


def test_an_empty_staging_folder_is_no_objection(tmp_path: Path) -> None:
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "cfsp.json").touch()  # killed before it said what it is
    for name in ("a", "b"):
        result(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@contextmanager
def process(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Python with the names of this page; it prints a line when it is where it is to be."""
    prelude = (
        "import os, sys, time, signal, errno\nfrom pathlib import Path\n"
        "from cfsp.errors import CfspError, Stopped\nfrom cfsp.io import outputs\n"
        "from cfsp.io.outputs import new_file, new_folder\n"
        f"PAGE = {PAGE!r}\nout = Path(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", prelude + script, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    with run:
        try:
            yield run
        finally:
            run.kill()


WAITING = """
with new_folder(out, False) as folder:
    (folder / "model").write_text("theirs")
    print("begun", flush=True)
    sys.stdin.readline()
"""


def test_a_second_run_is_refused_at_once_and_harms_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with process(WAITING, out) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "begun\n"
        for overwrite in (False, True):
            for make in (new_folder(out, overwrite), new_file(out, overwrite)):
                refused("another run is writing", make, tmp_path)
        refused("another run is writing", new_folder(out, True, resume=True), tmp_path)
        first.communicate("go\n")
        assert first.returncode == 0
    assert (out / "model").read_text() == "theirs"
    assert not (tmp_path / "out.partial").exists()


TOGETHER = """
while not (out.parent / "go").exists():
    time.sleep(0.001)
try:
    with (new_folder if sys.argv[2] == "folder" else new_file)(out, True) as place:
        (place / "model" if sys.argv[2] == "folder" else place).write_text(PAGE + sys.argv[3])
        time.sleep(1)
except CfspError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_of_runs_that_start_together_one_wins(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        process(TOGETHER, out, kind, 1) as a,
        process(TOGETHER, out, kind, 2) as b,
        process(TOGETHER, out, kind, 3) as c,
    ):
        time.sleep(0.5)
        (tmp_path / "go").touch()
        told = [run.communicate()[0] for run in (a, b, c)]
        codes = [run.returncode for run in (a, b, c)]
    assert sorted(codes) == [0, 2, 2]
    winner = codes.index(0)
    assert all(told[n].startswith("another run is writing") for n in range(3) if n != winner)
    text = (out / "model" if kind == "folder" else out).read_text()
    assert text == f"{PAGE}{winner + 1}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["go", "out"]


def test_a_run_goes_on_without_locks_where_the_file_system_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    result(tmp_path / "out")
    result(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "model").read_text() == "new"


KILLED = """
CALLS = ("mkdir", "open", "rename", "replace", "unlink", "rmdir", "fsync", "listdir", "scandir")
exchange = outputs._renamed if sys.argv[2] == "exchange" else lambda *_: False
kind = sys.argv[3]

def make(moment):
    # A process that dies at its nth call of these.
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    calls = 0
    def counted(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    outputs._renamed = counted(exchange)
    with (new_folder if kind == "folder" else new_file)(out, True) as place:
        if kind == "folder":
            for name in "abc":
                (place / name).write_text("new")
        else:
            place.write_text(PAGE + "new")
    os._exit(calls % 256)

def content():
    if kind == "file":
        return out.read_text().replace(PAGE, "") if out.exists() else None
    texts = {name: (out / name).read_text() for name in "abc"} if out.exists() else {None: None}
    (text,) = set(texts.values())  # whole, whichever it is
    return text

def begin():
    with (new_folder if kind == "folder" else new_file)(out, True) as place:
        for file in [place / name for name in "abc"] if kind == "folder" else [place]:
            file.write_text("old" if kind == "folder" else PAGE + "old")

begin()
absent = 0
total = make(0)
for moment in range(1, total + 1):
    begin()
    assert make(moment) == -signal.SIGKILL, moment
    was = content()
    absent += was is None
    assert {path.name for path in out.parent.iterdir()} <= {"out", "out.partial"}, moment
    assert was in ("old", "new") or exchange is not outputs._renamed, (moment, was)
    if was is None:  # a run that is refused, or fails, puts it back
        try:
            with new_folder(out, False):
                pass
        except CfspError:
            pass
        assert content() == "old", moment
        assert [path.name for path in out.parent.iterdir()] == ["out"], moment
    make(0)
    assert content() == "new" and [p.name for p in out.parent.iterdir()] == ["out"], moment
print(total, absent)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("way", ["exchange", "renames"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_killed_at_any_moment_the_old_result_or_the_new_one_is_there(
    way: str, kind: str, tmp_path: Path
) -> None:
    with process(KILLED, tmp_path / "out", way, kind) as run:
        printed, _ = run.communicate()
    assert run.returncode == 0
    total, absent = map(int, printed.split())
    assert total > 15
    assert absent == (1 if (way, kind) == ("renames", "folder") else 0)


def begun(folder: Path) -> None:
    """What makes a run one that can be resumed."""
    (folder.parent / MANIFEST).parent.mkdir(exist_ok=True)
    (folder.parent / MANIFEST).write_text("{}")


@pytest.mark.parametrize("way", ["exchange", "second rename", "first rename"])
@pytest.mark.parametrize("resumable", [False, True])
def test_where_the_new_result_cannot_take_its_place_the_old_one_keeps_it(
    way: str, resumable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = result(tmp_path / "out")
    before = everything(out)
    rename = os.rename
    left = iter(["first rename", "second rename"])

    def fail(*_: object) -> bool:
        raise OSError(errno.EBUSY, "Device or resource busy")

    def renamed(source: Path, goal: Path) -> None:
        if next(left, None) == way:
            fail()
        rename(source, goal)

    def work(folder: Path) -> None:
        if resumable:
            begun(folder)
        put(folder)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "_renamed", fail if way == "exchange" else lambda *_: False)
        patch.setattr(os, "rename", renamed)
        with pytest.raises(CfspError, match=r"cannot write .*busy"):
            during(new_folder(out, True), work)
    assert everything(out) == before
    partial = tmp_path / "out.partial"
    assert partial.exists() == resumable
    if resumable:
        assert (partial / "result" / "model").read_text() == "new"
        with new_folder(out, True, resume=True):
            pass
        assert (out / "model").read_text() == "new"
        assert not partial.exists()


def test_what_appears_while_a_run_works_is_not_replaced(tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "page"

    def work(folder: Path) -> None:
        put(folder)
        out.mkdir(exist_ok=True)
        (out / "thesis.tex").write_text("mine")

    def write(file: Path) -> None:
        file.write_text(PAGE)
        page.write_text("mine")

    for overwrite in (False, True):
        out.mkdir(exist_ok=overwrite)
        (out / "thesis.tex").unlink(missing_ok=True)
        if not overwrite:
            out.rmdir()
        with pytest.raises(CfspError, match=r"holds thesis\.tex, which cfsp did not write"):
            during(new_folder(out, overwrite), work)
        assert everything(tmp_path) == {"out": "", "out/thesis.tex": "mine"}
    with pytest.raises(CfspError, match="cfsp did not write it"):
        during(new_file(page, True), write)
    assert page.read_text() == "mine"


def half(folder: Path) -> None:
    """A run that is stopped when it has begun."""
    begun(folder)
    (folder / "model").write_text("half")
    raise Stopped


def test_an_interrupted_run_stays_until_it_is_resumed_or_overwritten(tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(Stopped):
        during(new_folder(out, False), half)
    refused(r"out\.partial is an interrupted run", new_folder(out, False), tmp_path)
    refused(r"out\.partial is an interrupted run", new_file(out, False), tmp_path)
    with pytest.raises(CfspError, match="bad"):
        during(new_folder(out, False, resume=True), raises(CfspError("bad")))
    assert (partial / "result" / "model").read_text() == "half"
    with new_folder(out, False, resume=True) as folder:
        (folder / "model").write_text("whole")
    assert sorted(everything(out)) == ["cfsp.json", "model"]
    assert not partial.exists()
    with pytest.raises(Stopped):
        during(new_folder(out, True), half)
    result(out, "new", overwrite=True)
    assert (out / "adapter" / "weights").read_text() == "new"
    assert not partial.exists()


def test_a_link_in_place_of_a_result_to_resume_is_not_followed(tmp_path: Path) -> None:
    out, elsewhere, staged = tmp_path / "out", tmp_path / "elsewhere", tmp_path / "out.partial"
    elsewhere.mkdir()
    with pytest.raises(Stopped):
        during(new_folder(out, False), half)
    (staged / "result").rename(tmp_path / "aside")
    (staged / "result").symlink_to(elsewhere)
    result(out, "new", resume=True)
    assert not list(elsewhere.iterdir())
    assert (out / "model").read_text() == "new"


def test_errors_of_other_files_are_not_told_as_the_outputs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    full = OSError(errno.ENOSPC, "No space left on device")
    for work, error, message in (
        (lambda _: (tmp_path / "model.json").read_text(), FileNotFoundError, "model.json"),
        (raises(full), CfspError, "cannot write .*out: .*No space left"),
        (lambda folder: folder.write_text("x"), CfspError, "cannot write .*out: .*Is a directory"),
        (raises(OSError("the hub is down")), OSError, "^the hub is down"),
    ):
        with pytest.raises(error, match=message):
            during(new_folder(out, False), work)
        assert not list(tmp_path.iterdir())


def test_modes_are_what_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        out = result(tmp_path / "out")
        with new_file(tmp_path / "page", False) as file:
            file.write_text(PAGE)
        with whole_file(tmp_path / "small") as file:
            file.write_text("x")
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o750
    for file in (out / "cfsp.json", tmp_path / "page", tmp_path / "small"):
        assert file.stat().st_mode & 0o777 == 0o640


def test_a_small_file_is_written_whole_under_a_name_that_cannot_be_guessed(tmp_path: Path) -> None:
    out, names = tmp_path / "plan.json", set()
    for turn in range(3):
        with whole_file(out) as file:
            names.add(file.name)
            file.write_text(f"{turn}")
            assert not out.exists() or out.read_text() == f"{turn - 1}"
    assert len(names) == 3
    assert all(re.fullmatch(r"\.cfsp-[0-9a-f]{16}", name) for name in names)
    with pytest.raises(KeyboardInterrupt):
        during(whole_file(out), raises(KeyboardInterrupt()))
    assert everything(tmp_path) == {"plan.json": "2"}
