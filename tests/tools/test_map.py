"""The rooms of the package: imports run one way, and docs/map.md draws them as they are."""

import importlib.util
import re
import subprocess
import sys
from functools import cache

import pytest

from support import ROOT

spec = importlib.util.spec_from_file_location("kdfast_map", ROOT / "docs" / "map.py")
rooms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rooms)


@cache
def below(room):
    """Every room that ``room`` imports from, directly or not."""
    graph, found, todo = rooms.rooms(), set(), [room]
    while todo:
        todo += graph[todo.pop()] - found
        found |= {target for name in [room, *found] for target in graph[name]}
    return found


def test_no_module_imports_itself_by_way_of_others():
    assert rooms.circle(rooms.imports()) == []


def test_no_room_imports_itself_by_way_of_others():
    assert rooms.circle(rooms.rooms()) == []


def test_a_circle_is_found():
    assert rooms.circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert rooms.floors({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": 2, "b": 1, "c": 0}


@pytest.mark.parametrize("room", ["labels", "loss", "objectives"])
def test_losses_know_nothing_of_the_cache(room):
    assert not [name for name in below(room) if name.partition(".")[0] in ("cache", "distill", "recipes")]


def test_the_cache_is_built_on_its_format():
    height = rooms.floors(rooms.rooms())
    order = [height[f"cache.{room}"] for room in ("selection", "codecs", "format", "read", "tools", "capture")]
    assert order == sorted(set(order))
    assert height["cache.read"] == height["cache.write"]


def test_reader_and_writer_do_not_know_each_other():
    assert "cache.write" not in below("cache.read")
    assert "cache.read" not in below("cache.write")


def test_the_page_is_drawn_from_the_imports():
    assert (ROOT / "docs" / "map.md").read_text("utf-8") == rooms.page(), "run python docs/map.py"


def test_every_place_that_the_page_names_exists():
    places = re.findall(
        r"`((?:csrc|docs|kdfast|kernels|tests)/[\w./]*|[A-Z]+\.md)`", (ROOT / "docs" / "map.md").read_text("utf-8")
    )
    assert len(places) > 20
    assert [place for place in places if not (ROOT / place).exists()] == []


FOLDERS = {path.parent for top in ("kdfast", "kernels", "csrc", "tests") for path in (ROOT / top).rglob("*.[pchm]*")}


@pytest.mark.parametrize("folder", sorted(path for path in FOLDERS if "fixtures" not in path.parts), ids=str)
def test_no_folder_is_a_crowd(folder):
    sources = [path for path in folder.iterdir() if path.suffix in (".py", ".h", ".cpp", ".cu")]
    assert len(sources) <= 20


def test_the_import_of_kdfast_loads_the_losses_and_nothing_else():
    code = "import sys, kdfast; print(*sorted(name for name in sys.modules if 'kdfast.' in name or '.' not in name))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "kdfast.loss.kd_loss" in loaded
    heavy = {"cache", "distill", "objectives", "recipes", "experiments", "bench", "demo", "cli"}
    assert not [name for name in loaded if name.startswith("kdfast.") and name.split(".")[1] in heavy]
    assert not {"ray", "requests", "transformers", "triton", "typer", "pyarrow"} & set(loaded)


LAZY = {
    "kdfast.losses.kd_loss": "kdfast.loss.kd_loss",
    "kdfast.head.Head": "kdfast.labels.head",
    "kdfast.cache.open": "kdfast.cache",
    "kdfast.cache.capture_vllm": "kdfast.cache.capture.vllm",
    "kdfast.cache.ray_capture": "kdfast.cache.capture.ray",
    "kdfast.objectives": "kdfast.objectives",
    "kdfast.Distiller": "kdfast.distill",
    "kdfast.recipes.Cohort": "kdfast.recipes",
}


def test_what_is_imported_lazily_is_there_when_asked_for():
    asked = "; ".join(f"{name}; assert {module!r} in sys.modules" for name, module in LAZY.items())
    subprocess.run([sys.executable, "-c", f"import sys, kdfast; {asked}; assert 'ray' not in sys.modules"], check=True)


def test_an_unknown_name_is_an_attribute_error():
    import kdfast

    with pytest.raises(AttributeError, match="module 'kdfast' has no attribute 'kdloss'"):
        _ = kdfast.kdloss
    with pytest.raises(AttributeError, match=r"module 'kdfast\.cache' has no attribute 'opem'"):
        _ = kdfast.cache.opem
    assert {*kdfast.__all__} <= {*dir(kdfast)}
    assert {*kdfast.cache.__all__} <= {*dir(kdfast.cache)}
