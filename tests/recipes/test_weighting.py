"""Weights of rows, by their losses and by attention, and of classes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdfast import kd_loss
from kdfast.distill import KD, Step
from kdfast.recipes import (
    ClassAttention,
    class_attention,
    confidence,
    disagreement,
    focal,
    hardest,
    row_losses,
    sample_attention,
)
from support.recipes import CLASSES, entropy, gradient, make_step

IGNORE = -100


def test_row_losses_are_the_rows():
    step = make_step()
    step.labels[1] = IGNORE
    ce = F.cross_entropy(step.student, step.labels, reduction="none")
    assert torch.allclose(row_losses(step), ce)
    log_q, log_p = ((x / 3.0).log_softmax(-1) for x in (step.student, step.teacher))
    kd = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    kd[1] = 0.0
    assert torch.allclose(row_losses(step, by="kd", temperature=3.0), kd)
    assert not row_losses(step).requires_grad


def test_row_losses_of_a_sequence_are_shifted():
    step = Step(torch.randn(2, 4, 5), torch.randn(2, 4, 5), torch.randint(5, (2, 4)))
    losses = row_losses(step, shift=True)
    expected = F.cross_entropy(step.student[:, :-1].flatten(0, 1), step.labels[:, 1:].flatten(), reduction="none")
    assert torch.allclose(losses[:, :-1], expected.view(2, 3))
    assert not losses[:, -1].any()
    assert hardest(0.5, shift=True)(step).shape == (2, 3)
    assert hardest(0.5, shift=True)(step).sum() == 3


def test_probabilities_are_shifted_as_class_indices_are():
    step = Step(torch.randn(2, 4, 5), None, torch.randn(2, 4, 5).softmax(-1))
    expected = -(step.labels[:, 1:] * step.student[:, :-1].log_softmax(-1)).sum(-1)
    losses = row_losses(step, shift=True)
    assert torch.allclose(losses[:, :-1], expected)
    assert not losses[:, -1].any()


@pytest.mark.parametrize("weight", [hardest(0.5, ignore_index=-1), focal(2.0, ignore_index=-1)])
def test_another_index_is_ignored(weight):
    step = make_step()
    step.labels[[1, 4]] = -1
    rows = weight(step)
    assert not rows[[1, 4]].any()
    usual = replace(step, labels=step.labels.where(step.labels >= 0, IGNORE))
    by = {True: hardest(0.5), False: focal(2.0)}[rows.dtype == torch.bool]
    ours = KD(ignore_index=-1, row_weight=weight)(step)
    assert torch.equal(ours, KD(row_weight=by)(usual))


def test_padding_is_never_hard():
    step = Step(torch.randn(2, 4, 5), torch.randn(2, 4, 5), batch={"attention_mask": torch.tensor([[1, 1, 0, 0]] * 2)})
    mask = hardest(1.0, by="kd")(step)
    assert mask.tolist() == [[True, True, False, False]] * 2


@pytest.mark.parametrize(("share", "count"), [(0.3, 3), (0.5, 5), (0.51, 6), (1.0, 10), (0.01, 1)])
def test_the_hardest_share_of_what_counts(share, count):
    step = make_step(rows=12)
    step.labels[[0, 7]] = IGNORE
    mask, losses = hardest(share)(step), row_losses(step)
    assert mask.sum() == count
    assert not mask[[0, 7]].any()
    assert losses[mask].min() >= losses[~mask].max()


def test_the_loss_is_the_mean_over_hard_rows_and_no_other_has_a_gradient():
    step = make_step()
    mask = hardest(0.5)(step)
    ours = KD(row_weight=hardest(0.5))(step)
    expected = KD()(Step(step.student[mask], step.teacher[mask], step.labels[mask]))
    assert torch.allclose(ours, expected, rtol=1e-12)
    grad = gradient(ours, step.student)[0]
    assert not grad[~mask].any()
    assert (grad[mask].abs().sum(1) > 0).all()


def test_equal_losses_are_cut_at_the_share():
    step = Step(torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    assert hardest(0.5)(step).tolist() == [True, True, False, False]


def test_focal_weights_are_the_missing_probability_and_constants():
    step = make_step()
    weights = focal(2.0)(step)
    q_y = step.student.softmax(-1).gather(1, step.labels[:, None])[:, 0].detach()
    assert torch.allclose(weights, (1 - q_y) ** 2)
    ours = KD(kd_weight=0.0, ce_weight=1.0, row_weight=focal(2.0))(step)
    expected = ((1 - q_y) ** 2 * F.cross_entropy(step.student, step.labels, reduction="none")).mean()
    assert torch.allclose(gradient(ours, step.student)[0], gradient(expected, step.student)[0], rtol=1e-9)
    assert torch.equal(focal(0.0, by="kd")(step), torch.ones(6, dtype=torch.float64))


def test_hard_example_misuse():
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        hardest(0.0)
    with pytest.raises(ValueError, match="gamma must not be negative"):
        focal(-1.0)
    with pytest.raises(ValueError, match='must be "ce" or "kd", got \'loss\''):
        hardest(0.5, by="loss")
    with pytest.raises(ValueError, match="needs labels"):
        hardest(0.5)(make_step(labels=False))
    with pytest.raises(ValueError, match="there are 2 teachers"):
        hardest(0.5, by="kd")(make_step(teachers=2))


def test_sample_attention_moves_the_loss_and_keeps_its_scale():
    step = make_step()
    step.labels[3] = IGNORE
    weights = sample_attention(confidence, temperature=0.5)(step)
    counted = step.labels != IGNORE
    expected = 5 * (-entropy(step.teacher[counted]) / 0.5).softmax(0)
    assert torch.allclose(weights[counted], expected)
    assert weights[3] == 0
    assert torch.allclose(weights.sum(), torch.tensor(5.0).double())
    assert torch.allclose(sample_attention(disagreement, temperature=1e6)(step)[counted], torch.ones(5).double())
    assert sample_attention(disagreement)(step).argmax() == row_losses(step, by="kd").argmax()


def test_sample_attention_misuse():
    with pytest.raises(ValueError, match="temperature must be positive"):
        sample_attention(confidence, temperature=0.0)
    with pytest.raises(ValueError, match=r"one per row, \(6,\), got \(6, 5\)"):
        sample_attention(lambda step: step.teacher)(make_step())


def test_confidence_of_a_narrow_teacher_is_computed_in_float32():
    step = replace(make_step(), teacher=torch.randn(6, 5, dtype=torch.bfloat16))
    assert torch.allclose(confidence(step), -entropy(step.teacher.float()), rtol=1e-6)


def divergence(step, weights, temperature, keep_optimum):
    """The formula, written out."""
    p, q = ((x / temperature).softmax(-1) for x in (step.teacher, step.student))
    terms = p * (p / q).log() + (q - p if keep_optimum else 0.0)
    return temperature**2 * (weights * terms).sum(-1).mean()


@pytest.mark.parametrize("keep_optimum", [True, False])
def test_classes_weigh_their_terms(keep_optimum):
    step = make_step()
    weights = torch.linspace(0.0, 3.0, CLASSES, dtype=torch.float64)
    ours = ClassAttention(weights, temperature=3.0, keep_optimum=keep_optimum)(step)
    expected = divergence(step, weights, 3.0, keep_optimum)
    assert torch.allclose(ours, expected, rtol=1e-12)
    assert torch.allclose(gradient(ours, step.student)[0], gradient(expected, step.student)[0], rtol=1e-10)


def test_equal_classes_are_kl():
    step = make_step()
    ours = ClassAttention(torch.ones(CLASSES), temperature=2.0)(step)
    assert torch.allclose(ours, kd_loss(step.student, step.teacher, temperature=2.0), rtol=1e-12)


def test_the_teacher_stays_the_optimum_unless_told_otherwise():
    step = make_step()
    weights = class_attention()(step)
    at_teacher = step.teacher.clone().requires_grad_()
    for keep_optimum in (True, False):
        loss = ClassAttention(class_attention(), keep_optimum=keep_optimum)(replace(step, student=at_teacher))
        moves = gradient(loss, at_teacher)[0].abs().max() > 1e-6
        assert bool(moves) is not keep_optimum
    assert ClassAttention(weights)(step) > 0
    # Without the linear terms it is at q proportional to w p.
    reweighed = (step.teacher / 2.0 + weights.log()).mul(2.0).requires_grad_()
    loss = ClassAttention(weights, keep_optimum=False)(replace(step, student=reweighed))
    assert gradient(loss, reweighed)[0].abs().max() < 1e-12


def test_class_attention_is_a_softmax_of_mean_one():
    step = make_step()
    step.teacher[0, 0] = -torch.inf
    weights = class_attention(2.0)(step)
    assert torch.allclose(weights, CLASSES * (step.teacher / 2.0).softmax(-1))
    assert torch.isfinite(gradient(ClassAttention(class_attention(2.0))(step), step.student)[0]).all()


def test_rows_that_do_not_count_have_no_attention():
    step = make_step()
    step.labels[0] = -100
    kept = replace(step, student=step.student[1:], teacher=step.teacher[1:], labels=None)
    assert torch.allclose(ClassAttention(class_attention())(step), ClassAttention(class_attention())(kept))


def test_class_attention_misuse():
    with pytest.raises(ValueError, match=r"must not be negative, got -1\.0"):
        ClassAttention(torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"must be \(5,\) or \(6, 5\), got \(3,\)"):
        ClassAttention(torch.ones(3))(make_step())
    with pytest.raises(ValueError, match="takes one teacher, got 2"):
        ClassAttention(torch.ones(5))(make_step(teachers=2))


def test_the_hardest_rows_of_a_sequence_are_the_loss():
    step = Step(torch.randn(2, 4, 5), torch.randn(2, 4, 5), torch.randint(5, (2, 4)))
    rows = F.cross_entropy(step.student[:, :-1].flatten(0, 1), step.labels[:, 1:].flatten(), reduction="none")
    objective = KD(shift=True, kd_weight=0.0, ce_weight=1.0, row_weight=hardest(0.5, shift=True))
    assert torch.allclose(objective(step), rows.topk(3).values.mean())
    padded = Step(
        step.student, step.teacher, step.labels, {"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
    )
    real = torch.cat([rows[:2], rows[3:]])
    assert torch.allclose(objective(padded), real.topk(3).values.mean())
