"""Segmentation: (N, C, H, W) logits, a row per pixel or a row per channel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kdfast.cache.read.packed import PackedLabels
from kdfast.labels import SoftLabels
from kdfast.loss.kd_loss import kd_loss

__all__ = ["channel_wise_kd", "segmentation_kd"]


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
