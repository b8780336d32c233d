"""What a wheel and an sdist hold, and what an installation puts on the path."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import tarfile
import zipfile

import pytest
import tomllib

import kdfast
from support import ROOT


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), built as `pip install .` builds them, the wheel from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    result = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_wheel_holds_one_package(built):
    names = zipfile.ZipFile(built[0]).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"kdfast"}
    assert "kdfast/kernels/__init__.py" in names
    assert {"kdfast/py.typed", "kdfast/experiments/report.html"} <= set(names)
    assert any(name.startswith("kdfast/_C.") for name in names)
    in_wheel = {name for name in names if name.endswith(".py")}
    in_tree = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kdfast").rglob("*.py")}
    assert in_tree <= in_wheel


def test_sdist_holds_every_source(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    for folder in ("csrc", "kernels", "kdfast", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}:
                assert path.relative_to(ROOT).as_posix() in names
    for name in ("setup.py", "pyproject.toml", "Makefile", "README.md", "FORMAT.md", "LICENSE", "requirements.txt"):
        assert name in names


def test_kernels_are_ours_only_inside_the_package():
    assert importlib.util.find_spec("kdfast.kernels") is not None
    other = importlib.util.find_spec("kernels")
    assert other is None or not str(other.origin).startswith(str(ROOT))


def test_versions_agree():
    assert importlib.metadata.version("kdfast") == kdfast.__version__


def test_the_package_declares_ranges_and_the_requirements_pin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [requirement for requirement in project["dependencies"] if "==" in requirement]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert all("==" in line for line in lines if line and not line.startswith("#"))
