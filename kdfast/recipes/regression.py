"""Regression: the teacher's values beside the targets, as an upper bound, or as a Gaussian."""

from __future__ import annotations

from torch import Tensor, nn

from kdfast.recipes._alike import require_alike, require_mask

__all__ = ["gaussian_kd", "regression_kd", "teacher_bounded"]


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
