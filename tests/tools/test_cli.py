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
import kdfast.cli
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


class TestMissingExtra:
    """A name that ``sys.modules`` maps to None cannot be imported."""

    def test_hint_for_a_command(self, monkeypatch, tmp_path):
        for name in [name for name in sys.modules if name.startswith("kdfast.demo")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "sklearn", None)
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        monkeypatch.setattr(sys, "argv", ["kdfast", "demo", "--out", str(tmp_path)])
        with pytest.raises(SystemExit, match=r'sklearn is missing: pip install "kdfast\[demo\]"'):
            kdfast.cli.main()

    def test_hint_for_the_command_line_itself(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "kdfast.cli.app")
        monkeypatch.setitem(sys.modules, "typer", None)
        with pytest.raises(SystemExit, match=r'typer is missing: pip install "kdfast\[demo\]"'):
            kdfast.cli.main()

    def test_other_missing_modules_are_not_hidden(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "kdfast.cli.app", None)
        with pytest.raises(ModuleNotFoundError, match=r"kdfast\.cli\.app"):
            kdfast.cli.main()


def test_importing_the_app_leaves_the_heavy_packages_alone():
    code = (
        "import kdfast.cli.app, sys; print([m for m in ('sklearn', 'torchmetrics', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
