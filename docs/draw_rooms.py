"""Draws docs/images/rooms.svg: the rooms of cfsp and which imports which, from the code itself.

    python docs/draw_rooms.py

FLOORS is the order that tests/end_to_end/test_rooms.py holds the code to.
"""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "rooms.svg"

FLOORS: tuple[dict[str, str], ...] = (
    {"__main__": ""},
    {"cli": "the commands"},
    {"__init__": ""},
    {"api": "calibrate, plan, prune", "auto_classes": ""},
    {"recovery": "training after pruning", "run": "one checked job", "report": "HTML and figures"},
    {"costs": "sizes, time, memory", "checkpoints": "pruned folders, exports"},
    {"pruning": "score, allocate, cut", "evaluation": "perplexity, speed, tasks"},
    {"calibration": "text and statistics"},
    {"models": "layouts, loading, blocks"},
    {"weights": "names, dequantisation"},
    {
        "apportion": "largest remainders",
        "settings": "fields of settings",
        "io": "files, shards, hashes",
        "distributed": "several processes",
        "vllm_plugin": "",
    },
    {"typed": "values by their types"},
    {"errors": "CfspError", "cfsp_kernels": "the Triton ops"},
)
"""The rooms floor by floor, each with what it is for: a room imports only rooms on lower floors.

Rooms without a phrase are doors into the package: they keep the order but are not drawn.
"""

FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def modules() -> dict[str, Path]:
    """The file of every module of cfsp and cfsp_kernels, by dotted name."""
    found = {}
    for package in ("cfsp", "cfsp_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> dict[str, set[str]]:
    """Every module -> the modules of ours that it imports, in functions and for types too."""
    known = modules()
    return {name: set(_imported(name, path, known)) for name, path in known.items()}


def _imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                module = f"{source}.{alias.name}"
                if module in known or source in known:
                    yield module if module in known else source


def room_of(module: str) -> str:
    """The file or folder directly under cfsp/ that a module belongs to."""
    package, *rest = module.split(".")
    return package if package == "cfsp_kernels" else rest[0] if rest else "__init__"


def room_imports() -> dict[str, set[str]]:
    """Every room -> the other rooms that it imports."""
    found: dict[str, set[str]] = {}
    for module, targets in imports().items():
        rooms = found.setdefault(room_of(module), set())
        rooms |= {room_of(target) for target in targets} - {room_of(module)}
    return found


def arrows(rows: list[list[str]]) -> list[tuple[str, str]]:
    """Imports between the rooms of ``rows``, without those that follow from others."""
    drawn = {room for row in rows for room in row}
    graph = {room: targets & drawn for room, targets in room_imports().items() if room in drawn}
    reached: dict[str, set[str]] = {}  # the rooms below each, in any number of steps
    for room in TopologicalSorter(graph).static_order():
        reached[room] = graph[room].union(*(reached[target] for target in graph[room]))
    return [
        (room, target)
        for room, targets in sorted(graph.items())
        for target in sorted(targets)
        if not any(target in reached[other] for other in targets)
    ]


WIDTH, BOX, HEIGHT, FLOOR, GAP, LANE = 800, 168, 48, 84, 20, 12
COLOURS = ("#8250df", "#0969da", "#1a7f37", "#57606a")
"""What is called, what does a job, the method, and the ground: dark enough for white letters, light
enough for a dark page."""
COLOUR_STARTS = ("run", "pruning", "io")
"""Rooms at whose floors the second colour and the next begin."""

STYLE = """
  text { font-family: ui-sans-serif, system-ui, "Segoe UI", sans-serif; fill: #fff; }
  .name { font-size: 15px; font-weight: 600; }
  .phrase { font-size: 12px; }
  path { fill: none; stroke: #7d8590; stroke-width: 1.5; }
  marker path { fill: #7d8590; stroke: none; }
"""

Node = tuple[str, ...]
"""A room, (name,), or an arrow on its way past a row, (from, to, row)."""
Link = tuple[Node, Node]


class Drawing:
    """Where every room and arrow lies."""

    def __init__(self) -> None:
        found = room_imports()
        floors = ([r for r, phrase in floor.items() if phrase and r in found] for floor in FLOORS)
        rooms = [floor for floor in floors if floor]
        row_of = {room: number for number, row in enumerate(rooms) for room in row}
        self.rows: list[list[Node]] = [[(room,) for room in row] for row in rooms]
        self.links: list[Link] = []
        for start, end in arrows(rooms):
            between = range(row_of[start] + 1, row_of[end])
            passing = [(start, end, str(number)) for number in between]
            for number, node in zip(between, passing, strict=True):
                self.rows[number].append(node)
            self.links += pairwise([(start,), *passing, (end,)])
        self.x: dict[Node, float] = {}
        self.y: dict[Node, int] = {}
        for number, row in enumerate(self.rows):
            self._lay_out(number, row)

    def _lay_out(self, number: int, row: list[Node]) -> None:
        """Put each node of a row below what points to it, as far as the others leave room."""

        def wanted(node: Node) -> float:
            above = [self.x[start] for start, end in self.links if end == node]
            return sum(above) / len(above) if above else WIDTH / 2

        row.sort(key=wanted)
        widths = [BOX if len(node) == 1 else LANE for node in row]
        left = (WIDTH - sum(widths) - GAP * (len(row) - 1)) / 2
        for node, width in zip(row, widths, strict=True):
            self.x[node], self.y[node] = left + width / 2, GAP + number * FLOOR
            left += width + GAP

    def _port(self, link: Link, side: int) -> float:
        """Where an arrow meets a box: those at one side of it are spread along that side."""
        node, other = link[side], 1 - side
        if len(node) > 1:
            return self.x[node]
        ends = sorted(self.x[each[other]] for each in self.links if each[side] == node)
        place = (ends.index(self.x[link[other]]) + 0.5) / len(ends)
        return self.x[node] + BOX * 0.7 * (place - 0.5)

    def _arrow(self, link: Link) -> str:
        start, end = link
        arrives = len(end) == 1
        top, bottom = self.y[start] + HEIGHT, self.y[end] - 2 * arrives
        x0, x1, middle = self._port(link, 0), self._port(link, 1), (top + bottom) / 2
        line = f"M{x0:.1f} {top}C{x0:.1f} {middle:g} {x1:.1f} {middle:g} {x1:.1f} {bottom}"
        if arrives:
            return f'<path d="{line}" marker-end="url(#tip)"/>'
        return f'<path d="{line}v{HEIGHT}"/>'

    def _box(self, node: Node) -> str:
        (room,), x, y = node, self.x[node], self.y[node]
        floor = FLOOR_OF[room]
        colour = COLOURS[sum(floor >= FLOOR_OF[start] for start in COLOUR_STARTS)]
        return (
            f'<rect x="{x - BOX / 2:g}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="8" '
            f'fill="{colour}"/>'
            f'<text x="{x:g}" y="{y + 20}" text-anchor="middle" class="name">{room}</text>'
            f'<text x="{x:g}" y="{y + 38}" text-anchor="middle" class="phrase">'
            f"{FLOORS[floor][room]}</text>"
        )

    def svg(self) -> str:
        height = (len(self.rows) - 1) * FLOOR + HEIGHT + 2 * GAP
        parts = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            "<title>The rooms of cfsp and their imports</title>",
            f"<style>{STYLE}</style>",
            '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
            'markerHeight="6" orient="auto"><path d="M0 0L8 4L0 8z"/></marker>',
            *map(self._arrow, self.links),
            *(self._box(node) for row in self.rows for node in row if len(node) == 1),
            "</svg>",
        )
        return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(Drawing().svg())
