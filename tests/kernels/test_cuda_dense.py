"""The one-read CUDA kernel's arithmetic against the oracle in float64: its threads run in turn on the CPU."""

import ctypes
import math

import pytest
import torch

from kdfast import _C
from kdfast._calls import DivergenceNumbers
from kdfast.divergences import Divergence, alpha_beta, jsd, skew_forward_kl, skew_reverse_kl
from kdfast.loss.reference import Targets
from kdfast.testing import assert_close_to_eager, oracle_gradient
from support.dense_checks import TEACHER_MAY_MASK, masked_from_the_start
from support.native_rows import DTYPES, NVCC, WHERE, RowTask, load

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is missing, whose headers the kernels need")

DIVERGENCES = [
    *(Divergence(name) for name in _C.divergences() if name not in ("dkd", "logit_mse")),
    jsd(0.05),
    jsd(0.9),
    skew_forward_kl(0.7),
    skew_reverse_kl(0.99),
    alpha_beta(0.5, -0.5),
    alpha_beta(0.0, 0.0),
]


class Task(ctypes.Structure):
    _fields_ = [
        ("row", RowTask),
        ("teacher", ctypes.c_void_p),
        ("kind", ctypes.c_int),
        *((name, ctypes.c_double) for name in ("a", "b", "scale")),
    ]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return load("dense_cluster", tmp_path_factory.mktemp("native"))


@pytest.fixture(params=WHERE, ids="{0[0]}-{0[1]}".format)
def run(kernel, request):
    """Loss and gradient of contiguous rows."""
    device, cluster = request.param

    def on_cpu(student, teacher, coef, labels, divergence):
        loss, grad = torch.full((len(student),), math.nan), torch.full_like(student, math.nan)
        row = RowTask.of(student, grad, coef, labels, cluster, loss)
        kernel(ctypes.byref(Task(row, teacher.data_ptr(), *DivergenceNumbers.of(divergence))), DTYPES[student.dtype])
        return loss, grad

    def on_gpu(student, teacher, coef, labels, divergence):
        grad = torch.full_like(student, math.nan, device=device)
        tensors = (x.to(device) for x in (student[None], teacher[None], coef))
        target = None if labels.label is None else labels.label.to(device)
        numbers = target, labels.smoothing, *DivergenceNumbers.of(divergence)
        loss = torch.ops.kdfast.dense_rows_cluster(*tensors, *numbers, grad[None], cluster)
        return loss.cpu(), grad.cpu()

    return on_gpu if device == "cuda" else on_cpu


def coefficients(rows, tau_s=1.0, tau_t=1.5):
    """Per-row weights with each term left out somewhere."""
    coef = torch.rand(5, rows) + 0.2
    coef[0], coef[1] = tau_s, tau_t
    coef[4] *= 0.1
    coef[2, 1] = coef[3, 2] = coef[4, 3] = coef[3, 5] = coef[4, 5] = 0.0
    coef[2:, 4] = 0.0
    return coef


def check(run, student, teacher, coef, labels, divergence):
    loss, grad = run(student, teacher, coef, labels, divergence)
    eager_loss, eager_grad, _ = oracle_gradient(student, teacher, coef, labels, divergence)
    exact_loss, exact_grad, _ = oracle_gradient(student.double(), teacher.double(), coef.double(), labels, divergence)
    assert_close_to_eager("gradient", grad, eager_grad, exact_grad, student.dtype)
    assert_close_to_eager("loss", loss, eager_loss, exact_loss, torch.float32, floor=1.0)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_oracle(run, divergence, dtype):
    for columns in (3, 64, 1001):
        for tau in (1.0, 2.0, 3.3):
            student, teacher = torch.randn(6, columns) * 3, torch.randn(6, columns) * 3
            labels = Targets(torch.randint(0, columns, (6,)), None, 0.1)
            check(run, student.to(dtype), teacher.to(dtype), coefficients(6, tau), labels, divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_masked_from_the_start(run, divergence):
    for columns, tau in ((40, 0.1), (1001, 2.0)):
        masked_from_the_start(run, divergence, columns, tau)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("mask", [-math.inf, torch.finfo(torch.float32).min], ids=["-inf", "lowest"])
def test_masked_vocabulary(run, divergence, mask):
    dead = torch.zeros(501, dtype=torch.bool)
    dead[:300] = dead[-1] = dead[400] = True
    student, teacher = torch.randn(6, 501), torch.randn(6, 501)
    if mask != -math.inf and divergence == alpha_beta(0.0, 0.0):
        return  # it weighs all columns alike: what it makes of a gap of 1e38 nats is nobody's
    student[:, dead] = teacher[:, dead] = mask
    if divergence.canonical().name in TEACHER_MAY_MASK - {"logit_mse", "dkd"}:
        teacher[:, 320] = mask
    labels = Targets(torch.full((6,), 450), None, 0.1 if mask == -math.inf else 0.0)
    check(run, student, teacher, coefficients(6, 2.0), labels, divergence)
    _, grad = run(student, teacher, coefficients(6), labels, divergence)
    assert (grad[:, dead] == 0.0).all()


@pytest.mark.parametrize("gap", [3.0, 200.0])
@pytest.mark.parametrize(
    ("name", "masked"), [("forward_kl", 0), ("soft_ce", 0), ("reverse_kl", 1), ("symmetric_kl", 0), ("symmetric_kl", 1)]
)
def test_an_infinite_divergence_is_reported(run, name, masked, gap):
    rows = torch.randn(2, 2, 1000)
    rows[masked, 0, 3], rows[1 - masked, 0, 3] = -math.inf, -gap
    coef = torch.tensor([[1.0], [1.0], [1.0], [0.0], [0.0]]).repeat(1, 2)
    loss, grad = run(*rows, coef, Targets(), Divergence(name))
    assert loss[0] == math.inf
    assert loss[1].isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_bad_rows_are_nan_and_harm_no_others(run, divergence):
    student, teacher = torch.randn(7, 100), torch.randn(7, 100)
    coef, target = coefficients(7), torch.randint(0, 100, (7,))
    coef[2:] = 0.5
    student[0, 5], teacher[1, 99], student[2, 0] = math.nan, math.nan, math.inf
    coef[0, 3], target[4], target[5] = 0.0, 100, -1
    loss, grad = run(student, teacher, coef, Targets(target), divergence)
    assert loss[:6].isnan().all()
    assert grad[:6].isnan().all()
    assert loss[6].isfinite()
    assert grad[6].isfinite().all()


def test_rows_that_do_not_count_are_zero_whatever_they_hold(run):
    student = torch.full((2, 100), math.nan)
    loss, grad = run(student, student, torch.tensor([[0.0]] * 5).repeat(1, 2), Targets(), Divergence("forward_kl"))
    assert not loss.any()
    assert not grad.any()


@pytest.mark.parametrize("side", [0, 1])
def test_a_row_that_is_masked_throughout_has_no_divergence(run, side):
    rows = torch.randn(2, 1, 100)
    rows[side] = -math.inf
    coef = torch.tensor([[1.0], [1.0], [1.0], [0.0], [0.0]])
    for divergence in DIVERGENCES:
        loss, grad = run(*rows, coef, Targets(), divergence)
        assert loss == 0.0
        assert not grad.any()


@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
def test_a_shift_of_one_side_loses_no_digits(run, offset):
    student, teacher = torch.randn(6, 1000), torch.randn(6, 1000) + offset
    for divergence in (Divergence("forward_kl"), Divergence("reverse_kl"), jsd(0.5)):
        check(run, student, teacher, coefficients(6, 2.0, 2.0), Targets(torch.randint(0, 1000, (6,))), divergence)
