"""The dense row op against the oracle in float64, gradients first."""

import math

import pytest
import torch

from kdfast import _C, jsd, skew_forward_kl, skew_reverse_kl
from kdfast.divergences import Divergence
from kdfast.loss.reference import Targets
from kdfast.testing import loss_and_gradient, oracle_gradient
from support import dense_checks as laws
from support.dense_checks import DIVERGENCES, coefficients

# Below and above a vector, a tile (1024) and its whole vectors; both vocabularies wider.
SHAPES = [(3, 3), (17, 17), (1000, 1000), (1023, 1030), (1030, 1023), (2500, 2500), (2051, 1024)]
OP = torch.ops.kdfast.dense_rows_grad


def run(*arguments):
    return laws.run(OP, *arguments)


def check(*arguments):
    laws.check(OP, *arguments)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_oracle(divergence, dtype):
    for s, t in SHAPES:
        for tau in (1.0, 2.0, 3.3):  # the student's softmax at temperature 1 is shared, squared, separate
            student, teacher = torch.randn(6, s) * 3, torch.randn(6, t) * 3
            labels = Targets(torch.randint(0, min(s, t), (6,)), None, 0.1)
            check(student.to(dtype), teacher.to(dtype), coefficients(6, _wide(dtype), tau), labels, divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_masked_vocabulary(divergence, dtype):
    for s, t in SHAPES[1:]:
        laws.masked_vocabulary(OP, divergence, dtype, s, t)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_masked_from_the_start(divergence, dtype):
    for columns, tau in ((40, 1.0), (40, 0.1), (1100, 2.0), (2100, 50.0)):
        laws.masked_from_the_start(run, divergence, columns, tau, dtype)


def test_a_term_of_weight_0_is_left_out():
    for columns in (5, 1100):
        laws.a_term_of_weight_0_is_left_out(OP, columns)


@pytest.mark.parametrize("scale", [0.1, 3.0, 10.0, 30.0])
@pytest.mark.parametrize("a", [0.01, 0.5, 0.9])
@pytest.mark.parametrize("make", [jsd, skew_forward_kl, skew_reverse_kl])
def test_mixtures_are_as_exact_as_float64(make, a, scale):
    student, teacher = torch.randn(4, 60, dtype=torch.float64) * scale, torch.randn(4, 60, dtype=torch.float64) * scale
    results = [x(student, teacher, divergence=make(a)) for x in (loss_and_gradient, _reference_loss_and_gradient)]
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-15)


def _reference_loss_and_gradient(student, teacher, divergence):
    coef = torch.ones(5, len(student), dtype=torch.float64) / len(student)
    coef[:2] = 1.0
    coef[3:] = 0.0
    loss, grad, _ = oracle_gradient(student, teacher, coef, Targets(), divergence)
    return loss.sum(), grad


@pytest.mark.parametrize(
    ("divergence", "masked"),
    [("forward_kl", "student"), ("soft_ce", "student"), ("reverse_kl", "teacher"), ("symmetric_kl", "student")],
)
@pytest.mark.parametrize("gap", [3.0, 200.0])
def test_infinite_divergence_is_reported(divergence, masked, gap):
    for columns in (5, 1000, 2000):
        laws.infinite_divergence(OP, divergence, masked, gap, columns)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "tvd", "alpha_beta", "dkd", "logit_mse"])
def test_nan_and_inf_reach_their_row_only(bad, side, dtype, divergence):
    for columns, at in ((1500, 3), (1500, 1499), (7, 5)):
        laws.nan_and_inf_reach_their_row_only(OP, bad, side, dtype, divergence, columns, at)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_do_not_count_are_exact_zeros(dtype):
    laws.rows_that_do_not_count_are_exact_zeros(OP, dtype, 1100)


@pytest.mark.parametrize("name", _C.divergences())
def test_rows_without_a_finite_column_are_exact_zeros(name):
    laws.rows_without_a_finite_column_are_exact_zeros(OP, name, 1100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd", "logit_mse"])
def test_extreme_logits(dtype, divergence):
    laws.extreme_logits(OP, dtype, divergence, 2100)


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
            labels = Targets(torch.tensor([at, 0, 1, at, 2, 3]))
            check(student.to(dtype), teacher.to(dtype), coef, labels, Divergence("forward_kl"))


@pytest.mark.parametrize("value", [1e9, 1e12, 1e37, -1e30, -3e38])
def test_huge_logits(value):
    laws.huge_logits(OP, value, 1000)


@pytest.mark.parametrize("name", ["forward_kl", "soft_ce", "reverse_kl", "jsd", "tvd", "dkd", "alpha_beta"])
def test_finite_masks(name):
    laws.finite_masks(OP, name, 1100)


@pytest.mark.parametrize("name", ["reverse_kl", "symmetric_kl"])
def test_infinite_divergence_keeps_a_finite_gradient(name):
    student, teacher = torch.randn(2, 1100), torch.randn(2, 1100)
    teacher[0, 5] = -math.inf
    loss, grad, _ = run(
        student, teacher, torch.ones(5, 2) * torch.tensor([[1.0], [1], [1], [0], [0]]), Targets(), Divergence(name)
    )
    assert loss[0] == math.inf
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", _C.divergences())
def test_identical_sides_have_no_gradient(name):
    laws.identical_sides_have_no_gradient(OP, name, 1500)


@pytest.mark.parametrize(
    "name", ["forward_kl", "reverse_kl", "symmetric_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"]
)
def test_small_gap_keeps_its_gradient(name):
    laws.small_gap_keeps_its_gradient(OP, name, 3000)


@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_may_differ(student_dtype, teacher_dtype):
    student, teacher = torch.randn(6, 1500).to(student_dtype), torch.randn(6, 1500).to(teacher_dtype)
    labels = Targets(torch.randint(0, 1500, (6,)))
    check(student, teacher, coefficients(6, torch.float32, 2.0), labels, Divergence("jsd"))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_class_probabilities_as_labels(smoothing, dtype):
    for tau in (1.0, 2.0, 3.0):
        laws.class_probabilities(OP, smoothing, dtype, tau, 1100)


def test_strided_rows_are_read_where_they_lie():
    laws.strided_rows_are_read_where_they_lie(OP, 1200)


def test_streamed_gradients_match():
    """Gradients of 8 MiB and more are written past the caches, from unaligned rows too."""
    student, teacher = torch.randn(250, 9001), torch.randn(250, 9001)
    coef = torch.ones(5, 250)
    labels = Targets(torch.randint(0, 9001, (250,)))
    _, streamed, _ = run(student, teacher, coef, labels, Divergence("forward_kl"))
    for rows in (slice(0, 2), slice(248, 250)):
        _, plain, _ = run(
            student[rows],
            teacher[rows],
            coef[:, rows].contiguous(),
            Targets(labels.label[rows]),
            Divergence("forward_kl"),
        )
        assert torch.equal(streamed[rows], plain)


def test_bitwise_repeatable():
    student, teacher = torch.randn(64, 3000), torch.randn(64, 3000)
    labels = Targets(torch.randint(0, 3000, (64,)))
    first, second = (run(student, teacher, torch.ones(5, 64), labels, Divergence("jsd")) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_a_number_of_no_divergence_is_refused():
    x, coef = torch.randn(1, 2, 5), torch.ones(5, 2)
    with pytest.raises(RuntimeError, match="kind must be the number of a divergence"):
        torch.ops.kdfast.dense_rows(x, x, coef, None, None, 0.0, len(_C.divergences()), 0.0, 0.0, 1.0, False, False)


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32
