"""Every form of every Triton kernel compiles for every architecture, without spilling a register."""

import json
import os
import subprocess
import sys
from functools import cache

import pytest

from support import ROOT

pytest.importorskip("triton")

KERNELS = ("scale", "dense", "sparse", "select_threshold", "select_top", "decode_blocks", "decode_rows")


@cache
def reports(kernel, *which):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, ROOT / "tests" / "support" / "triton_aot.py", kernel, *which]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_register_is_spilled(kernel):
    assert reports(kernel, "everyday")
    assert [found for found in reports(kernel, "everyday") if found["spilled"]] == []


@pytest.mark.full
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_register_is_spilled_in_any_variant(kernel):
    assert [found for found in reports(kernel) if found["spilled"]] == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_aligned_rows_are_loaded_128_bits_at_a_time(kernel):
    found = [report for report in reports(kernel, "everyday") if not report["gathers"]]
    assert [report for report in found if "odd" not in report["variant"] and report["load_bits"] < 128] == []
