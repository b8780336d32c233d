"""Detection, segmentation, recommendation and regression: against formulas written out in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdfast import Distiller, SoftLabels
from kdfast.recipes import (
    Detections,
    channel_wise_kd,
    detection_kd,
    gaussian_kd,
    listwise_kd,
    ranking_distillation,
    regression_kd,
    segmentation_kd,
    teacher_bounded,
)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def kl(teacher, student, temperature):
    """T^2 KL of each row."""
    p, q = (F.log_softmax(z / temperature, -1) for z in (teacher, student))
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


# ---- regression -----------------------------------------------------------------------------------------------------


def test_regression_is_two_mean_squared_errors():
    s, t, y = randn(6, 2), randn(6, 2), randn(6, 2)
    labelled = torch.tensor([True, False, True, True, False, False])
    found = regression_kd(s, t, y, kd_weight=0.25, target_weight=3.0)
    torch.testing.assert_close(found, 0.25 * (s - t).square().mean() + 3 * (s - y).square().mean())
    found = regression_kd(s, t, y.where(labelled[:, None], torch.nan), labelled=labelled)
    wanted = 0.5 * (s - t).square().mean() + 0.5 * (s - y)[labelled].square().mean()
    torch.testing.assert_close(found, wanted)
    none = torch.zeros(6, dtype=torch.bool)
    torch.testing.assert_close(regression_kd(s, t, y, labelled=none), 0.5 * (s - t).square().mean())


def test_a_student_better_than_its_teacher_is_left_alone():
    target = torch.zeros(3, 2)
    student = torch.tensor([[3.0, 4.0], [0.3, 0.4], [1.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.1, 0.0]])
    loss = teacher_bounded(student, teacher, target)
    loss.backward()
    assert loss.item() == pytest.approx(25 / 3)
    assert student.grad.tolist() == [[2.0, pytest.approx(8 / 3)], [0.0, 0.0], [0.0, 0.0]]
    assert teacher_bounded(student, teacher, target, margin=0.22).item() == pytest.approx(26 / 3)  # 1 + .22 > 1.21
    assert teacher_bounded(student[:0], teacher[:0], target[:0]).item() == 0.0


def test_gaussian_kd_is_the_divergence_of_the_distributions():
    s, b, t, a = (randn(5, 3) for _ in range(4))
    known = torch.distributions.kl_divergence(
        torch.distributions.Normal(t, (a / 2).exp()), torch.distributions.Normal(s, (b / 2).exp())
    )
    torch.testing.assert_close(gaussian_kd(s, b, t, a), known.mean())
    assert gaussian_kd(t, a, t, a).item() == 0.0


# ---- detection ------------------------------------------------------------------------------------------------------


def detections(n=2, anchors=7, classes=4):
    return Detections(randn(n, anchors, classes), randn(n, anchors, 4))


CLASSES = torch.tensor([[0, 1, 0, 3, -100, 0, 0], [0, 0, 2, -100, 0, 0, 1]])


def test_detection_is_a_weighted_mean_over_anchors_and_boxes_of_objects():
    s, t, boxes = detections(), detections(), randn(2, 7, 4)
    found = detection_kd(
        s, t, CLASSES, boxes, foreground_weight=5.0, bound_weight=0.25, box_weight=2.0, temperature=2.0, ce_weight=0.5
    )
    row = kl(t.logits, s.logits, 2.0) + 0.5 * F.cross_entropy(
        s.logits.flatten(0, 1), CLASSES.flatten(), reduction="none"
    ).view(2, 7)
    weight = torch.where(CLASSES > 0, 5.0, 1.0) * (CLASSES >= 0)
    objects = CLASSES > 0
    error, bound = ((x.boxes - boxes)[objects].square().sum(-1) for x in (s, t))
    smooth = F.smooth_l1_loss(s.boxes[objects], boxes[objects], reduction="sum") / objects.sum()
    wanted = (weight * row).sum() / weight.sum() + 2.0 * smooth + 0.25 * (error * (error > bound)).mean()
    torch.testing.assert_close(found, wanted)


def test_images_without_objects_and_ignored_anchors_have_no_boxes():
    s, t, boxes = detections(), detections(), torch.full((2, 7, 4), torch.nan, dtype=torch.float64)
    s.logits.requires_grad_(), s.boxes.requires_grad_()
    loss = detection_kd(s, t, CLASSES.clamp(max=0), boxes)
    loss.backward()
    torch.testing.assert_close(loss, kl(t.logits, s.logits, 1.0)[CLASSES >= 0].mean())
    assert not s.boxes.grad.any()
    assert not s.logits.grad[CLASSES < 0].any()
    assert detection_kd(s, t, torch.full_like(CLASSES, -100), boxes).item() == 0.0


def test_a_distiller_takes_batches_with_ignored_anchors():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.classes, self.boxes = nn.Linear(3, 28), nn.Linear(3, 28)

        def forward(self, x):
            return Detections(self.classes(x).view(-1, 7, 4), self.boxes(x).view(-1, 7, 4))

    distiller = Distiller(
        Head(),
        Head(),
        objective=lambda step: detection_kd(step.student, step.teacher, *step.batch[1], ce_weight=0.5),
        labels=lambda batch: batch[1][0],
    )
    loss = distiller.step((torch.randn(2, 3), (CLASSES, torch.randn(2, 7, 4))))
    assert loss.isfinite()


def test_a_matcher_s_own_number_for_ignored_anchors_is_named():
    s, t, boxes = detections(), detections(), randn(2, 7, 4)
    matched = CLASSES.clamp(min=-1)
    with pytest.raises(ValueError, match="must not be negative but for ignore_index=-100, got -1"):
        detection_kd(s, t, matched, boxes)
    ours, usual = detection_kd(s, t, matched, boxes, ignore_index=-1), detection_kd(s, t, CLASSES, boxes)
    torch.testing.assert_close(ours, usual)


def test_a_cached_teacher_detects_too():
    s, t, boxes = detections(), detections(), randn(2, 7, 4)
    cached = t._replace(logits=SoftLabels.dense(t.logits.flatten(0, 1)))
    torch.testing.assert_close(detection_kd(s, cached, CLASSES, boxes), detection_kd(s, t, CLASSES, boxes))


# ---- segmentation ---------------------------------------------------------------------------------------------------


def test_segmentation_is_a_row_per_pixel_that_counts():
    s, t, labels = randn(2, 5, 3, 4), randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    labels[0, 1] = 255
    found = segmentation_kd(s, t, labels, temperature=3.0, ce_weight=0.5)
    row = kl(t.movedim(1, -1), s.movedim(1, -1), 3.0)[labels != 255].mean()
    torch.testing.assert_close(found, row + 0.5 * F.cross_entropy(s, labels, ignore_index=255))


def test_a_distiller_evaluates_segmentation_by_a_function():
    networks = nn.Conv2d(1, 5, 1), nn.Conv2d(1, 5, 1)
    data = [(torch.randn(2, 1, 3, 4), torch.randint(5, (2, 3, 4)))]

    def pixels(distiller, loader):
        return {
            "accuracy": torch.stack([(distiller.student(x).argmax(1) == y).float().mean() for x, y in loader])
            .mean()
            .item()
        }

    history = Distiller(
        *networks, objective=lambda step: segmentation_kd(step.logits, step.teacher, step.labels, temperature=4.0)
    ).fit(data, epochs=1, eval_loader=data, metrics=pixels, progress=False)
    assert 0.0 <= history[0]["accuracy"] <= 1.0


def test_channels_last_logits_are_not_copied():
    features = torch.randn(2, 6, 3, 4).to(memory_format=torch.channels_last)
    logits = nn.Conv2d(6, 5, 1).to(memory_format=torch.channels_last)(features)
    before, where = logits.detach().clone(), logits.data_ptr()
    # In place, the gradient is where the logits were: a copy would leave them alone.
    segmentation_kd(logits, torch.randn(2, 5, 3, 4), backward="inplace").backward()
    assert logits.data_ptr() == where
    assert not torch.equal(logits.detach(), before)
    assert logits.detach().sum(1).abs().max() < 1e-6  # as every softmax's gradient
    with pytest.raises(ValueError, match="contiguous"):
        segmentation_kd(torch.randn(2, 5, 3, 4, requires_grad=True) * 1, before, backward="inplace")


def test_other_resolutions_are_refused_or_interpolated():
    s, t, labels = randn(1, 3, 2, 2).requires_grad_(), randn(1, 3, 4, 4), torch.randint(3, (1, 4, 4))
    with pytest.raises(ValueError, match="student has 2 x 2 pixels, but 4 x 4 are wanted"):
        segmentation_kd(s, t, labels)
    with pytest.raises(ValueError, match="teacher has 4 x 4 pixels, but 2 x 2 are wanted"):
        segmentation_kd(s, t)
    found = segmentation_kd(s, t, labels, resize="bilinear", ce_weight=1.0)
    large = F.interpolate(s, (4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, segmentation_kd(large, t, labels, ce_weight=1.0))
    found.backward()
    assert s.grad.abs().min() > 0
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        segmentation_kd(s[0], t)


def test_a_cached_teacher_has_a_row_per_pixel():
    s, t, labels = randn(2, 5, 3, 4), randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    cached = SoftLabels.dense(t.movedim(1, -1).flatten(0, 2))
    torch.testing.assert_close(segmentation_kd(s, cached, labels), segmentation_kd(s, t, labels))
    small = randn(2, 5, 2, 2)
    large = F.interpolate(small, (3, 4), mode="nearest")
    found = segmentation_kd(small, cached, labels, resize="nearest")
    torch.testing.assert_close(found, segmentation_kd(large, t, labels))


def test_channel_wise_kd_is_the_paper_s_mean_over_images():
    s, t = randn(2, 5, 3, 4), randn(2, 5, 3, 4)
    p, q = (F.log_softmax(z.flatten(2) / 4.0, -1) for z in (t, s))
    paper = 4.0**2 / 5 * (p.exp() * (p - q)).sum((1, 2)).mean()
    torch.testing.assert_close(channel_wise_kd(s, t), paper)
    with pytest.raises(ValueError, match="one shape"):
        channel_wise_kd(s, t[:, :4])


# ---- recommendation -------------------------------------------------------------------------------------------------


def test_listwise_kd_is_over_the_candidates_of_each_list():
    s, t = randn(4, 6).requires_grad_(), randn(4, 6)
    candidates = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
    loss = listwise_kd(s, t, candidates=candidates, temperature=2.0)
    loss.backward()
    rows = [kl(t[i, candidates[i]], s[i, candidates[i]], 2.0) for i in (0, 1, 3)]
    torch.testing.assert_close(loss, torch.stack(rows).mean())
    assert not s.grad[~candidates].any()
    assert s.grad[1, candidates[1]].all()


def test_ranking_distillation_weighs_what_the_student_ranks_too_low():
    teacher = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    student = torch.tensor([[0.1, 0.9, 0.3, 0.5, 0.7]], dtype=torch.float64, requires_grad=True)
    loss = ranking_distillation(student, teacher, k=3, decay=2.0, sharpness=0.5)
    # Items 0, 1, 2 at places 0, 1, 2 are at 4, 0, 3 of the student's order; item 1 is high enough.
    weight = torch.tensor([0.0, -0.5, -1.0]).exp() * torch.tensor([0.5 * 4, 0.0, 0.5 * 1]).tanh()
    weight = (weight / weight.sum()).double()
    torch.testing.assert_close(loss, -(weight * F.logsigmoid(student[0, :3])).sum(), rtol=1e-6, atol=0)
    loss.backward()
    assert (student.grad < 0).tolist() == [[True, False, True, False, False]]
    assert ranking_distillation(teacher, teacher, k=3).item() == 0.0
    plain = ranking_distillation(student, teacher, k=1, sharpness=0.0)
    torch.testing.assert_close(plain, -F.logsigmoid(student[0, 0]))


def test_ranking_distillation_takes_its_items_from_the_candidates():
    teacher, student = randn(1, 5), randn(1, 5)
    candidates = torch.tensor([[False, True, True, False, True]])
    found = ranking_distillation(student, teacher, k=2, candidates=candidates)
    kept = [1, 2, 4]
    torch.testing.assert_close(found, ranking_distillation(student[:, kept], teacher[:, kept], k=2))
    with pytest.raises(ValueError, match=r"k must lie in 1 ... 3"):
        ranking_distillation(student, teacher, k=4, candidates=candidates)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: regression_kd(x, x[:2], x), ValueError, r"student \(3, 4\), teacher \(2, 4\)"),
        (lambda x: regression_kd(x, x.clone().requires_grad_(), x), ValueError, "teacher requires grad"),
        (
            lambda x: regression_kd(x, x, x.long()),
            TypeError,
            "targets must be a floating-point tensor, got torch.int64",
        ),
        (lambda x: regression_kd(x, x, x, labelled=x[:, 0]), ValueError, r"labelled must be a bool tensor of \(3,\)"),
        (lambda x: teacher_bounded(x, x, x, margin=-1), ValueError, "margin must not be negative"),
        (lambda x: gaussian_kd(x, x, x, x.clone().requires_grad_()), ValueError, "teacher_log_variance requires grad"),
        (lambda x: listwise_kd(x, x, candidates=x), ValueError, r"candidates must be a bool tensor of \(3, 4\)"),
        (lambda x: listwise_kd(x, x[:, :3], candidates=x > 0), ValueError, "must have one shape"),
        (lambda x: segmentation_kd([x], x), TypeError, "student must be a tensor"),
        (lambda x: detection_kd(Detections(x, x), Detections(x, x[:1]), x[:, 0].long(), x), ValueError, "boxes"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(3, 4))


@pytest.mark.parametrize("loss", [segmentation_kd, channel_wise_kd])
def test_pixels_are_not_shifted(loss):
    maps = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="pixels have no next one"):
        loss(maps, maps, shift=True)
