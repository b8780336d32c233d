"""Every instruction set that this processor runs passes the kernels' tests; the others cannot be forced."""

import os
import subprocess
import sys

import pytest

from kdfast import _C
from support import ROOT

TESTS = ROOT / "tests"
FILES = [
    *(TESTS / "loss" / f"test_{name}.py" for name in ("dense", "sparse", "prototype_rows")),
    *(TESTS / "cache" / "selection" / f"test_{name}.py" for name in ("select", "select_top")),
]


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_forced_isa_matches_the_oracle(isa):
    env = {**os.environ, "KDFAST_CPU_ISA": isa}
    probe = [sys.executable, "-c", "from kdfast import _C; print(_C.cpu_isa())"]
    found = subprocess.run(probe, env=env, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"this processor does not run {isa}: {found.stderr.splitlines()[-1]}")
    assert found.stdout.strip() == isa
    if isa == _C.cpu_isa():
        return  # the other tests run these kernels
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += map(str, FILES)
    result = subprocess.run(command, env=env, cwd=TESTS, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
