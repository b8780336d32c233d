"""The head benchmark: its contenders compute the same, and its memory is what a step takes."""

import dataclasses
import json
from functools import partial

import pytest
import torch

from kdfast.bench.head import (
    CASES,
    COLUMNS,
    MEMORY_COLUMNS,
    HeadMeasurement,
    HeadMemory,
    cells,
    gradient_errors,
    measure_head,
    memory_cells,
    save_head,
)
from kdfast.bench.head_contenders import TEACHERS, HeadCase, head_contenders
from kdfast.bench.steps import extra_mib

SMALL = {name: HeadCase(name, 24, 300, 16, torch.float32) for name in TEACHERS}


@pytest.mark.parametrize("name", SMALL)
def test_contenders_agree(name):
    made = head_contenders(SMALL[name], "cpu", compile=False)
    made["products"]()()
    eager = made["eager"]()()
    for other in set(made) - {"eager", "products"}:
        for a, b in zip(made[other]()(), eager, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), other


def test_products_are_done_for_every_row(monkeypatch):
    monkeypatch.setenv("KDFAST_WORKSPACE", str(7 * 300 * 4))
    case = dataclasses.replace(SMALL["topk"], rows=23)
    run = head_contenders(case, "cpu", compile=False)["products"]()
    counted = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **to: counted.append((a.shape, b.shape)) or mm(a, b, **to))
    run()
    assert sum(a[0] for a, b in counted if b == (16, 300)) == 23
    assert sum(a[0] for a, b in counted if b == (300, 16) and a[1] == 300) == 23


def test_accuracy_late_in_training():
    """DESIGN's promise: rounding logits to bfloat16, which eager does, leaves no digit of the gradient."""
    errors = gradient_errors(dataclasses.replace(CASES["topk-bfloat16"], columns=2000, width=64))
    assert errors["ours"] <= 5e-3
    assert errors["eager"] > 0.1


def test_memory_is_what_a_step_holds():
    assert 60 < extra_mib(partial(partial, torch.ones, 64 << 18)) < 72


def test_a_measurement_and_its_report(tmp_path):
    timed = measure_head("topk", 1, dataclasses.replace(SMALL["topk"], rows=8), compile=False)
    assert set(timed.ms) == {"ours", "eager", "products"}
    assert len(cells(timed)) == len(COLUMNS)
    rows = dict(
        zip(
            COLUMNS,
            cells(
                HeadMeasurement(
                    "x", 1, 2, 3, {"ours": 10.0, "products": 8.0, "eager": 25.0}, {"ours": 0.001, "eager": 0.1}
                )
            ),
            strict=True,
        )
    )
    assert rows["over products"] == "1.25x"
    assert rows["eager"] == "2.50x"
    memory = HeadMemory("x", 4096, 128256, 3, {"ours": 100.0, "eager": 500.0, "compile": 300.0})
    assert dict(zip(MEMORY_COLUMNS, memory_cells(memory), strict=True))["eager / ours at 8192 x 128256"] == "10x"
    path = save_head([timed], [memory], tmp_path)
    assert json.loads(path.read_text())["memory"][0]["mib"]["eager"] == 500.0
    assert "over products" in path.with_suffix(".md").read_text()
