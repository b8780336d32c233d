"""The dense row op against the oracle in float64, gradients first."""

import math

import pytest
import torch

from kdfast import _C, _ops, alpha_beta, jsd, skew_forward_kl, skew_reverse_kl
from kdfast.divergences import Divergence
from kdfast.reference import Labels
from kdfast.testing import assert_close_to_eager, oracle_gradient

DIVERGENCES = [
    *(Divergence(name) for name in _C.divergences()),
    jsd(0.05),
    jsd(0.9),
    jsd(0.0, normalize=True),
    jsd(1e-4, normalize=True),
    jsd(0.9999, normalize=True),
    jsd(1.0, normalize=True),
    skew_forward_kl(0.0),
    skew_forward_kl(0.7),
    skew_reverse_kl(1e-4),
    skew_reverse_kl(0.99),
    skew_forward_kl(0.99),
    skew_reverse_kl(0.7),
    alpha_beta(1.0, 0.5),
    alpha_beta(0.5, 0.0),
    alpha_beta(0.0, 0.5),
    alpha_beta(0.5, -0.5),
    alpha_beta(0.0, 0.0),
    *(Divergence(name, standardize=True) for name in _C.divergences()),
]
# Below and above a vector, a tile (1024) and its whole vectors; both vocabularies wider.
SHAPES = [(3, 3), (17, 17), (1000, 1000), (1023, 1030), (1030, 1023), (2500, 2500), (2051, 1024)]
# Finite divergence whatever the teacher masks.
TEACHER_MAY_MASK = {"forward_kl", "soft_ce", "jsd", "skew_forward_kl", "tvd", "dkd", "logit_mse"}


def coefficients(rows, dtype, tau_s=1.0, tau_t=1.5):
    """Per-row weights of every sign that a user may give, with each term left out somewhere."""
    coef = torch.rand(5, rows, dtype=torch.float64) + 0.2
    coef[0], coef[1] = tau_s, tau_t
    coef[4] *= 0.1
    coef[2, 1] = coef[3, 2] = coef[4, 3] = 0.0
    coef[2:, 4] = 0.0
    return coef.to(dtype)


def run(student, teacher, coef, labels, divergence):
    """Loss, gradient and parts through the op that computes all three."""
    probs = None if labels.probs is None else labels.probs[None]
    truth = _ops.Truth(labels.target, probs, labels.smoothing, True)
    arguments = _ops.DenseTeacher(teacher[None], divergence).arguments(coef, truth)
    loss, grad, parts = torch.ops.kdfast.dense_rows_grad(student[None], *arguments)
    return loss, grad[0], parts


def check(student, teacher, coef, labels, divergence):
    dtype = student.dtype
    loss, grad, parts = run(student, teacher, coef, labels, divergence)
    eager_loss, eager_grad, eager_parts = oracle_gradient(student, teacher, coef, labels, divergence)
    exact_loss, exact_grad, exact_parts = oracle_gradient(
        student.double(), teacher.double(), coef.double(), labels, divergence
    )
    assert_close_to_eager("gradient", grad, eager_grad, exact_grad, dtype)
    # The loss leaves the kernel in float32 however narrow the logits are.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert_close_to_eager("loss", loss, eager_loss, exact_loss, wide, floor=1.0)
    for name, part, eager, exact in zip(exact_parts._fields, parts, eager_parts, exact_parts, strict=True):
        assert_close_to_eager(name, part, eager, exact, wide, floor=1.0)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_oracle(divergence, dtype):
    for s, t in SHAPES:
        for tau in (1.0, 2.0, 3.3):  # the student's softmax at temperature 1 is shared, squared, separate
            student, teacher = torch.randn(6, s) * 3, torch.randn(6, t) * 3
            labels = Labels(torch.randint(0, min(s, t), (6,)), None, 0.1)
            check(student.to(dtype), teacher.to(dtype), coefficients(6, _wide(dtype), tau), labels, divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_masked_vocabulary(divergence, dtype):
    for s, t in SHAPES[1:]:
        shared = min(s, t)
        dead = torch.zeros(max(s, t), dtype=torch.bool)
        dead[: 2 * shared // 3] = True  # whole leading tiles
        dead[shared - 1] = True  # inside the last partial vector
        student, teacher = torch.randn(6, s), torch.randn(6, t)
        if divergence.canonical().name in TEACHER_MAY_MASK:
            teacher[:, shared - 3] = -math.inf
        student[:, dead[:s]] = -math.inf
        teacher[:, dead[:t]] = -math.inf
        target = torch.full((6,), shared - 2)
        check(student.to(dtype), teacher.to(dtype), coefficients(6, dtype, 2.0), Labels(target, None, 0.1), divergence)
        _, grad, _ = run(student.to(dtype), teacher.to(dtype), coefficients(6, dtype), Labels(target), divergence)
        assert (grad[:, dead[:s]] == 0.0).all()


@pytest.mark.parametrize(
    ("divergence", "masked"),
    [("forward_kl", "student"), ("soft_ce", "student"), ("reverse_kl", "teacher"), ("symmetric_kl", "student")],
)
@pytest.mark.parametrize("gap", [3.0, 200.0])
def test_infinite_divergence_is_reported(divergence, masked, gap):
    for columns in (5, 1000, 2000):
        student, teacher = torch.randn(2, columns), torch.randn(2, columns)
        # Even where the other side's probability there underflows.
        (student if masked == "student" else teacher)[0, 3] = -math.inf
        (teacher if masked == "student" else student)[0, 3] = -gap
        coef = torch.tensor([[1.0], [1.0], [1.0], [0.0], [0.0]]).repeat(1, 2)
        loss, grad, _ = run(student, teacher, coef, Labels(), Divergence(divergence))
        assert loss[0] == math.inf
        assert loss[1].isfinite()
        assert grad[1].isfinite().all()
        assert (grad[0, student[0] == -math.inf] == 0.0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "tvd", "alpha_beta", "dkd", "logit_mse"])
def test_nan_and_inf_reach_their_row_only(bad, side, dtype, divergence):
    for columns, at in ((1500, 3), (1500, 1499), (7, 5)):
        student, teacher = torch.randn(3, columns).to(dtype), torch.randn(3, columns).to(dtype)
        {"student": student, "teacher": teacher}[side][1, at] = bad
        coef = torch.tensor([[2.0], [2.0], [1.0], [0.5], [0.0]]).repeat(1, 3)
        loss, grad, _ = run(student, teacher, coef, Labels(torch.zeros(3, dtype=torch.long)), Divergence(divergence))
        expected_nan = torch.tensor([False, True, False])
        if divergence == "logit_mse" and bad == math.inf and side == "teacher":
            assert loss[1] == math.inf
        else:
            assert torch.equal(loss.isnan(), expected_nan)
            assert grad[1].isnan().all()
        assert grad[0].isfinite().all()
        assert grad[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_do_not_count_are_exact_zeros(dtype):
    student, teacher = torch.full((4, 1100), math.nan, dtype=dtype), torch.full((4, 1100), math.inf, dtype=dtype)
    loss, grad, parts = run(student, teacher, torch.zeros(5, 4), Labels(torch.full((4,), -100)), Divergence("jsd"))
    for x in (loss, grad, parts):
        assert (x == 0.0).all()


def test_rows_without_a_finite_column_are_exact_zeros():
    dead, alive = torch.full((2, 1100), -math.inf), torch.randn(2, 1100)
    for name in _C.divergences():
        for student, teacher in ((dead, alive), (alive, dead), (dead, dead)):
            coef = torch.tensor([[2.0], [2.0], [1.0], [0.0], [0.0]]).repeat(1, 2)
            loss, grad, _ = run(student, teacher, coef, Labels(torch.zeros(2, dtype=torch.long)), Divergence(name))
            assert (loss == 0.0).all(), name
            assert (grad == 0.0).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd", "logit_mse"])
def test_extreme_logits(dtype, divergence):
    """Dominant columns far from a tile's first vector, large offsets, no spread."""
    base = torch.randn(6, 2100)
    base[0, 1500] += 200.0
    base[1, 40] += 1000.0
    base[2, 2099] += 90.0
    base[3] += 5000.0
    base[4] = 7.0
    base[5, :16] -= 300.0
    student, teacher = base.to(dtype), base.flip(1).to(dtype)
    labels = Labels(torch.tensor([1500, 3, 2099, 5, 6, 100]))
    check(student, teacher, coefficients(6, torch.float32, 2.0), labels, Divergence(divergence))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gap", [60.0, 100.0, 800.0])
def test_a_tile_starts_far_below_its_maximum(dtype, gap):
    """The first vector decides where a tile's exponents start; what comes after may be anywhere, the rest included."""
    for columns, at in ((1000, 999), (20, 19), (10, 9), (3000, 2999), (3000, 1500)):
        student, teacher = torch.randn(6, columns), torch.randn(6, columns)
        student[:3, at] += gap
        teacher[2:4, at] += gap
        if columns > 1000:
            student[4, :16] -= gap
            teacher[5, 1024:1040] -= gap
        for scale in (1.0, 1e-6):
            coef = coefficients(6, dtype, 2.0)
            coef[2:] *= scale
            labels = Labels(torch.tensor([at, 0, 1, at, 2, 3]))
            check(student.to(dtype), teacher.to(dtype), coef, labels, Divergence("forward_kl"))


@pytest.mark.parametrize("value", [1e9, 1e12, 1e37, -1e30, -3e38])
def test_huge_logits(value):
    """A row of one huge logit, or of nothing else."""
    student = torch.full((6, 1000), value if value < 0 else 0.0)
    if value > 0:
        student[:, 999] = value
    labels = Labels(torch.full((6,), 999))
    coef = torch.tensor([[1.0], [1.0], [1.0], [1.0], [0.0]]).repeat(1, 6)
    loss, grad, _ = run(student, student.clone(), coef, labels, Divergence("forward_kl"))
    expected = 0.0 if value > 0 else math.log(1000)
    assert torch.allclose(loss, torch.full((6,), expected), atol=1e-5)
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", ["forward_kl", "soft_ce", "reverse_kl", "jsd", "tvd", "dkd", "alpha_beta"])
def test_finite_masks(name):
    """The lowest finite number masks as -inf does, as long as the other side agrees."""
    student, teacher = torch.randn(6, 1100), torch.randn(6, 1100)
    results = []
    for mask in (torch.finfo(torch.float32).min, -math.inf):
        student[:, 20:900] = teacher[:, 20:900] = mask
        results.append(run(student, teacher, torch.full((5, 6), 1.5), Labels(torch.arange(6)), Divergence(name)))
    for finite, infinite in zip(*results, strict=True):
        assert torch.allclose(finite, infinite, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["reverse_kl", "symmetric_kl"])
def test_infinite_divergence_keeps_a_finite_gradient(name):
    student, teacher = torch.randn(2, 1100), torch.randn(2, 1100)
    teacher[0, 5] = -math.inf
    loss, grad, _ = run(
        student, teacher, torch.ones(5, 2) * torch.tensor([[1.0], [1], [1], [0], [0]]), Labels(), Divergence(name)
    )
    assert loss[0] == math.inf
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", _C.divergences())
def test_identical_sides_have_no_gradient(name):
    student = torch.randn(5, 1500) * 4
    coef = torch.tensor([[2.0], [2.0], [1.0], [0.0], [0.0]]).repeat(1, 5)
    loss, grad, _ = run(student, student.clone(), coef, Labels(torch.arange(5)), Divergence(name))
    assert grad.abs().max() < 1e-7
    if name != "soft_ce":
        # alpha_beta divides the rounding of its three powers by a b = 0.14.
        assert loss.abs().max() < (1e-5 if name == "alpha_beta" else 1e-6)


def test_small_gap_keeps_its_gradient():
    """Late in training the sides nearly agree: the difference must not be lost in the softmaxes' rounding."""
    student = torch.randn(6, 3000) * 10
    teacher = student + torch.randn(6, 3000) * 1e-3
    for name in ("forward_kl", "reverse_kl", "symmetric_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"):
        check(student, teacher, torch.ones(5, 6), Labels(torch.arange(6)), Divergence(name))


@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_may_differ(student_dtype, teacher_dtype):
    student, teacher = torch.randn(6, 1500).to(student_dtype), torch.randn(6, 1500).to(teacher_dtype)
    labels = Labels(torch.randint(0, 1500, (6,)))
    check(student, teacher, coefficients(6, torch.float32, 2.0), labels, Divergence("jsd"))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_class_probabilities_as_labels(smoothing, dtype):
    student, teacher = torch.randn(6, 1100).to(dtype), torch.randn(6, 1100).to(dtype)
    probs = torch.rand(6, 1100).softmax(1)
    student[:, 7] = -math.inf
    teacher[:, 7] = -math.inf
    probs[:, 7] = 0.0
    labels = Labels(None, probs.to(dtype), smoothing)
    for tau in (1.0, 2.0, 3.0):
        check(student, teacher, coefficients(6, _wide(dtype), tau), labels, Divergence("forward_kl"))


def test_strided_rows_are_read_where_they_lie():
    storage = torch.randn(3, 5, 1200)
    teacher = torch.randn(3, 4, 1200)
    coef = torch.ones(5, 12)
    truth = _ops.Truth(None, None, 0.0, False)
    coef[3:] = 0.0
    view = storage[:, 1:, :]
    arguments = _ops.DenseTeacher(teacher, Divergence("forward_kl")).arguments(coef, truth)
    strided = torch.ops.kdfast.dense_rows_grad(view, *arguments)
    packed = torch.ops.kdfast.dense_rows_grad(view.contiguous(), *arguments)
    for a, b in zip(strided, packed, strict=True):
        assert torch.equal(a, b)


def test_streamed_gradients_match():
    """Gradients of 8 MiB and more are written past the caches, from unaligned rows too."""
    student, teacher = torch.randn(250, 9001), torch.randn(250, 9001)
    coef = torch.ones(5, 250)
    labels = Labels(torch.randint(0, 9001, (250,)))
    _, streamed, _ = run(student, teacher, coef, labels, Divergence("forward_kl"))
    for rows in (slice(0, 2), slice(248, 250)):
        _, plain, _ = run(
            student[rows],
            teacher[rows],
            coef[:, rows].contiguous(),
            Labels(labels.target[rows]),
            Divergence("forward_kl"),
        )
        assert torch.equal(streamed[rows], plain)


def test_bitwise_repeatable():
    student, teacher = torch.randn(64, 3000), torch.randn(64, 3000)
    labels = Labels(torch.randint(0, 3000, (64,)))
    first, second = (run(student, teacher, torch.ones(5, 64), labels, Divergence("jsd")) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32
