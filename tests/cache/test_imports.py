"""The cache's folders import downwards only, and in no circle: whatever a module imports, wherever it says so."""

import ast
from graphlib import TopologicalSorter

import pytest

from support import ROOT

CACHE = ROOT / "kdfast" / "cache"
# A folder imports its own modules and those of lower floors: a reader knows no writer, and a writer no reader.
FLOOR = {"selection": 1, "codecs": 2, "format": 3, "read": 4, "write": 4, "convert": 5, "tools": 5, "capture": 6}


def name_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in CACHE.rglob("*.py") if file != CACHE / "__init__.py"}


def imported(module):
    """The cache's modules that ``module`` imports, within functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return (found & FILES.keys()) - {module}


def folder(module):
    return module.split(".")[2]


@pytest.mark.parametrize("module", [name for name in FILES if folder(name) in FLOOR])
def test_a_folder_imports_lower_ones_only(module):
    for other in imported(module):
        if folder(other) != folder(module):
            assert FLOOR.get(folder(other), 0) < FLOOR[folder(module)], other


def test_no_import_goes_round_in_a_circle():
    # A package is no module of its own here: importing a part of it runs it first, whoever asks.
    graph = {name: {other for other in imported(name) if FILES[other].name != "__init__.py"} for name in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)


def test_every_folder_has_its_floor():
    assert {folder(name) for name in FILES} == {*FLOOR, "errors"}
