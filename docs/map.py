"""Draws the rooms of the package from its imports, and counts what is in them.

    python docs/map.py            # docs/map.md, with the drawing made anew
    python docs/map.py --sizes    # files, lines, functions, importers and floors, as a table
    python docs/map.py --sizes --root ../other-checkout

A room is a folder of modules, or a module that lies beside the folders. A room imports only rooms on lower floors: its
floor is one more than the highest floor that it imports from. Imports inside functions and for type checkers count.
What an ``__init__.py`` imports for type checkers does not: it is there only when it is first used.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- drawn by docs/map.py -->\n```text\n", "```\n<!-- end -->"
WIDTH = 100

Graph = Mapping[str, set[str]]


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package by its dotted name. The folder ``kernels`` is installed as ``kdfast.kernels``."""
    found = {}
    for path in sorted([*(root / "kdfast").rglob("*.py"), *(root / "kernels").glob("*.py")]):
        parts = path.relative_to(root).with_suffix("").parts
        parts = ("kdfast", *parts) if parts[0] == "kernels" else parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path = ROOT) -> dict[str, set[str]]:
    """The modules that each module imports."""
    known = modules(root)
    return {name: set(_imported(name, path, known)) - {name} for name, path in known.items()}


def _imported(name: str, path: Path, known: Mapping[str, Path]) -> Iterable[str]:
    for node in _nodes(ast.parse(path.read_text("utf-8")), skip_type_checking=path.name == "__init__.py"):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}:{node.lineno}: imports are absolute")
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from [module for module in (inner, node.module) if module in known][:1]


def _nodes(tree: ast.AST, *, skip_type_checking: bool) -> Iterable[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if skip_type_checking and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _nodes(child, skip_type_checking=skip_type_checking)


def room_of(module: str, known: Mapping[str, Path]) -> str:
    """The folder that a module lies in, or the module itself beside folders; "kdfast" and "cache" are the doors."""
    parent = module.rpartition(".")[0]
    is_folder = known[module].name == "__init__.py"
    holds_folders = {name.rpartition(".")[0] for name, path in known.items() if path.name == "__init__.py"}
    room = module if is_folder or parent in holds_folders else parent
    return room.removeprefix("kdfast.")


def rooms(root: Path = ROOT) -> dict[str, set[str]]:
    """The rooms that each room imports from."""
    known = modules(root)
    where = {module: room_of(module, known) for module in known}
    graph: dict[str, set[str]] = {room: set() for room in where.values()}
    for module, targets in imports(root).items():
        graph[where[module]] |= {where[target] for target in targets}
    return {room: targets - {room} for room, targets in graph.items()}


def circle(graph: Graph) -> list[str]:
    """Names that import each other in a circle, the first one again at the end. Empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def floors(graph: Graph) -> dict[str, int]:
    """The floor of every name: 0 for what imports nothing of the package.

    Raises:
        graphlib.CycleError: there is a circle.
    """
    floor: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        floor[name] = max((floor[target] + 1 for target in graph[name]), default=0)
    return floor


# ---- the drawing ----------------------------------------------------------------------------------------------------


def drawing(root: Path = ROOT) -> str:
    """The floors from the top down; each room with its number of files and the first sentence of its docstring."""
    known = modules(root)
    files: dict[str, int] = defaultdict(int)
    about: dict[str, str] = {}
    for module, path in known.items():
        room = room_of(module, known)
        files[room] += 1
        if room == module.removeprefix("kdfast."):
            text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
            about[room] = " ".join(text.split("\n\n")[0].replace("``", "").split()).rstrip(":")
    height = floors(rooms(root))
    lines, wide = [], max(map(len, files))
    for floor in range(max(height.values()), -1, -1):
        here = sorted(room for room in files if height[room] == floor)
        for number, room in enumerate(here):
            label = f"{'' if number else floor:>2} | {room:{wide}} {files[room]:>3}  "
            blank = f"   | {'':{wide}}      "
            lines += textwrap.wrap(label + about[room], WIDTH, subsequent_indent=blank, break_on_hyphens=False)
        lines.append("---+" + "-" * (WIDTH - 4))
    return "\n".join(lines) + "\n"


def page(root: Path = ROOT) -> str:
    """docs/map.md with the drawing of today's imports."""
    text = (root / "docs" / "map.md").read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + drawing(root) + END + after


# ---- the sizes ------------------------------------------------------------------------------------------------------


def sizes(root: Path = ROOT) -> dict[str, str]:
    """Counts of the package: files, lines, functions without their docstrings, importers, folders and floors."""
    known, graph = modules(root), imports(root)
    importers: dict[str, int] = dict.fromkeys(known, 0)
    for targets in graph.values():
        for target in targets:
            importers[target] += 1
    lines = [len(path.read_text("utf-8").splitlines()) for path in known.values()]
    bodies = sorted(body for path in known.values() for body in _bodies(path))
    folders: dict[Path, int] = defaultdict(int)
    for path in known.values():
        folders[path.parent] += 1
    fullest = max(folders, key=lambda folder: folders[folder])
    house = rooms(root)
    height = "a circle" if circle(house) else f"{max(floors(house).values()) + 1}"
    return {
        "files": f"{len(known)}",
        "lines": f"{sum(lines):,}",
        "lines of a file, median / largest": f"{statistics.median(lines):.0f} / {max(lines)}",
        "functions": f"{len(bodies):,}",
        "lines of a function's body, median / 90 % / largest": (
            f"{statistics.median(bodies):.0f} / {bodies[len(bodies) * 9 // 10]} / {bodies[-1]}"
        ),
        "modules with exactly one importer": f"{sum(count == 1 for count in importers.values())}",
        "fullest folder": f"{fullest.relative_to(root)}, {folders[fullest]} files",
        "rooms / floors / imports between rooms": f"{len(house)} / {height} / {sum(map(len, house.values()))}",
        "circles of modules": " -> ".join(circle(graph)) or "none",
    }


def _bodies(path: Path) -> Iterable[int]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            yield (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--root", type=Path, default=ROOT)
    options = parser.parse_args()
    if options.sizes:
        for name, value in sizes(options.root.resolve()).items():
            print(f"| {name} | {value} |")
    else:
        (options.root / "docs" / "map.md").write_text(page(options.root.resolve()), "utf-8")
