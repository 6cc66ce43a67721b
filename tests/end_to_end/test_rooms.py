"""The order of the rooms: docs/draw_rooms.py states it, and draws it."""

import importlib.util
import re
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import cfsp

ROOT = Path(__file__).resolve().parents[2]
SPECIFICATION = importlib.util.spec_from_file_location("draw_rooms", ROOT / "docs/draw_rooms.py")
assert SPECIFICATION is not None
assert SPECIFICATION.loader is not None
rooms = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(rooms)

IMPORTS = rooms.imports()
FILES = sorted((ROOT / "cfsp").rglob("*.py"))


def test_every_room_has_a_floor() -> None:
    assert {rooms.room_of(module) for module in IMPORTS} <= set(rooms.FLOOR_OF)


def test_a_room_imports_only_rooms_on_lower_floors() -> None:
    floor_of, room_of = rooms.FLOOR_OF, rooms.room_of
    climbs = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in sorted(targets)
        if room_of(module) != room_of(target)
        and floor_of[room_of(target)] <= floor_of[room_of(module)]
    ]
    assert not climbs


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_files_have_300_lines_at_most_and_folders_20_files() -> None:
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in FILES}
    assert not {path: count for path, count in lines.items() if count > 300}
    files = Counter(str(path.parent.relative_to(ROOT)) for path in FILES)
    assert not {folder: count for folder, count in files.items() if count > 20}


def test_no_public_name_is_that_of_a_module() -> None:
    beside = {path.stem for path in (ROOT / "cfsp").iterdir() if path.name[0] not in "._"}
    assert not beside & set(cfsp.__all__)


def test_the_picture_is_what_the_imports_say() -> None:
    assert rooms.PICTURE.read_text() == rooms.Drawing().svg(), "python docs/draw_rooms.py"


def test_the_page_has_every_room_and_pages_name_files_that_exist() -> None:
    architecture = (ROOT / "docs/architecture.md").read_text()
    rows = set(re.findall(r"^\| `(\w+)` \|", architecture, flags=re.MULTILINE))
    assert rows == {room for floor in rooms.FLOORS for room, phrase in floor.items() if phrase}
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        named = re.findall(r"\b(?:cfsp|cfsp_kernels|tests|docs)/[\w/]+\.py\b", page.read_text())
        assert [path for path in named if not (ROOT / path).exists()] == [], page.name
