# ruff: noqa: E402  (what needs the extra is imported after the check that it is there)
"""The command line apart from ``kdfast demo``."""

import subprocess
import sys

import pytest
import torch

testing = pytest.importorskip("typer.testing")
pytest.importorskip("rich")

import kdfast
import kdfast.cache
from kdfast.cli.app import app


def invoke(*arguments):
    return testing.CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def cache(tmp_path):
    path = tmp_path / "labels"
    with kdfast.cache.Writer(path, vocab_size=10, codec="dense", teacher="a [bold] teacher") as writer:
        for name in "abc":
            writer.add(name, torch.randn(4, 10))
    return path


@pytest.fixture
def damaged(cache):
    """One bit of the payload, which opening does not read."""
    shard = next(cache.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + 5] ^= 1
    shard.write_bytes(content)
    return cache


class TestApp:
    @pytest.mark.parametrize("command", [[], ["demo"], ["doctor"], ["cache"], ["cache", "info"], ["cache", "verify"]])
    def test_help(self, command):
        result = invoke(*command, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.output

    def test_version(self):
        result = invoke("--version")
        assert (result.exit_code, result.output) == (0, f"kdfast {kdfast.__version__}\n")

    def test_unknown_device(self, tmp_path):
        result = invoke("demo", "--out", tmp_path / "new", "--device", "nonsense")
        assert result.exit_code == 2
        assert "nonsense" in result.output
        assert not (tmp_path / "new").exists()

    def test_out_that_is_a_file(self, tmp_path):
        pytest.importorskip("sklearn")
        pytest.importorskip("torchmetrics")
        (tmp_path / "taken").write_text("mine")
        result = invoke("demo", "--quick", "--out", tmp_path / "taken")
        assert result.exit_code == 1
        assert "taken" in result.output
        assert (tmp_path / "taken").read_text() == "mine"


def test_doctor():
    result = invoke("doctor")
    assert result.exit_code == 0
    for expected in (kdfast.__version__, torch.__version__, kdfast._C.cpu_isa(), "kdfast[demo]", "rich"):
        assert expected in result.output
    for kernels in ("CPU kernels", "one-read CUDA kernels", "Triton kernels", "GPU rows of 128,256"):
        assert kernels in result.output
    assert f"clusters of {kdfast._C.cluster_size(4 * 128_256)}" in " ".join(result.output.replace("│", "").split())


class TestCache:
    def test_info(self, cache):
        result = invoke("cache", "info", cache)
        assert result.exit_code == 0
        for expected in (
            "a [bold] teacher",
            "dense",
            "a small vocabulary",
            "3 (0 duplicates",
            "14.0 per row",
            "index.safe",
        ):
            assert expected in result.output

    def test_verify(self, cache):
        result = invoke("cache", "verify", cache)
        assert result.exit_code == 0
        assert "3 records" in result.output

    def test_damage(self, damaged):
        assert invoke("cache", "info", damaged).exit_code == 0
        result = invoke("cache", "verify", damaged)
        assert result.exit_code == 1
        assert "block 0: CRC" in result.output

    @pytest.mark.parametrize("command", ["info", "verify"])
    def test_no_cache(self, command, tmp_path):
        result = invoke("cache", command, tmp_path)
        assert result.exit_code == 1
        assert "holds no shard" in result.output
        result = invoke("cache", command, tmp_path / "absent")
        assert result.exit_code == 1
        assert "absent" in result.output


def run_without(package, *arguments):
    """``kdfast`` in a process that cannot import a package: ``sys.modules`` maps its name to None."""
    code = f"import sys; sys.modules[{package!r}] = None; from kdfast.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


class TestMissingPackage:
    @pytest.mark.parametrize(("package", "arguments"), [("typer", ["--help"]), ("sklearn", ["demo"])])
    def test_of_an_extra(self, package, arguments, tmp_path):
        found = run_without(package, *arguments, *(["--out", tmp_path] if "demo" in arguments else []))
        assert found.returncode == 1
        assert found.stderr == f'kdfast: the package {package} is missing: pip install "kdfast[demo]"\n'

    def test_of_no_extra(self):
        found = run_without("safetensors", "--help")
        assert found.returncode == 1
        assert "ModuleNotFoundError" in found.stderr
        assert "pip install" not in found.stderr


def test_importing_the_app_leaves_what_only_some_commands_need_alone():
    packages = ("sklearn", "torchmetrics", "matplotlib", "transformers", "scipy", "jinja2")
    rooms = tuple(f"kdfast.{room}" for room in ("bench", "demo", "distill", "experiments", "recipes", "cache.tools"))
    code = f"import kdfast.cli.app, sys; print([name for name in {packages + rooms} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
