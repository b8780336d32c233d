"""Weights: which rows a loss listens to most, and which classes of a row."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.distill.counting import Counting
from kdfast.distill.objective import teacher_of
from kdfast.distill.step import Step
from kdfast.loss.kd_loss import kd_loss
from kdfast.objectives._rows import TeacherRows
from kdfast.recipes._inputs import IGNORE, answers_of, counted_rows, dense_logits, wide

__all__ = [
    "ClassAttention",
    "class_attention",
    "confidence",
    "disagreement",
    "focal",
    "hardest",
    "row_losses",
    "sample_attention",
]


def sample_attention(score: Callable[[Step], Tensor], *, temperature: float = 1.0) -> Callable[[Step], Tensor]:
    """``n softmax_i(score_i / temperature)`` over the n rows that count.

    ``KD(row_weight=sample_attention(confidence))``. The weights' mean is 1: attention moves the loss between rows and
    leaves its scale.

    Args:
        score: of the step's rows, (...): ``confidence``, ``disagreement``, or one's own.
        temperature: towards 0 the best row takes all; large ones weigh all rows alike.

    Raises:
        ValueError: a temperature that is not positive.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}")

    def weights(step: Step) -> Tensor:
        counted = counted_rows(step)
        scores = score(step).detach()
        if scores.shape != counted.shape:
            raise ValueError(f"scores must be one per row, {tuple(counted.shape)}, got {tuple(scores.shape)}")
        logits = (scores / temperature).masked_fill(~counted, -torch.inf).flatten()
        share = torch.where(counted.flatten(), logits.softmax(0), 0.0)
        return (share * counted.sum()).view(counted.shape)

    return weights


def confidence(step: Step) -> Tensor:
    """Minus the teacher's entropy, in nats: rows of which it is sure come first."""
    log_p = wide(dense_logits(answers_of(step), step.logits)).log_softmax(-1)
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)


def disagreement(step: Step) -> Tensor:
    """KL(teacher || student) of each row, in nats: rows that the student has yet to learn come first."""
    return row_losses(step, by="kd")


class ClassAttention:
    """A divergence whose classes have weights, with p the teacher's and q the student's distribution at T::

        T^2 mean_i sum_c w_ic (p_ic log(p_ic / q_ic) - p_ic + q_ic)

    The article multiplies the student's probabilities by the weights, after which they are no distribution. Weighting
    the terms of KL alone, ``sum_c w_c p_c log(p_c / q_c)``, is not enough: its optimum is q proportional to w p. With
    the two linear terms (the generalised KL of Csiszar 1991, class by class) every class's part is 0 or more, and 0
    only at q = p, whatever the weights. With all of them 1 it is KL, since p and q both sum to 1.

    Args:
        weights: (V,), or a function of the step that gives (..., V) or (V,), such as ``class_attention()``.
        temperature: T, of both.
        keep_optimum: False leaves the linear terms out, for weights that are meant to change the optimum.

    Raises:
        ValueError: weights of another shape, or negative ones given as a tensor.
    """

    def __init__(
        self, weights: Tensor | Callable[[Step], Tensor], *, temperature: float = 2.0, keep_optimum: bool = True
    ) -> None:
        if isinstance(weights, Tensor) and bool((weights < 0).any()):
            raise ValueError(f"weights of classes must not be negative, got {float(weights.min())}")
        self.weights, self.temperature, self.keep_optimum = weights, temperature, keep_optimum

    def __call__(self, step: Step) -> Tensor:
        answers_of(step)
        tau, counted = self.temperature, counted_rows(step)
        rows = TeacherRows(step.logits, teacher_of(step), None, temperature=tau, row_weight=counted)
        weights = (self.weights(step) if callable(self.weights) else self.weights).detach().to(rows.student.device)
        if weights.shape not in (step.logits.shape, step.logits.shape[-1:]):
            raise ValueError(
                f"weights of classes must be {tuple(step.logits.shape[-1:])} or {tuple(step.logits.shape)}, got "
                f"{tuple(weights.shape)}"
            )
        log_p, log_q = rows.teacher_log_probs, rows.student_log_probs
        p = log_p.exp()
        terms = p * torch.where(p > 0.0, log_p - log_q, 0.0)
        if self.keep_optimum:
            terms = terms - p + log_q.exp()
        return tau**2 * rows.reduce((rows.select(weights.expand(step.logits.shape)) * terms).sum(-1))


def class_attention(temperature: float = 1.0) -> Callable[[Step], Tensor]:
    """``V softmax(z_t / temperature)`` of each row: attention to the classes that the teacher takes into account.

    Raises ``ValueError`` for a temperature that is not positive.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}")

    def weights(step: Step) -> Tensor:
        teacher = wide(dense_logits(answers_of(step), step.logits))
        return (teacher / temperature).softmax(-1) * teacher.shape[-1]

    return weights


# ---- rows by their own losses ---------------------------------------------------------------------------------------


def hardest(
    share: float, *, by: str = "ce", temperature: float = 1.0, shift: bool = False, ignore_index: int = IGNORE
) -> Callable[[Step], Tensor]:
    """The share of the batch's rows with the largest loss, as a mask: ``KD(row_weight=hardest(0.5))``.

    The others leave the denominator, so the loss is the mean over the hard rows (OHEM, Shrivastava et al. 2016). A
    share of a row counts as a row; between equal losses the earlier row is taken.

    Args:
        share: in (0, 1], of the rows that count.
        by, temperature, shift, ignore_index: which loss is meant, as ``row_losses`` takes them.

    Raises:
        ValueError: a share out of its range, or an unknown loss.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be in (0, 1], got {share}")
    _check(by)

    def weights(step: Step) -> Tensor:
        counted = counted_rows(step, shift=shift, ignore_index=ignore_index).flatten()
        losses = row_losses(step, by=by, temperature=temperature, shift=shift, ignore_index=ignore_index).flatten()
        rank = losses.masked_fill(~counted, -torch.inf).argsort(descending=True, stable=True).argsort()
        # A share such as .3 of 10 rows is 3.0000000000000004 in floating point.
        return (counted & (rank < (counted.sum() * share - 1e-6).ceil())).view(step.logits.shape[:-1])

    return weights


def focal(
    gamma: float, *, by: str = "ce", temperature: float = 1.0, shift: bool = False, ignore_index: int = IGNORE
) -> Callable[[Step], Tensor]:
    """``(1 - exp(-loss))^gamma`` of every row: ``KD(row_weight=focal(2.0))``.

    Of cross-entropy this is ``(1 - q_y)^gamma``, the focal loss (Lin et al. 2017), but that the weight is held constant
    and has no gradient. The denominator stays.

    Args:
        gamma: not negative; 0 weighs all rows alike.
        by, temperature, shift, ignore_index: which loss is meant, as ``row_losses`` takes them.

    Raises:
        ValueError: a negative gamma, or an unknown loss.
    """
    if not gamma >= 0.0:
        raise ValueError(f"gamma must not be negative, got {gamma}")
    _check(by)

    def weights(step: Step) -> Tensor:
        losses = row_losses(step, by=by, temperature=temperature, shift=shift, ignore_index=ignore_index)
        return (-torch.expm1(-losses)).clamp(min=0.0) ** gamma

    return weights


@torch.no_grad()
def row_losses(
    step: Step, *, by: str = "ce", temperature: float = 1.0, shift: bool = False, ignore_index: int = IGNORE
) -> Tensor:
    """(...) losses of the student's rows, in nats: a row that does not count has 0.

    Args:
        step: what student and teacher say.
        by: "ce", cross-entropy on the labels, or "kd", KL(teacher || student).
        temperature: of "kd"; the divergence is not scaled by its square.
        shift: position i is judged by label i + 1, as ``KD(shift=True)`` does.
        ignore_index: of rows that do not count: ``KD``'s, where it has another than -100.

    Raises:
        ValueError: labels or a teacher that ``by`` needs are not there.
    """
    _check(by)
    counted = counted_rows(step, shift=shift, ignore_index=ignore_index)
    if by == "kd":
        return kd_loss(  # type: ignore[no-any-return]
            step.logits,
            teacher_of(step),
            temperature=temperature,
            scale_by_t2=False,
            row_weight=counted,
            reduction="none",
        )
    if step.labels is None:
        raise ValueError('by="ce" needs labels, got a step without them: use by="kd"')
    labels = step.labels
    if labels.is_floating_point():
        labels = (labels.roll(-1, -2) if shift else labels).flatten(0, -2)
    else:
        labels = Counting(ignore_index, shift).labels(labels).flatten().long()
    rows = F.cross_entropy(wide(step.logits.flatten(0, -2)), labels, ignore_index=ignore_index, reduction="none")
    return torch.where(counted, rows.view(counted.shape), 0.0)


def _check(by: str) -> None:
    if by not in ("ce", "kd"):
        raise ValueError(f'by must be "ce" or "kd", got {by!r}')
