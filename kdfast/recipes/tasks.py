"""Losses of other tasks than classification: detection, segmentation, recommendation, regression."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast.labels import SoftLabels
from kdfast.labels.packed import Packed
from kdfast.loss.kd_loss import kd_loss
from kdfast.masks import as_mask
from kdfast.recipes._inputs import check_same_shape

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
    """The output of a detection head for A anchors or queries in each of N images.

    Attributes:
        logits: (N, A, classes), background included. A teacher's may be soft labels of N * A rows instead.
        boxes: (N, A, 4), in the units of the targets.
    """

    logits: Any
    boxes: Tensor


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
    """The loss of a detector: ``kd_loss`` of the classes, smooth L1 of the boxes, and ``teacher_bounded`` of the boxes.

    Source: Chen et al. 2017. As an objective of ``Distiller``, with batches of (images, (classes, boxes))::

        objective=lambda step: detection_kd(step.student, step.teacher, *step.batch[1], ce_weight=0.5),
        labels=lambda batch: batch[1][0],

    Args:
        student, teacher: what the two heads returned.
        classes: (N, A) class indices of the objects that anchors were matched with.
        boxes: (N, A, 4), the objects' boxes; any values where there is no object.
        background: the class of anchors without an object.
        foreground_weight: of an anchor with an object in the mean over anchors; others weigh 1. Anchors without an
            object are hundreds of times as many.
        ignore_index: the class of anchors that do not count. When ``Distiller`` accumulates batches, it weighs them by
            their labels that are not -100: keep -100 there, and map a matcher's -1 to it.
        box_weight: of smooth L1 against ``boxes``, summed over coordinates, the mean over anchors with an object.
        bound_weight: of ``teacher_bounded`` over the same anchors.
        margin: of ``teacher_bounded``.
        options: ``kd_loss``'s: ``temperature``, ``ce_weight``, ``divergence``, ...

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: shapes do not fit one another, or a class is negative and not ``ignore_index``.
    """
    check_same_shape(
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
    teacher: Tensor | SoftLabels | Packed,
    labels: Tensor | None = None,
    *,
    ignore_index: int = 255,
    resize: str | None = None,
    **options: Any,
) -> Tensor:
    """The loss of a segmentation: ``kd_loss`` with a row per pixel.

    It is ``kd_loss(student.movedim(1, -1), teacher.movedim(1, -1), labels, ...)``. Logits in ``torch.channels_last``
    are rows already, and nothing is copied. As an objective of ``Distiller``::

        objective=lambda step: segmentation_kd(step.logits, step.teacher, step.labels, temperature=4.0)

    ``Distiller``'s own metrics expect the classes last: to ``fit`` with an ``eval_loader`` pass ``metrics``, a function
    (distiller, eval_loader) giving numbers by name, such as the share of pixels that are right.

    Args:
        student: (N, C, H, W) logits.
        teacher: the same, or labels from a cache with a row for each pixel of the student's logits, after ``resize``,
            image after image.
        labels: (N, H, W) class indices.
        ignore_index: pixels with this label do not count, neither for the labels nor for the teacher. When
            ``Distiller`` accumulates batches, it weighs them by their labels that are not -100: use -100 where batches
            differ in how many pixels count.
        resize: "bilinear", "bicubic" or "nearest": how both logits are interpolated to the labels' resolution, or to
            the student's without labels. If None, another resolution is an error.
        options: ``kd_loss``'s: ``temperature``, ``ce_weight``, ``divergence``, ...

    Returns:
        A scalar, the mean over pixels that count.

    Raises:
        TypeError, ValueError: shapes do not fit one another, such as resolutions that differ.
    """
    maps = {"student": student, "teacher": teacher} if isinstance(teacher, Tensor) else {"student": student}
    _check_maps(**maps)
    _check_no_shift(options)
    size = student.shape[2:] if labels is None else labels.shape[1:]
    for name, logits in maps.items():
        if resize is None and logits.shape[2:] != size:
            raise ValueError(
                f"{name} has {_times(logits.shape[2:])} pixels, but {_times(size)} are wanted: "
                'resize="bilinear" interpolates its logits'
            )
    rows = [_resized(logits, size, resize).movedim(1, -1) for logits in maps.values()]
    target = rows[1] if isinstance(teacher, Tensor) else teacher
    loss: Tensor = kd_loss(rows[0], target, labels, ignore_index=ignore_index, **options)
    return loss


def channel_wise_kd(student: Tensor, teacher: Tensor, *, temperature: float = 4.0, **options: Any) -> Tensor:
    """Channel-wise distillation (CWD, Shu et al. 2021): a KL divergence over the pixels of each channel.

    It compares where in the image each class, or feature, is found: the softmax is over the H W pixels of a channel.
    The loss is T^2 times the mean of the channels' divergences, ``kd_loss(student.flatten(2), teacher.flatten(2))``.

    Args:
        student, teacher: (N, C, H, W) logits, or features of equal shape.
        temperature: T.
        options: ``kd_loss``'s; there are no labels.

    Returns:
        A scalar, the mean over images and channels.

    Raises:
        TypeError, ValueError: the two are not maps of one shape, or the teacher's requires grad.
    """
    _check_maps(student=student, teacher=teacher)
    _check_no_shift(options)
    check_same_shape("teacher", student=student, teacher=teacher)
    loss: Tensor = kd_loss(student.flatten(2), teacher.flatten(2), temperature=temperature, **options)
    return loss


def _check_no_shift(options: dict[str, Any]) -> None:
    if options.get("shift"):
        raise ValueError("shift compares a text's positions with the next one's label; pixels have no next one")


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
    """The loss of a recommender on lists of items: ``kd_loss`` over the softmax of each list's candidates.

    Source: ListNet's top-one probabilities (Cao et al. 2007).

    Args:
        student, teacher: (lists, items) scores.
        labels: (lists,), the item that was taken, where ``options`` have a ``ce_weight``.
        candidates: (lists, items) mask, bool or 0 and 1. Other items, such as padding or those seen before, have no
            probability for student or teacher. A list without candidates does not count.
        options: ``kd_loss``'s: ``temperature``, ``ce_weight``, ``divergence``, ... Not ``row_weight``.

    Returns:
        A scalar, the mean over lists.

    Raises:
        TypeError, ValueError: shapes do not fit one another, or the teacher's scores require grad.
    """
    check_same_shape("teacher", student=student, teacher=teacher)
    candidates = as_mask("candidates", candidates, student.shape)
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
    """Ranking Distillation (Tang & Wang 2018): the teacher's first k items, as if users had taken them::

        mean over lists of  -sum_r w_r log sigmoid(s[item_r]),   item_r at the teacher's place r = 0 ... k - 1

    w_r is proportional to exp(-r / decay), so that early places count most, times tanh(max(sharpness * (the student's
    rank of item_r - r), 0)), so that items which the student ranks high enough have no loss; the k weights of a list
    are then normalised. The authors' code does that only if it is told to (``weight_renormalize``): by default its loss
    is as much smaller as the second factor takes away. The paper samples the student's ranks; here they are exact. Add
    it to a loss of what users took: nothing in it lowers the scores of other items.

    Args:
        student, teacher: (lists, items) scores.
        k: how many of the teacher's places are used.
        candidates: (lists, items) bool, items that can be recommended, at least k in each list; all if None.
        decay: of the weights, in places.
        sharpness: of the second factor, per place; 0 leaves the factor out.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: shapes do not fit one another, the teacher's scores require grad, or a list has fewer
            than k candidates.
    """
    check_same_shape("teacher", student=student, teacher=teacher)
    candidates = torch.ones_like(student, dtype=torch.bool) if candidates is None else candidates
    candidates = as_mask("candidates", candidates, student.shape)
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
    """The loss of a regression, ``kd_weight * mse(student, teacher) + target_weight * mse(student, targets)``.

    Source: Ba & Caruana 2014. As an objective of ``Distiller``::

        objective=lambda step: regression_kd(step.student, step.teacher, step.batch[1])

    Args:
        student, teacher, targets: (rows, ...) values.
        kd_weight: of the teacher's term.
        target_weight: of the targets' term.
        labelled: (rows,) mask, bool or 0 and 1, of the rows that have a target; all if None. The teacher's term is over
            all rows.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: shapes differ, or the teacher's values require grad.
    """
    check_same_shape("teacher", student=student, teacher=teacher, targets=targets)
    kd = nn.functional.mse_loss(student, teacher)
    if labelled is not None:
        labelled = as_mask("labelled", labelled, student.shape[:1])
        student, targets = student[labelled], targets[labelled]
    truth = (student - targets).square().sum() / max(targets.numel(), 1)
    return kd_weight * kd + target_weight * truth


def teacher_bounded(student: Tensor, teacher: Tensor, targets: Tensor, *, margin: float = 0.0) -> Tensor:
    """The student's squared error where it is not yet better than the teacher's by ``margin``, and 0 elsewhere.

    The mean over rows of ``|s - y|^2 if |s - y|^2 + margin > |t - y|^2 else 0`` (Chen et al. 2017). The teacher is a
    bound and not a target, since its error can point away from the target.

    Args:
        student, teacher, targets: (..., values), such as the 4 offsets of a box.
        margin: 0 or more, in the squared units of the values.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: shapes differ, the teacher's values require grad, or ``margin`` is negative.
    """
    check_same_shape("teacher", student=student, teacher=teacher, targets=targets)
    if margin < 0:
        raise ValueError(f"margin must not be negative, got {margin}")
    error = (student - targets).square().sum(-1)
    bound = (teacher - targets).square().sum(-1)
    return error.where(error + margin > bound, 0.0).sum() / max(error.numel(), 1)


def gaussian_kd(
    student_mean: Tensor, student_log_variance: Tensor, teacher_mean: Tensor, teacher_log_variance: Tensor
) -> Tensor:
    """The KL divergence of two Gaussians, for regressions that predict their own uncertainty::

        KL(N(t, exp(a)) || N(s, exp(b))) = (b - a + exp(a - b) + (t - s)^2 exp(-b) - 1) / 2

    with log-variances, as networks predict them (Kendall & Gal 2017). For targets add
    ``torch.nn.functional.gaussian_nll_loss``.

    Args:
        student_mean, student_log_variance: s and b, of any shape.
        teacher_mean, teacher_log_variance: t and a, of the same shape.

    Returns:
        A scalar, the mean over all values.

    Raises:
        TypeError, ValueError: shapes differ, or the teacher's values require grad.
    """
    s, b, t, a = student_mean, student_log_variance, teacher_mean, teacher_log_variance
    check_same_shape("teacher_mean", student_mean=s, student_log_variance=b, teacher_mean=t)
    check_same_shape("teacher_log_variance", teacher_mean=t, teacher_log_variance=a)
    return (b - a + (a - b).exp() + (t - s).square() * (-b).exp() - 1).mean() / 2
