"""The GPU benchmark's contenders compute the same, and its report says what was measured."""

import dataclasses
import json

import pytest
import torch

from kdfast.bench.gpu import COLUMNS, Result, cells, gradient_errors_of, save_gpu
from kdfast.bench.gpu_cases import CASES, GpuCase
from kdfast.bench.gpu_contenders import contenders
from kdfast.labels import SoftLabels

SMALL = {
    case.name: dataclasses.replace(case, rows=8, columns=296, dtype=torch.float32, width=16 * bool(case.width))
    for case in reversed(CASES)  # of several with a name the first one
    if case.kind in ("dense", "sparse", "head", "graph")
}


@pytest.mark.parametrize("name", SMALL)
def test_ours_and_eager_agree(name):
    made = contenders(SMALL[name], "cpu")
    eager = made["eager"]()()  # first: another may write over the logits that all are given
    ours = made["ours"]()()
    assert len(ours) == len(eager)
    for a, b in zip(ours, eager, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    if name == "head-soft-ce" and hasattr(torch.nn.functional, "linear_cross_entropy"):
        for a, b in zip(made["linear_cross_entropy"]()(), eager, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_gradient_errors_are_of_both():
    errors = gradient_errors_of(SMALL["kl-tau2"], "cpu")
    assert len(errors) == 6
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("name", [case.name for case in CASES if case.kind == "decode"])
def test_decoders_agree(name):
    pytest.importorskip("triton")
    case = GpuCase(name, 96, 300, torch.int32, "decode", 0)
    made = contenders(case, "cpu")
    ours, cpu = made["ours"]()(), made["cpu"]()()
    assert isinstance(ours, SoftLabels)
    assert torch.equal(ours.ids, cpu.ids)
    assert len(ours) == 96


def test_the_report_tells_who_failed(tmp_path):
    result = Result("kl", 10, 100, "bfloat16", {"ours": 2.0, "eager": 5.0}, {"liger": "ImportError: no"}, 50.0, {}, {})
    assert dict(zip(COLUMNS, cells(result, 100.0), strict=True)) == {
        "case": "kl",
        "dtype": "bfloat16",
        "rows x V": "10 x 100",
        "ours ms": "2.000",
        "GB/s": "50",
        "of copy": "50%",
        "M rows/s": "0.01",
        "others, times as long": "eager 2.5, liger failed",
        "MiB: ours / eager": "",
    }
    path = save_gpu([result], {"gpu": "none", "copy_gb_s": 100.0}, {"tests": "passed"}, tmp_path)
    document = json.loads(path.read_text())
    assert document["environment"]["gpu"] == "none"
    assert document["results"][0]["ms"] == {"ours": 2.0, "eager": 5.0}
    assert "liger failed: ImportError: no" in path.with_suffix(".md").read_text()
