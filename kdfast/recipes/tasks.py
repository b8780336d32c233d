"""Losses of other tasks than classification: detection, segmentation, recommendation, regression."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast.cache.read.packed import PackedLabels
from kdfast.labels import SoftLabels
from kdfast.loss.kd_loss import kd_loss
from kdfast.recipes._inputs import require_alike, require_mask

__all__ = [
    "Detections",
    "channel_wise_kd",
    "detection_kd",
    "gaussian_kd",
    "listwise_kd",
    "ranking_distillation",
    "regression_kd",
    "segmentation_kd",
    "teacher_bounded",
]


# ---- detection ------------------------------------------------------------------------------------------------------


class Detections(NamedTuple):
    """What a head says of A anchors or queries in each of N images."""

    logits: Any  # a tensor of (N, A, classes), background included; a teacher's may be the labels of N * A rows
    boxes: Tensor  # (N, A, 4), in whatever units the targets have


def detection_kd(
    student: Detections,
    teacher: Detections,
    classes: Tensor,
    boxes: Tensor,
    *,
    background: int = 0,
    foreground_weight: float = 1.0,
    ignore_index: int = -100,
    box_weight: float = 1.0,
    bound_weight: float = 0.5,
    margin: float = 0.0,
    **options: Any,
) -> Tensor:
    """``kd_loss`` of the classes, smooth L1 of the boxes, and the teacher's error as a bound (Chen et al. 2017).

    As an objective of ``Distiller``, with batches of (images, (classes, boxes))::

        objective=lambda step: detection_kd(step.student, step.teacher, *step.batch[1], ce_weight=0.5),
        labels=lambda batch: batch[1][0],

    Args:
        student, teacher: as ``Detections``.
        classes: (N, A) class indices of the objects that anchors were matched with.
        boxes: (N, A, 4) the objects' boxes; not looked at where there is none.
        background: the class of anchors without an object.
        foreground_weight: of an anchor with an object in the mean over anchors; others weigh 1. Anchors without one
            are hundreds of times as many.
        ignore_index: the class of anchors that do not count. -100 is what ``Distiller`` leaves out where it weighs the
            batches that it accumulates: keep to it there, and map a matcher's -1 to it.
        box_weight: of smooth L1 against ``boxes``: summed over coordinates, the mean over anchors with an object.
        bound_weight: of ``teacher_bounded``, whose ``margin`` is that, over the same anchors.
        options: ``kd_loss``'s: ``temperature``, ``ce_weight``, ``divergence``, ...

    Raises:
        TypeError, ValueError: parts that do not fit one another, or classes that are negative and not ignored.
    """
    require_alike(
        "teacher's boxes", **{"student's boxes": student.boxes, "teacher's boxes": teacher.boxes, "boxes": boxes}
    )
    counted = classes != ignore_index
    if bool((counted & (classes < 0)).any()):
        raise ValueError(f"classes must not be negative but for ignore_index={ignore_index}, got {int(classes.min())}")
    objects = (classes != background) & counted
    weight = torch.where(objects, foreground_weight, 1.0)
    total = weight[counted].sum().clamp(min=torch.finfo(weight.dtype).tiny)
    loss: Tensor = kd_loss(
        student.logits,
        teacher.logits,
        classes,
        row_weight=weight,
        num_items=total,
        ignore_index=ignore_index,
        **options,
    )
    ours, theirs, truth = student.boxes[objects], teacher.boxes[objects], boxes[objects]
    distance = nn.functional.smooth_l1_loss(ours, truth, reduction="sum") / max(len(truth), 1)
    return loss + box_weight * distance + bound_weight * teacher_bounded(ours, theirs, truth, margin=margin)


# ---- segmentation ---------------------------------------------------------------------------------------------------


def segmentation_kd(
    student: Tensor,
    teacher: Tensor | SoftLabels | PackedLabels,
    labels: Tensor | None = None,
    *,
    ignore_index: int = 255,
    resize: str | None = None,
    **options: Any,
) -> Tensor:
    """``kd_loss`` over pixels: ``kd_loss(student.movedim(1, -1), teacher.movedim(1, -1), labels, ...)``.

    Logits of a network in ``torch.channels_last`` are rows as they are, and nothing is copied. As an objective of
    ``Distiller``::

        objective=lambda step: segmentation_kd(step.logits, step.teacher, step.labels, temperature=4.0)

    ``Distiller``'s own metrics want the classes last: to ``fit`` with an ``eval_loader`` pass ``metrics``, a function
    (distiller, eval_loader) giving numbers by name, such as the share of pixels that are right.

    Args:
        student, teacher: (N, C, H, W) logits. Cached labels of a teacher have a row per pixel of the student's, or of
            what it is resized to, images one after another.
        labels: (N, H, W) class indices.
        ignore_index: pixels with this label do not count, neither for the labels nor for the teacher. ``Distiller``
            weighs batches that it accumulates by their labels that are not -100: use that where they differ in pixels
            that do not count.
        resize: "bilinear", "bicubic" or "nearest": bring the logits of both to the labels' resolution, or to the
            student's without labels. Without it another resolution is an error.
        options: ``kd_loss``'s: ``temperature``, ``ce_weight``, ``divergence``, ...

    Raises:
        TypeError, ValueError: bad arguments, such as resolutions that differ.
    """
    maps = {"student": student, "teacher": teacher} if isinstance(teacher, Tensor) else {"student": student}
    _check_maps(**maps)
    size = student.shape[2:] if labels is None else labels.shape[1:]
    for name, logits in maps.items():
        if resize is None and logits.shape[2:] != size:
            raise ValueError(
                f"{name} has {_times(logits.shape[2:])} pixels, but {_times(size)} are wanted: "
                'resize="bilinear" interpolates its logits'
            )
    rows = [_resized(logits, size, resize).movedim(1, -1) for logits in maps.values()]
    answers = rows[1] if isinstance(teacher, Tensor) else teacher
    loss: Tensor = kd_loss(rows[0], answers, labels, ignore_index=ignore_index, **options)
    return loss


def channel_wise_kd(student: Tensor, teacher: Tensor, *, temperature: float = 4.0, **options: Any) -> Tensor:
    """``kd_loss(student.flatten(2), teacher.flatten(2), temperature=T)``: where in the picture each class is.

    CWD (Shu et al. 2021): a softmax over the pixels of each channel, T^2/C times the sum of the channels' KL,
    the mean over images. It serves feature maps, too.

    Args:
        student, teacher: (N, C, H, W) logits, or features of equal shape.
        options: ``kd_loss``'s; there are no labels.

    Raises:
        TypeError, ValueError: bad arguments, such as shapes that differ.
    """
    _check_maps(student=student, teacher=teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    loss: Tensor = kd_loss(student.flatten(2), teacher.flatten(2), temperature=temperature, **options)
    return loss


def _check_maps(**maps: Tensor) -> None:
    for name, logits in maps.items():
        if not isinstance(logits, Tensor):
            raise TypeError(f"{name} must be a tensor of (N, C, H, W) logits, got {type(logits).__name__}")
        if logits.dim() != 4:
            raise ValueError(f"{name} must be (N, C, H, W) logits, got {tuple(logits.shape)}")


def _resized(logits: Tensor, size: tuple[int, ...], mode: str | None) -> Tensor:
    if mode is None or logits.shape[2:] == size:
        return logits
    corners = None if mode == "nearest" else False
    return nn.functional.interpolate(logits, tuple(size), mode=mode, align_corners=corners)


def _times(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


# ---- recommendation -------------------------------------------------------------------------------------------------


def listwise_kd(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, *, candidates: Tensor, **options: Any
) -> Tensor:
    """``kd_loss`` over the softmax of each list's candidates: ListNet's top-one probabilities (Cao et al. 2007).

    Args:
        student, teacher: (lists, items) scores.
        labels: (lists,) the item that was taken, where ``options`` have a ``ce_weight``.
        candidates: (lists, items) bool: the others are padding, or seen before, and have no probability on either
            side. A list without candidates does not count.
        options: ``kd_loss``'s: ``temperature``, ``ce_weight``, ``divergence``, ... Not ``row_weight``.

    Raises:
        TypeError, ValueError: bad arguments.
    """
    require_alike("teacher", student=student, teacher=teacher)
    require_mask("candidates", candidates, student.shape)
    s, t = (scores.masked_fill(~candidates, -torch.inf) for scores in (student, teacher))
    loss: Tensor = kd_loss(s, t, labels, row_weight=candidates.any(-1), **options)
    return loss


def ranking_distillation(
    student: Tensor,
    teacher: Tensor,
    *,
    k: int,
    candidates: Tensor | None = None,
    decay: float = 10.0,
    sharpness: float = 0.1,
) -> Tensor:
    """The teacher's first k items as if a user had taken them: ``-sum_r w_r log sigmoid(s[item_r])``, mean over lists.

    Ranking Distillation (Tang & Wang 2018): w_r is proportional to exp(-r / decay), the early places
    counting most, times tanh(max(sharpness * (the student's rank of item_r - r), 0)), so that items which the student
    ranks high enough have no loss; then normalised over the k places. The paper samples the student's ranks, which here
    are exact. It is added to a loss of what users took, for nothing in it holds other items down.

    Args:
        student, teacher: (lists, items) scores.
        k: places of the teacher's order.
        candidates: (lists, items) bool: items that can be recommended; at least k in each list.
        decay: in places.
        sharpness: per place; 0 switches the second factor off.

    Raises:
        TypeError, ValueError: bad arguments.
    """
    require_alike("teacher", student=student, teacher=teacher)
    candidates = torch.ones_like(student, dtype=torch.bool) if candidates is None else candidates
    require_mask("candidates", candidates, student.shape)
    fewest = int(candidates.sum(-1).min())
    if not 1 <= k <= fewest:
        raise ValueError(f"k must lie in 1 ... {fewest}, which is how many candidates the shortest list has, got {k}")
    top = teacher.masked_fill(~candidates, -torch.inf).topk(k).indices
    place = torch.arange(k, dtype=student.dtype, device=student.device)
    weight = (-place / decay).exp().expand(top.shape)
    if sharpness > 0:
        scores = student.detach().masked_fill(~candidates, -torch.inf)
        rank = (scores[:, None] > scores.gather(1, top)[..., None]).sum(-1)
        weight = weight * (sharpness * (rank - place)).clamp(min=0).tanh()
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return -(weight * nn.functional.logsigmoid(student.gather(1, top))).sum(-1).mean()


# ---- regression -----------------------------------------------------------------------------------------------------


def regression_kd(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    *,
    kd_weight: float = 0.5,
    target_weight: float = 0.5,
    labelled: Tensor | None = None,
) -> Tensor:
    """``kd_weight * mse(student, teacher) + target_weight * mse(student, targets)`` (Ba & Caruana 2014).

    As an objective of ``Distiller``::

        objective=lambda step: regression_kd(step.student, step.teacher, step.batch[1])

    Args:
        student, teacher, targets: (rows, ...) values.
        labelled: (rows,) bool: only these rows have a target. The teacher's term is over all rows.

    Raises:
        TypeError, ValueError: shapes that differ, or a teacher that requires grad.
    """
    require_alike("teacher", student=student, teacher=teacher, targets=targets)
    kd = nn.functional.mse_loss(student, teacher)
    if labelled is not None:
        require_mask("labelled", labelled, student.shape[:1])
        student, targets = student[labelled], targets[labelled]
    truth = (student - targets).square().sum() / max(targets.numel(), 1)
    return kd_weight * kd + target_weight * truth


def teacher_bounded(student: Tensor, teacher: Tensor, targets: Tensor, *, margin: float = 0.0) -> Tensor:
    """The student's squared error where it is not yet better than the teacher's by ``margin``, and 0 elsewhere.

    The mean over rows of ``|s - y|^2 if |s - y|^2 + margin > |t - y|^2 else 0`` (Chen et al. 2017): a teacher's
    regression can point away from the target, so that it is a bound and no target itself.

    Args:
        student, teacher, targets: (..., values), such as the 4 offsets of a box.

    Raises:
        TypeError, ValueError: shapes that differ, a teacher that requires grad, or a negative margin.
    """
    require_alike("teacher", student=student, teacher=teacher, targets=targets)
    if margin < 0:
        raise ValueError(f"margin must not be negative, got {margin}")
    error = (student - targets).square().sum(-1)
    bound = (teacher - targets).square().sum(-1)
    return error.where(error + margin > bound, 0.0).sum() / max(error.numel(), 1)


def gaussian_kd(
    student_mean: Tensor, student_log_variance: Tensor, teacher_mean: Tensor, teacher_log_variance: Tensor
) -> Tensor:
    """KL(N(t, exp(a)) || N(s, exp(b))), the mean over all values: a teacher that knows where it is unsure.

    ``(b - a + exp(a - b) + (t - s)^2 exp(-b) - 1) / 2``, with log-variances as networks give them (Kendall & Gal 2017).
    Labels of its own the student takes through ``torch.nn.functional.gaussian_nll_loss``.

    Raises:
        TypeError, ValueError: shapes that differ, or a teacher that requires grad.
    """
    s, b, t, a = student_mean, student_log_variance, teacher_mean, teacher_log_variance
    require_alike("teacher_mean", student_mean=s, student_log_variance=b, teacher_mean=t)
    require_alike("teacher_log_variance", teacher_mean=t, teacher_log_variance=a)
    return (b - a + (a - b).exp() + (t - s).square() * (-b).exp() - 1).mean() / 2
