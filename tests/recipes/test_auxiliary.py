"""Terms beside KD: a discriminator and a student that leave each other's gradients alone, and a graph of the batch."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast import Distiller
from kdfast.distill import KD, Step
from kdfast.recipes import Adversarial, Combined, GraphAttention, discriminator
from support.recipes import CLASSES, batches, blobs, gradient, make_step, mlp, weights_of


def both(step):
    return step.student.log_softmax(-1), step.teacher.log_softmax(-1)


def test_the_losses_are_the_formulas():
    step, judge = make_step(), discriminator(5).double()
    student, teacher = both(step)
    d_s, d_t = judge(student).sigmoid(), judge(teacher).sigmoid()
    adversarial = Adversarial(judge, weight=0.3)
    assert torch.allclose(adversarial.student_loss(student), -d_s.log().mean())
    expected = -(d_t.log().mean() + (1 - d_s).log().mean())
    assert torch.allclose(adversarial.discriminator_loss(student, teacher), expected)
    assert torch.allclose(adversarial(step), expected - 0.3 * d_s.log().mean())


def test_the_students_update_leaves_the_discriminators_gradient_alone():
    step, judge = make_step(), discriminator(5).double()
    adversarial, (student, teacher) = Adversarial(judge), both(step)
    adversarial.discriminator_loss(student, teacher).backward()
    assert step.student.grad is None
    before = [parameter.grad.clone() for parameter in judge.parameters()]
    adversarial.student_loss(student).backward()
    assert step.student.grad.abs().sum() > 0
    assert all(torch.equal(a, b.grad) for a, b in zip(before, judge.parameters(), strict=True))


def test_together_each_has_its_own_gradient():
    step, judge = make_step(), discriminator(5).double()
    adversarial, (student, teacher) = Adversarial(judge, weight=0.3), both(step)
    expected = gradient(adversarial.discriminator_loss(student, teacher), *judge.parameters())
    ours = gradient(adversarial(step), step.student, *judge.parameters())
    assert torch.allclose(ours[0], 0.3 * gradient(F.softplus(-judge(student)).mean(), step.student)[0])
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], expected, strict=True))


def test_a_constant_that_softmax_does_not_see_tells_nothing():
    step = make_step()
    adversarial = Adversarial(discriminator(5).double())
    expected = adversarial(step)
    step.teacher.add_(100.0)
    assert torch.allclose(adversarial(step), expected)


def test_the_discriminator_learns_and_the_student_moves_because_of_it():
    torch.manual_seed(3)
    student, teacher, judge = mlp(), mlp(), discriminator(3)
    data = blobs()
    adversarial = Adversarial(judge, weight=1.0)
    alone = copy.deepcopy(student)

    def verdicts():
        log_probs = student(data[0]).log_softmax(-1), teacher(data[0]).log_softmax(-1)
        return adversarial.student_loss(log_probs[0]).item(), adversarial.discriminator_loss(*log_probs).item()

    # A student that stands still: the discriminator's loss falls.
    first = verdicts()
    loop = torch.optim.Adam(judge.parameters(), 0.05)
    for _ in range(50):
        loop.zero_grad()
        log_probs = student(data[0]).log_softmax(-1), teacher(data[0]).log_softmax(-1)
        adversarial.discriminator_loss(*log_probs).backward()
        loop.step()
    trained = verdicts()
    assert trained[1] < 0.8 * first[1]

    # A discriminator that stands still: the student deceives it, by this term alone.
    before = weights_of(judge)
    for parameter in judge.parameters():
        parameter.requires_grad_(False)
    silent = KD(kd_weight=0.0, ce_weight=0.0)
    Distiller(student, teacher, objective=Combined(silent, adversarial), lr=0.05).fit(
        [data] * 30, epochs=1, progress=False
    )
    assert torch.equal(weights_of(judge), before)
    assert verdicts()[0] < 0.8 * trained[0]
    Distiller(alone, teacher, objective=silent, lr=0.02).fit([data] * 2, epochs=1, progress=False)
    assert not torch.allclose(weights_of(alone), weights_of(student), atol=1e-2)


def test_a_distiller_trains_and_keeps_both():
    student, judge = mlp(), discriminator(3)
    before = weights_of(judge)
    objective = Combined(KD(), Adversarial(judge))
    distiller = Distiller(student, mlp(), objective=objective)
    held = {id(x) for group in distiller.optimizer.param_groups for x in group["params"]}
    assert {id(x) for x in judge.parameters()} <= held
    assert any("discriminator" in name for name in objective.state_dict())
    distiller.fit(batches(*blobs()), epochs=1, progress=False)
    assert not torch.equal(weights_of(judge), before)


def test_batch_norm_of_a_discriminator_sees_its_own_update_only():
    judge = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 1)).double()
    step = make_step()
    Adversarial(judge).student_loss(both(step)[0])
    assert int(judge[0].num_batches_tracked) == 0


def test_a_batch_without_a_row_that_counts_costs_nothing():
    step = make_step()
    step.labels.fill_(-100)
    judge = discriminator(5).double()
    loss = Adversarial(judge)(step)
    assert loss.item() == 0.0
    assert all(not x.any() for x in gradient(loss, step.student, *judge.parameters()))


def test_columns_that_are_ruled_out_leave_the_loss_finite():
    step, judge = make_step(), discriminator(5).double()
    step.teacher[:, 1] = -torch.inf
    loss = Adversarial(judge)(step)
    assert all(x.isfinite().all() for x in (loss, *gradient(loss, step.student, *judge.parameters())))


def test_misuse():
    with pytest.raises(ValueError, match=r"weight must be positive, got 0\.0"):
        Adversarial(discriminator(5), weight=0.0)
    with pytest.raises(ValueError, match=r"one logit per sample, \(6,\) or \(6, 1\), got \(6, 2\)"):
        Adversarial(nn.Linear(5, 2).double())(make_step())
    with pytest.raises(ValueError, match="needs a teacher"):
        Adversarial(discriminator(5))(Step(torch.randn(3, 5)))


def graph(student, teacher, temperature):
    """The formula, written out: a softmax over the others."""
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
