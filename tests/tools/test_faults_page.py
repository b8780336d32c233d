"""docs/faults.md: every fault that was found has a test, and the test is there."""

import ast
import re
from functools import cache

import pytest

from support import ROOT

PAGE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in PAGE.splitlines()
    if re.match(r"\| [A-Z]+\d+[a-z]? \|", line)
]
TEST = re.compile(r"tests/[\w/]+\.py(?:::\w+)*")


@cache
def names_in(path):
    """The names of a file's test functions, those of classes as Class::test."""
    names = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


@pytest.mark.parametrize(
    ("letter", "count"), [("L", 19), ("C", 21), ("A", 20), ("K", 11), ("N", 14)], ids=lambda x: str(x)
)
def test_every_number_of_a_list_has_a_row(letter, count):
    numbers = {row[0] for row in ROWS}
    assert [n for n in range(1, count + 1) if f"{letter}{n}" not in numbers] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_rows_tests_are_there(row):
    tests = TEST.findall(row[-1])
    assert tests or row[-1].startswith("open:"), row
    for test in tests:
        path, _, name = test.partition("::")
        assert not name or name in names_in(path), test
