"""Attention to classes, and of samples to one another."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdfast import kd_loss
from kdfast.distill import KD
from kdfast.recipes import ClassAttention, Combined, GraphAttention, class_attention
from support.recipes import CLASSES, gradient, make_step


def divergence(step, weights, temperature, keep_optimum):
    """As the formula says it."""
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


def graph(student, teacher, temperature):
    """As the formula says it: softmax over the others."""
    rows = []
    for features in (student, teacher):
        unit = features / features.norm(dim=1, keepdim=True)
        cosines = unit @ unit.T / temperature
        others = ~torch.eye(len(unit), dtype=torch.bool)
        rows.append(cosines[others].view(len(unit), -1).log_softmax(-1))
    return F.kl_div(rows[0], rows[1], log_target=True, reduction="batchmean")


def test_the_graphs_attentions_are_compared():
    step = make_step(rows=8)
    ours, expected = GraphAttention(temperature=0.3)(step), graph(step.student, step.teacher, 0.3)
    assert torch.allclose(ours, expected, rtol=1e-9)
    assert torch.allclose(gradient(ours, step.student)[0], gradient(expected, step.student)[0], atol=1e-9)


def test_only_the_geometry_counts():
    step = make_step(rows=8)
    turn = torch.linalg.qr(torch.randn(CLASSES, CLASSES, dtype=torch.float64))[0]
    turned = replace(step, student=(3.0 * step.teacher @ turn).requires_grad_())
    assert abs(GraphAttention()(turned).item()) < 1e-9
    assert GraphAttention()(step) > 1e-3
    order = torch.randperm(8)
    shuffled = replace(step, student=step.student[order], teacher=step.teacher[order], labels=step.labels[order])
    assert torch.allclose(GraphAttention()(shuffled), GraphAttention()(step))


def test_features_of_other_widths_and_rows_that_do_not_count():
    step = make_step(rows=8)
    narrow = torch.randn(8, 2, 3, dtype=torch.float64, requires_grad=True)
    wide = torch.randn(8, 11, dtype=torch.float64)
    ours = GraphAttention(features=lambda step: (narrow, wide), temperature=0.5)(step)
    assert torch.allclose(ours, graph(narrow.flatten(1), wide, 0.5))
    step.labels[0] = -100
    assert torch.allclose(GraphAttention()(step), graph(step.student[1:], step.teacher[1:], 0.1))


def test_a_sample_without_features_has_no_gradient():
    student, teacher = torch.randn(5, 3).relu(), torch.randn(5, 4)
    student[1] = 0.0
    student.requires_grad_()
    found = gradient(GraphAttention(features=lambda step: (student, teacher))(make_step()), student)[0]
    assert not found[1].any()
    assert found[0].any()


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_a_graph_of_too_few_samples_says_nothing(rows):
    step = make_step(rows=rows)
    loss = GraphAttention()(step)
    assert loss.item() == 0.0
    assert not gradient(loss, step.student)[0].any()


def test_graph_misuse():
    features = torch.randn(4, 3), torch.randn(5, 3)
    with pytest.raises(ValueError, match="of the same samples, got 4 and 5"):
        GraphAttention(features=lambda step: features)(make_step())
    with pytest.raises(ValueError, match="temperature must be positive"):
        GraphAttention(temperature=0.0)
    with pytest.raises(ValueError, match="needs a teacher"):
        GraphAttention()(replace(make_step(), teacher=None))


@pytest.mark.parametrize("objective", [GraphAttention(), ClassAttention(torch.ones(CLASSES)), Combined(KD())])
def test_a_teacher_that_could_be_trained_is_refused(objective):
    step = make_step()
    step.teacher.requires_grad_()
    with pytest.raises(ValueError, match="teacher requires grad"):
        objective(step)


def test_objectives_combine():
    step = make_step()
    ours = Combined(KD(), GraphAttention(), weights=(0.5, 3.0))(step)
    assert torch.allclose(ours, 0.5 * KD()(step) + 3.0 * GraphAttention()(step))
    assert torch.allclose(Combined(KD())(step), KD()(step))
    with pytest.raises(ValueError, match="at least one objective"):
        Combined()
    with pytest.raises(ValueError, match="1 objectives need as many weights, got 2"):
        Combined(KD(), weights=(1.0, 2.0))
