"""pytest-benchmark's view of the dense loss: one group per shape, ours beside eager PyTorch and torch.compile.

`kdfast bench loss` interleaves the contenders and quotes ratios; this is for watching one of them over time:
`pytest benchmarks --benchmark-autosave`, later `--benchmark-compare`.
"""

import pytest
import torch

from kdfast.bench.loss import CASES, DTYPES, SHAPES, contenders


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("contender", ["ours", "eager", "compile", "copy"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_dense(benchmark, contender, dtype, shape):
    benchmark.group = f"{shape[0]}x{shape[1]} {dtype}"
    student, teacher = (torch.randn(*shape).mul_(3).to(DTYPES[dtype]) for _ in range(2))
    labels = torch.randint(0, shape[1], (shape[0],))
    run = contenders(CASES["kl"], student, teacher, labels, 2.0)[contender]
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    benchmark.extra_info["bytes"] = (2 if contender == "copy" else 3) * student.numel() * student.element_size()
