"""Every .cu file compiles for every architecture, without spilling a register, and moves 16 bytes at a time."""

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from support import ROOT

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is missing")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
CAPABILITIES = (80, 90, 100)


@pytest.fixture(scope="module", params=SOURCES, ids=lambda path: path.stem)
def compiled(request, tmp_path_factory):
    """The object file, and what ptxas says of its kernels: (capability, name, bytes spilled, registers)."""
    binary = tmp_path_factory.mktemp("cuda") / f"{request.param.stem}.o"
    flags = [flag for flag in runpy.run_path(str(ROOT / "setup.py"))["NVCC"] if "-gencode" not in flag]
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in CAPABILITIES]
    headers = [f"-I{path}" for path in include_paths()]
    command = [NVCC, *flags, *targets, *headers, "-Xptxas=-v", "-c", request.param, "-o", binary]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'"
        r".*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    found = re.findall(pattern, done.stderr, re.DOTALL)
    return binary, [(int(n), name, int(stores) + int(loads), int(used)) for name, n, stores, loads, used in found]


def test_no_register_is_spilled(compiled):
    kernels = compiled[1]
    assert {capability for capability, *_ in kernels} == set(CAPABILITIES)
    assert [kernel for kernel in kernels if kernel[2]] == []


def test_rows_come_and_go_16_bytes_at_a_time(compiled):
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "-sass", "-arch", "sm_90", compiled[0]]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for kernel in listing.split("Function : ")[1:]:
        # The copy engine into shared memory, and from there to registers; the gradient from registers.
        for instruction in ("UBLKCP", "LDS.128", "STG.E.128"):
            assert instruction in kernel, (instruction, kernel.splitlines()[0])
        assert "LDL" not in kernel, kernel.splitlines()[0]
