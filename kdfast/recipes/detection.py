"""Detection heads: a class and a box per anchor or query."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast.loss.kd_loss import kd_loss
from kdfast.recipes._alike import require_alike
from kdfast.recipes.regression import teacher_bounded

__all__ = ["Detections", "detection_kd"]


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
