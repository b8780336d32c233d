"""The articles' worked examples, in natural logarithms: what they should have printed, through the API."""

import math

import pytest
import torch

from kdfast import kd_loss
from kdfast.objectives import class_weighted_ce, entropy_matching, margin_ce, pairwise_hinge, teacher_argmax_ce

# One row of three classes, whose label is 0, and two rows of two.
P, Q, Y = torch.tensor([[0.4, 0.3, 0.3]]).double(), torch.tensor([[0.2, 0.5, 0.3]]).double(), torch.tensor([0])
P2, Q2 = torch.tensor([[0.8, 0.2], [0.2, 0.8]]).double(), torch.tensor([[0.9, 0.1], [0.1, 0.9]]).double()
Y2 = torch.tensor([0, 1])
T, S, T2, S2 = P.log(), Q.log(), P2.log(), Q2.log()
CE = {"kd_weight": 0.0, "ce_weight": 1.0}
HALF = {"kd_weight": 0.5, "ce_weight": 0.5}

WORKED = {
    # printed .746, from ln .2 = -2.197; a third of it where N is the number of classes
    "cross-entropy": (lambda: kd_loss(S, T, Y, **CE), 1.60944),
    # printed .242, from ln(.4 / .2) < 0; a third of it again
    "KL": (lambda: kd_loss(S, T), 0.12401),
    "reverse KL": (lambda: kd_loss(S, T, divergence="reverse_kl"), 0.11678),
    "soft cross-entropy": (lambda: kd_loss(S, T, divergence="soft_ce"), 1.21291),
    # printed .5986
    "0.7 CE + 0.3 KL": (lambda: kd_loss(S, T, Y, kd_weight=0.3, ce_weight=0.7), 1.16381),
    # printed .0876, .1366 and .1164, of which not even the last is half of the sum of the others
    "two rows, soft cross-entropy": (lambda: kd_loss(S2, T2, divergence="soft_ce"), 0.54481),
    "two rows, its sum": (lambda: kd_loss(S2, T2, divergence="soft_ce", reduction="sum"), 1.08961),
    "two rows, KL": (lambda: kd_loss(S2, T2), 0.04440),
    "two rows, its sum of KL": (lambda: kd_loss(S2, T2, reduction="sum"), 0.08881),
    "two rows, half of each": (lambda: kd_loss(S2, T2, P2, **HALF), 0.29460),
    "two rows, sum of half of each": (lambda: kd_loss(S2, T2, P2, **HALF, reduction="sum"), 0.58921),
    "two rows, labels": (lambda: kd_loss(S2, T2, Y2, **CE), 0.10536),
    "two rows, half of labels": (lambda: kd_loss(S2, T2, Y2, **HALF), 0.07488),
    "two rows, teacher's hard labels": (lambda: teacher_argmax_ce(S2, T2), 0.10536),
    # -ln .2; -ln max(q), which an article has, would be -ln .5
    "teacher's hard label": (lambda: teacher_argmax_ce(S, T), 1.60944),
    # 1.08890 of the teacher, 1.02965 of the student
    "entropy gap": (lambda: entropy_matching(S, T, squared=False), 0.05925),
    "entropy gap, squared": (lambda: entropy_matching(S, T), 0.05925**2),
    # 2 * .4 * 1.60944 + .3 * .69315
    "class weights 2, 1, 0": (lambda: class_weighted_ce(S, T, torch.tensor([2.0, 1.0, 0.0])), 1.49550),
    # .2 becomes .1, of .9: ln 9
    "margin ln 2": (lambda: margin_ce(S, Y, math.log(2)), 2.19722),
    # 1 + ln(.5 / .2) + 1 + ln(.3 / .2)
    "hinge of margin 1": (lambda: pairwise_hinge(S, Y, 1.0), 3.32176),
}


@pytest.mark.parametrize("example", WORKED)
def test_worked_example(example):
    loss, expected = WORKED[example]
    assert loss().item() == pytest.approx(expected, abs=1e-5)


def test_the_inner_product_is_least_at_the_argmax():
    """An article's -log <p, q> leaves the teacher for the one-hot of its likeliest class; KL stays where q = p."""
    one_hot = torch.tensor([[1.0, 0.0, 0.0]]).double()
    at_teacher, at_argmax = (-(P * q).sum().log().item() for q in (P, one_hot))
    assert (at_teacher, at_argmax) == pytest.approx((1.0788, 0.9163), abs=5e-5)
    logits = T.clone().requires_grad_()
    (grad,) = torch.autograd.grad(kd_loss(logits, T), logits)
    assert grad.abs().max() < 1e-12


def test_the_sign_that_an_article_has_drives_the_student_away():
    """It minimises -KL, which falls without bound as the student leaves; KL has its minimum, 0, at the teacher."""
    away = torch.tensor([[0.0, 20.0], [20.0, 0.0]]).double()
    assert kd_loss(T2, T2).item() == pytest.approx(0.0, abs=1e-12)
    assert 0.0 < kd_loss(S2, T2) < kd_loss(away, T2)


def test_t_squared_keeps_the_gradient_of_high_temperatures():
    """No article has it: without, the gradient falls as 1 / T^2, and KD with it out of a weighted sum."""
    student, teacher = torch.randn(4, 10).double().requires_grad_(), torch.randn(4, 10).double()

    def norm(temperature, **options):
        loss = kd_loss(student, teacher, temperature=temperature, **options)
        return torch.autograd.grad(loss, student)[0].norm().item()

    assert norm(64.0) == pytest.approx(norm(128.0), rel=0.02)
    assert norm(64.0, scale_by_t2=False) == pytest.approx(4 * norm(128.0, scale_by_t2=False), rel=0.02)
