"""The one-read CUDA kernel's arithmetic against the oracle in float64: its threads run in turn on the CPU."""

import ctypes
import math
from itertools import pairwise

import pytest
import torch

from kdfast.loss.reference import Targets
from kdfast.testing import assert_close_to_eager
from support.native_rows import DTYPES, NVCC, WHERE, RowTask, load
from support.sparse_rows import coefficients, make_teacher, oracle, with_padding

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is missing, whose headers the kernels need")


class Task(ctypes.Structure):
    _fields_ = [
        ("row", RowTask),
        *((name, ctypes.c_void_p) for name in ("ids", "weights", "offsets", "tail", "logits")),
        ("count", ctypes.c_int64),
        ("subtract_entropy", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return load("sparse_cluster", tmp_path_factory.mktemp("native"))


@pytest.fixture(params=WHERE, ids="{0[0]}-{0[1]}".format)
def run(kernel, request):
    """Loss and gradient of contiguous rows."""
    device, cluster = request.param

    def on_cpu(student, teacher, coef, labels):
        loss, grad = torch.full((len(student),), math.nan), torch.full_like(student, math.nan)
        row = RowTask.of(student, grad, coef, labels, cluster, loss)
        tail = None if teacher.tail is None else teacher.tail.float().contiguous()
        logits = torch.empty(len(teacher.ids))
        entries = teacher.ids.data_ptr(), teacher.weights.data_ptr(), teacher.offsets.data_ptr()
        pointers = *entries, None if tail is None else tail.data_ptr(), logits.data_ptr()
        count, subtract = len(teacher.ids), teacher.divergence.name == "forward_kl"
        kernel(ctypes.byref(Task(row, *pointers, count, subtract)), DTYPES[student.dtype])
        return loss, grad

    def on_gpu(student, teacher, coef, labels):
        grad = torch.full_like(student, math.nan, device=device)
        entries = (x.to(device) for x in (student[None], teacher.ids, teacher.weights, teacher.offsets))
        tail = None if teacher.tail is None else teacher.tail.float().to(device)
        target = None if labels.label is None else labels.label.to(device)
        numbers = coef.to(device), target, labels.smoothing, teacher.divergence.name == "forward_kl"
        loss = torch.ops.kdfast.sparse_rows_cluster(*entries, tail, *numbers, grad[None], cluster)
        return loss.cpu(), grad.cpu()

    return on_gpu if device == "cuda" else on_cpu


def check(run, student, teacher, coef, labels):
    loss, grad = run(student, teacher, coef, labels)
    eager_loss, eager_grad, _ = oracle(student, teacher, coef, labels)
    exact_loss, exact_grad, _ = oracle(student.double(), teacher, coef.double(), labels)
    assert_close_to_eager("gradient", grad, eager_grad, exact_grad, student.dtype)
    assert_close_to_eager("loss", loss, eager_loss, exact_loss, torch.float32, floor=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("tau", [1.0, 2.0, 3.3])
def test_matches_oracle(run, dtype, tail, tau):
    for columns in (5, 64, 1001):
        labels = Targets(torch.randint(0, columns, (6,)), None, 0.1)
        student = (torch.randn(6, columns) * 3).to(dtype)
        check(run, student, make_teacher(6, columns, tail=tail), coefficients(6, torch.float32, tau), labels)


@pytest.mark.parametrize("gap", [-200.0, 200.0])
@pytest.mark.parametrize("tau", [1.0, 2.0, 3.3])
def test_heads_far_from_the_tail(run, gap, tau):
    student = torch.randn(6, 501)
    ids = torch.stack([torch.randperm(501)[:4] for _ in range(6)])
    student.scatter_(1, ids, gap)
    teacher = make_teacher(6, 501, counts=[4] * 6, ids=ids.reshape(-1).int())
    check(run, student, teacher, coefficients(6, torch.float32, tau), Targets(torch.randint(0, 501, (6,))))


@pytest.mark.parametrize("log_tail", [-70.0, -1e-6, -math.inf])
def test_tiny_and_whole_tails(run, log_tail):
    teacher = make_teacher(6, 301)._replace(tail=torch.full((6,), log_tail))
    check(run, torch.randn(6, 301), teacher, coefficients(6, torch.float32, 2.0), Targets(torch.arange(6)))


def test_masked_students(run):
    student, teacher = torch.randn(6, 700), make_teacher(6, 700, counts=[3] * 6)
    student[:, 20:40] = -math.inf
    kept = torch.stack([torch.arange(i, i + 3) * 50 + 45 for i in range(6)])
    labels = Targets(torch.full((6,), 699), None, 0.1)
    teacher = teacher._replace(ids=kept.reshape(-1).int())
    check(run, student, teacher, coefficients(6, torch.float32, 2.0), labels)
    # Teacher mass on a masked column is an infinite divergence, and nobody's gradient at the mask.
    loss, grad = run(student, teacher._replace(ids=(kept * 0 + 25).int().reshape(-1)), torch.ones(5, 6), labels)
    assert (loss == math.inf).all()
    assert (grad[:, 20:40] == 0.0).all()


def test_a_tail_without_columns_is_infinite(run):
    teacher = make_teacher(1, 8, counts=[8])
    loss, grad = run(torch.randn(1, 8), teacher, torch.ones(5, 1), Targets())
    assert loss == math.inf
    assert grad.isfinite().all()


@pytest.mark.parametrize("tail", [True, False])
def test_padding_is_as_if_it_were_not_there(run, tail):
    student, teacher = torch.randn(6, 301), make_teacher(6, 301, tail=tail, counts=[0, 1, 2, 5, 9, 3])
    label, coef = torch.randint(0, 301, (6,)), coefficients(6, torch.float32, 2.0)
    label[3] = teacher.ids[5]  # an entry's
    padded = with_padding(teacher, label, 301)
    clean, same = (run(student, x, coef, Targets(label, None, 0.1)) for x in (teacher, padded))
    for a, b in zip(clean, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("place", "bad"), [(1, 2**40), (1, 7), (2, -1), (3, 2**62)])
def test_offsets_that_are_no_rows_touch_no_memory(run, place, bad):
    teacher = make_teacher(3, 100, counts=[2] * 3)
    teacher.offsets[place] = bad
    loss, grad = run(torch.randn(3, 100), teacher, torch.ones(5, 3), Targets(torch.zeros(3, dtype=torch.long)))
    good = [0 <= a <= b <= 6 for a, b in pairwise(teacher.offsets.tolist())]
    assert loss.isfinite().tolist() == grad.isfinite().all(1).tolist() == good


def test_bad_rows_are_nan_and_harm_no_others(run):
    for bad in (-1, 100, 2**31 - 1):
        teacher = make_teacher(5, 100, counts=[2] * 5)
        teacher.ids[2] = bad
        student, target, coef = torch.randn(5, 100), torch.zeros(5, dtype=torch.long), torch.ones(5, 5)
        student[2, 3], target[3], coef[0, 4] = math.nan, -5, -1.0
        loss, grad = run(student, teacher, coef, Targets(target))
        assert torch.equal(loss.isnan(), torch.tensor([False, True, True, True, True]))
        assert grad[1:].isnan().all()
        assert grad[0].isfinite().all()
