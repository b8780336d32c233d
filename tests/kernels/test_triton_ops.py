"""Which kernel a CUDA call runs: Triton's, or the reference for what that does not serve."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import dense_checks as laws

pytest.importorskip("triton")

from kdfast import _triton, kernels
from kdfast.divergences import Divergence
from kdfast.loss import dispatch, ops
from kdfast.loss.reference import Targets
from support.triton_device import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize(
    "name", [op + suffix for op in ("dense_rows", "sparse_rows") for suffix in ("", "_grad", "_inplace")]
)
def test_cuda_has_a_kernel(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kdfast::{name}", "CUDA")


def fallback(*_):
    raise LookupError("the reference")


def run(dtype):
    student, coef = torch.randn(6, 40, device=DEVICE, dtype=dtype), laws.coefficients(6, torch.float32).to(DEVICE)
    op = dispatch.on_gpu("dense_rows", dispatch.RowOps(fallback, fallback, fallback)).grad
    labels = Targets(torch.arange(6, device=DEVICE))
    return laws.run(op, student, student.clone(), coef, labels, Divergence("forward_kl"))


def test_narrow_logits_run_in_triton_and_float64_in_the_reference():
    assert run(torch.float32)[1].isfinite().all()
    with pytest.raises(LookupError):
        run(torch.float64)


def test_without_triton_the_reference_runs(monkeypatch):
    monkeypatch.setattr(_triton, "launcher", lambda name: None)
    with pytest.raises(LookupError):
        run(torch.float32)


def test_the_reference_differentiates_below_autograd():
    """Where an op's kernel runs, autograd records nothing."""
    student, teacher = torch.randn(1, 3, 9), ops.DenseTeacher(torch.randn(1, 3, 9), Divergence("jsd"))
    arguments = (student, *teacher.arguments(torch.rand(5, 3) + 0.1, Targets(torch.zeros(3, dtype=torch.long))))
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    with torch._C._AutoDispatchBelowAutograd():
        slow = torch.ops.kdfast.dense_rows_grad.default.redispatch(keys, *arguments)
    for a, b in zip(slow, torch.ops.kdfast.dense_rows_grad(*arguments), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_import_leaves_triton_alone():
    code = "import sys, kdfast; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_says_what_lies_where():
    modules = {file.stem for file in Path(kernels.__file__).parent.glob("*.py")} - {"__init__"}
    assert modules <= set(re.findall(r"``(\w+)``", kernels.__doc__))
