"""docs/methods.md: every requirement has a name that can be imported and a test that exists."""

import ast
import importlib
import re
from functools import cache

import pytest

from support import ROOT

REQUIREMENTS = 36


def rows():
    lines = (ROOT / "docs" / "methods.md").read_text("utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| \d+ ", line)]
    return [(int(number), names, tests) for number, _, names, tests in cells]


@cache
def functions_of(file):
    """The names of a test file's functions, and of its classes' methods."""
    tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def quoted(cell):
    found = re.findall(r"`([^`]+)`", cell)
    assert ", ".join(f"`{text}`" for text in found) == cell, f"{cell} is no list of names"
    assert found
    return found


def resolve(name):
    """What ``name`` stands for: an attribute where there is one, else a module."""
    package, *parts = name.split(".")
    found, path = importlib.import_module(package), package
    for part in parts:
        path = f"{path}.{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
    return found


def test_every_requirement_has_a_row():
    assert [number for number, _, _ in rows()] == list(range(1, REQUIREMENTS + 1))


@pytest.mark.parametrize(("names", "tests"), [row[1:] for row in rows()], ids=[str(row[0]) for row in rows()])
def test_names_and_tests_exist(names, tests):
    for name in quoted(names):
        assert name.startswith("kdfast.")
        assert callable(resolve(name))
    for test in quoted(tests):
        file, _, function = test.partition("::")
        assert function.startswith("test_")
        assert function in functions_of(file), f"tests/{file} has no {function}"
