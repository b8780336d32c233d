"""Numbers per row: hard examples, attention, temperatures; and numbers per step."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdfast import SoftLabels
from kdfast.distill import KD, Step
from kdfast.recipes import (
    HardTargets,
    anneal,
    confidence,
    disagreement,
    entropy_temperature,
    focal,
    focal_temperature,
    hardest,
    ramp_up,
    row_losses,
    sample_attention,
    soft_targets,
    temperature_of_entropy,
)
from support.recipes import gradient, make_step

IGNORE = -100


def entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


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
    assert hardest(0.5, shift=True)(step)[:, :-1].sum() == 3


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


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_rows_of_equal_entropy(share):
    teacher = torch.randn(20, 7, dtype=torch.float64) * 4
    teacher[:, 2] = -torch.inf
    tau = temperature_of_entropy(teacher, share, low=1e-3, high=1e3)
    assert torch.allclose(entropy(teacher / tau[:, None]), torch.full((20,), share * math.log(6)).double(), atol=1e-9)


def test_temperatures_stay_within_bounds():
    teacher = torch.tensor([[100.0, 0.0, 0.0], [0.1, 0.0, 0.0]])
    assert temperature_of_entropy(teacher, 0.9, low=0.5, high=4.0).tolist() == pytest.approx([4.0, 0.5])


def test_a_temperature_per_row_reaches_the_loss():
    step = make_step()
    tau = entropy_temperature(0.5)(step)
    rows = tau**2 * row_losses(
        replace(step, student=step.student / tau[:, None], teacher=step.teacher / tau[:, None]), by="kd"
    )
    assert torch.allclose(soft_targets(temperature=entropy_temperature(0.5))(step), rows.mean(), rtol=1e-9)


def test_focal_temperatures_fall_with_distance():
    step = make_step(rows=8)
    step.labels[0] = IGNORE
    tau = focal_temperature(8.0, 1.0, gamma=2.0)(step)
    distance = 1 - F.cosine_similarity(step.student, step.teacher).detach()
    expected = 8.0 + (distance[1:] ** 2).mean() - distance**2
    assert torch.allclose(tau, expected)
    with pytest.raises(ValueError, match=r"base must exceed beta \* 2\*\*gamma"):
        focal_temperature(4.0, 1.0, gamma=2.0)


def test_schedules():
    at = {x: Step(None, progress=x) for x in (0.0, 0.1, 0.25, 0.5, 1.0)}
    assert [anneal(8.0, 1.0)(step) for step in at.values()] == pytest.approx([8.0, 7.3, 6.25, 4.5, 1.0])
    assert anneal(8.0, 1.0, "cosine")(at[0.25]) == pytest.approx(1.0 + 7.0 * (1 + math.sqrt(0.5)) / 2)
    assert ramp_up(2.0)(at[0.0]) == pytest.approx(2.0 * math.exp(-5))
    assert ramp_up(2.0)(at[0.1]) == pytest.approx(2.0 * math.exp(-1.25))
    assert ramp_up(2.0)(at[0.25]) == 2.0
    with pytest.raises(ValueError, match='"linear" or "cosine"'):
        anneal(8.0, 1.0, "step")
    with pytest.raises(ValueError, match="share must be in"):
        ramp_up(1.0, 0.0)


def test_an_annealed_loss_is_the_one_at_its_temperature():
    step = make_step(progress=0.5)
    assert torch.equal(KD(temperature=anneal(4.0, 2.0))(step), KD(temperature=3.0)(step))


@pytest.mark.parametrize("make", [lambda z: z, SoftLabels.dense])
def test_hard_targets_are_the_teachers_classes(make):
    step = make_step()
    ours = HardTargets()(replace(step, teacher=make(step.teacher)))
    assert torch.allclose(ours, F.cross_entropy(step.student, step.teacher.argmax(-1)), rtol=1e-6)
    with pytest.raises(ValueError, match="needs a teacher"):
        HardTargets()(replace(step, teacher=None))


def test_soft_targets_need_no_labels():
    step = make_step(labels=False)
    log_q, log_p = ((x / 4.0).log_softmax(-1) for x in (step.student, step.teacher))
    expected = 16.0 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert torch.allclose(soft_targets()(step), expected)
