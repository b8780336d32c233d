"""The dense Triton kernels keep the laws of the dense row op."""

import math
from functools import partial

import pytest
import torch

from support import dense_checks as laws
from support import hostile

pytest.importorskip("triton")

from kdfast import _C
from kdfast.divergences import Divergence
from kdfast.kernels import dense, launch
from kdfast.loss import ops
from kdfast.loss.dispatch import forms_of
from kdfast.loss.reference import Targets
from support.dense_checks import DIVERGENCES, coefficients
from support.triton_device import DEVICE

# The interpreter's arithmetic is numpy's, which warns of what the kernels select out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
FORMS = forms_of(dense.dense_rows)
OP = FORMS.grad
# (V_s, V_t) at a tile of 256: within one, across tiles, and either side wider.
SHAPES = [(280, 280), (257, 262), (300, 264)]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    small = ((1 << 31, launch.TileConfig(256, 4, 1)),)
    monkeypatch.setattr(launch, "TILE_CONFIGS", dict.fromkeys(launch.TILE_CONFIGS, small))


def make(s, t, dtype, labels_below):
    student, teacher = (torch.randn(6, s) * 3).to(DEVICE, dtype), (torch.randn(6, t) * 3).to(DEVICE, dtype)
    return student, teacher, torch.randint(0, labels_below, (6,), device=DEVICE)


@pytest.mark.parametrize("number", range(len(DIVERGENCES)), ids=[str(d) for d in DIVERGENCES])
def test_matches_oracle(number):
    """Each divergence at one of the shapes and temperatures, which take turns."""
    s, t = SHAPES[number % 3]
    tau = (1.0, 2.0, 3.3)[number // 3 % 3]
    student, teacher, target = make(s, t, torch.float32, min(s, t))
    coef = coefficients(6, torch.float32, tau).to(DEVICE)
    laws.check(OP, student, teacher, coef, Targets(target, None, 0.1 * (number % 2)), DIVERGENCES[number])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_narrow_logits(dtype, divergence, tau):
    """The gradient in float32, so that the interpreter's truncation does not show: its logits are exact there."""
    student, teacher, target = make(300, 264, dtype, 264)
    arguments = (teacher, coefficients(6, torch.float32, tau).to(DEVICE), Targets(target), Divergence(divergence))
    narrow, wide = (laws.run(OP, x, *arguments) for x in (student, student.float()))
    laws.check(OP, student.float(), *arguments)
    # One rounding, or truncation.
    assert torch.allclose(narrow[1].float(), wide[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert torch.allclose(narrow[0], wide[0])


@pytest.mark.parametrize("divergence", [Divergence(name) for name in _C.divergences()], ids=str)
def test_masked_vocabulary(divergence):
    laws.masked_vocabulary(OP, divergence, torch.float32, 800, 807, DEVICE)


@pytest.mark.parametrize("divergence", [Divergence(name) for name in _C.divergences()], ids=str)
def test_masked_from_the_start(divergence):
    for columns, tau in ((40, 0.1), (600, 2.0)):
        laws.masked_from_the_start(partial(laws.run, OP), divergence, columns, tau, device=DEVICE)


def test_a_term_of_weight_0_is_left_out():
    laws.a_term_of_weight_0_is_left_out(OP, 300, DEVICE)


@pytest.mark.parametrize(
    ("divergence", "masked"),
    [("forward_kl", "student"), ("soft_ce", "student"), ("reverse_kl", "teacher"), ("symmetric_kl", "student")],
)
def test_infinite_divergence_is_reported(divergence, masked):
    for gap in (3.0, 200.0):
        laws.infinite_divergence(OP, divergence, masked, gap, 300, DEVICE)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "tvd", "dkd", "logit_mse"])
def test_nan_and_inf_reach_their_row_only(bad, side, divergence):
    laws.nan_and_inf_reach_their_row_only(OP, bad, side, torch.float32, divergence, 300, 299, DEVICE)


def test_rows_that_do_not_count_are_exact_zeros():
    laws.rows_that_do_not_count_are_exact_zeros(OP, torch.bfloat16, 300, DEVICE)


@pytest.mark.parametrize("name", _C.divergences())
def test_rows_without_a_finite_column_are_exact_zeros(name):
    laws.rows_without_a_finite_column_are_exact_zeros(OP, name, 260, DEVICE)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "logit_mse"])
def test_extreme_logits(divergence):
    laws.extreme_logits(OP, torch.float32, divergence, 520, DEVICE)


@pytest.mark.parametrize("value", [1e12, 1e37, -3e38])
def test_huge_logits(value):
    laws.huge_logits(OP, value, 300, DEVICE)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "dkd"])
def test_finite_masks(name):
    laws.finite_masks(OP, name, 600, DEVICE)


@pytest.mark.parametrize("name", _C.divergences())
def test_identical_sides_have_no_gradient(name):
    laws.identical_sides_have_no_gradient(OP, name, 300, DEVICE)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "symmetric_kl", "jsd", "skew_reverse_kl"])
def test_small_gap_keeps_its_gradient(name):
    laws.small_gap_keeps_its_gradient(OP, name, 600, DEVICE)


@pytest.mark.parametrize(("smoothing", "tau"), [(0.0, 1.0), (0.2, 2.0), (0.2, 3.0)])
def test_class_probabilities_as_labels(smoothing, tau):
    laws.class_probabilities(OP, smoothing, torch.float32, tau, 300, DEVICE)


def test_strided_rows_are_read_where_they_lie():
    laws.strided_rows_are_read_where_they_lie(OP, 300, DEVICE)


def test_bad_labels_and_temperatures_make_their_own_row_nan():
    student, teacher, target = make(300, 300, torch.float32, 300)
    target[1], target[2] = 300, -1
    coef = torch.ones(5, 6, device=DEVICE)
    coef[0, 3], coef[1, 4] = 0.0, math.inf
    loss, grad, _ = laws.run(OP, student, teacher, coef, Targets(target), Divergence("forward_kl"))
    assert loss.isnan().tolist() == [False, True, True, True, True, False]
    assert torch.equal(grad.isnan().all(1), loss.isnan())
    assert grad[[0, 5]].isfinite().all()


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_gradient_may_take_the_students_place(divergence):
    student, teacher, target = make(300, 280, torch.float32, 280)
    targets = Targets(target, None, 0.1)
    coef = coefficients(6, torch.float32, 2.0).to(DEVICE)
    arguments = ops.DenseTeacher(teacher[None], Divergence(divergence)).arguments(coef, targets)
    expected_loss, expected, no_parts = OP(student[None], *arguments)
    assert no_parts.shape == (4, 0)
    assert torch.equal(dense.dense_rows(student[None], None, *arguments)[0], expected_loss)
    assert torch.equal(FORMS.inplace(student[None], *arguments)[0], expected_loss)
    assert torch.equal(student, expected[0])


def test_rows_of_other_strides_are_refused():
    student = torch.randn(1, 8, 4, device=DEVICE).transpose(1, 2)
    arguments = ops.DenseTeacher(student, Divergence("forward_kl")).arguments(
        torch.ones(5, 4, device=DEVICE), Targets()
    )
    with pytest.raises(ValueError, match=r"student must be .* unit stride .* got \(1, 4, 8\)"):
        OP(student, *arguments)


def in_registers(student, *arguments):
    """The op in clusters of thread blocks that hold the row; its parts, which they do not have, from the others."""
    call = dense.DenseCall(*arguments)._replace(want_parts=False)
    given, programs = dense._arguments(student, student, call, True)
    assert (given["spec"].TILES_ON_CHIP.value, given["num_ctas"], programs) == (2, 2, student.shape[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDFAST_GPU", "once")
        loss, grad, _ = OP(student, *call)
    return loss, grad, OP(student, *arguments)[2]


@pytest.mark.skipif(not launch.has_clusters(torch.device(DEVICE)), reason="no clusters on this GPU or in this Triton")
@pytest.mark.parametrize("divergence", ["forward_kl", "soft_ce"])
class TestRowsInRegisters:
    @pytest.fixture(autouse=True)
    def _small_tiles(self, monkeypatch, _small_tiles):
        monkeypatch.setitem(launch.TILE_CONFIGS, "on_chip", ((512, launch.TileConfig(256, 4, 1, 2, 2)),))

    @pytest.mark.parametrize("tau", [1.0, 2.0, 3.3])
    def test_matches_oracle(self, divergence, tau):
        student, teacher, target = make(400, 400, torch.float32, 400)
        coef = coefficients(6, torch.float32, tau).to(DEVICE)
        laws.check(in_registers, student, teacher, coef, Targets(target), Divergence(divergence))

    def test_infinite_divergence_is_reported(self, divergence):
        for gap in (3.0, 200.0):
            laws.infinite_divergence(in_registers, divergence, "student", gap, 304, DEVICE)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_nan_and_inf_reach_their_row_only(self, bad, side, divergence):
        laws.nan_and_inf_reach_their_row_only(in_registers, bad, side, torch.float32, divergence, 304, 299, DEVICE)

    def test_rows_without_a_finite_column_are_exact_zeros(self, divergence):
        laws.rows_without_a_finite_column_are_exact_zeros(in_registers, divergence, 264, DEVICE)

    def test_extreme_logits(self, divergence):
        laws.extreme_logits(in_registers, torch.float32, divergence, 504, DEVICE)

    def test_finite_masks(self, divergence):
        laws.finite_masks(in_registers, divergence, 504, DEVICE)

    def test_small_gap_keeps_its_gradient(self, divergence):
        laws.small_gap_keeps_its_gradient(in_registers, divergence, 504, DEVICE)


# What the kernel reads rightly: other dtypes of numbers, strides of coef, and prototypes without tails.
HARMLESS = {"coef in halves", "coef transposed", "no tails", "a negative divergence"}


@pytest.mark.parametrize("case", [x for x in hostile.DENSE if not ("integers" in x or x in HARMLESS)])
def test_tensors_that_are_not_what_it_reads_are_named(case):
    with pytest.raises((ValueError, IndexError)):
        FORMS.losses(hostile.STUDENT, *hostile.dense(**hostile.DENSE[case]))
