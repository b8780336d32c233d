"""Weights of rows for ``KD(row_weight=...)``, by several rules, and a divergence whose classes have weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.distill.counting import Counting
from kdfast.distill.objective import teacher_of
from kdfast.distill.step import Step
from kdfast.loss.kd_loss import kd_loss
from kdfast.objectives._rows import PairedRows
from kdfast.recipes._inputs import IGNORE, counted_rows, teacher_logits, teacher_target, widened

__all__ = [
    "ClassAttention",
    "class_attention",
    "confidence",
    "confident",
    "disagreement",
    "focal",
    "hardest",
    "row_losses",
    "sample_attention",
]


# ---- rows by a score of student or teacher --------------------------------------------------------------------------


def sample_attention(score: Callable[[Step], Tensor], *, temperature: float = 1.0) -> Callable[[Step], Tensor]:
    """Make a function that weighs rows by ``n softmax_i(score_i / temperature)`` over the n rows that count::

        KD(row_weight=sample_attention(confidence))

    The weights' mean is 1: attention moves the loss between rows and leaves its scale.

    Args:
        score: a function of the step giving the rows' scores, (...): ``confidence``, ``disagreement``, or another.
        temperature: near 0 the row of the highest score gets all weight; large ones weigh all rows alike.

    Raises:
        ValueError: the temperature is not positive; or, when it is called, there is not one score per row.
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
    """(...) scores of the step's rows: minus the entropy of the teacher's distribution, in nats.

    For ``sample_attention``: rows of which the teacher is sure weigh most.
    """
    log_p = widened(teacher_logits(step)).log_softmax(-1)
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)


def disagreement(step: Step) -> Tensor:
    """(...) scores of the step's rows: KL(teacher || student), in nats.

    For ``sample_attention``: rows that the student has yet to learn weigh most.
    """
    return row_losses(step, by="kd")


def confident(threshold: float) -> Callable[[Step], Tensor]:
    """Make a function that weighs rows 1 where the teacher's largest probability reaches ``threshold``, else 0::

        KD(row_weight=confident(0.8))

    Source: FixMatch, Sohn et al. 2020. The weights are numbers and no mask: the mean stays one over all rows, so that a
    batch of which the teacher is sure weighs more than one where it guesses.

    Raises:
        ValueError: ``threshold`` is not in [0, 1].
    """
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")

    def weights(step: Step) -> Tensor:
        probs = widened(teacher_logits(step)).softmax(-1)
        return (probs.amax(-1) >= threshold).float()

    return weights


# ---- classes --------------------------------------------------------------------------------------------------------


class ClassAttention:
    """An objective whose classes have weights, with p the teacher's and q the student's distribution at T::

        T^2 mean_i sum_c w_ic (p_ic log(p_ic / q_ic) - p_ic + q_ic)

    The article multiplies the student's probabilities by the weights, after which they are no distribution. Weighting
    the terms of KL alone, ``sum_c w_c p_c log(p_c / q_c)``, is not enough: its optimum is q proportional to w p. With
    the two linear terms (the generalised KL of Csiszar 1991, class by class) the term of each class is 0 or more, and 0
    only at q = p, whatever the weights. With all weights 1 the sum is KL, since p and q both sum to 1.

    Args:
        weights: (V,), or a function of the step giving (..., V) or (V,), such as ``class_attention()``.
        temperature: T, of both distributions.
        keep_optimum: False leaves the linear terms out, for weights that are meant to change the optimum.

    Raises:
        ValueError: the weights have another shape, or are negative and given as a tensor.
    """

    def __init__(
        self, weights: Tensor | Callable[[Step], Tensor], *, temperature: float = 2.0, keep_optimum: bool = True
    ) -> None:
        if isinstance(weights, Tensor) and bool((weights < 0).any()):
            raise ValueError(f"weights of classes must not be negative, got {float(weights.min())}")
        self.weights, self.temperature, self.keep_optimum = weights, temperature, keep_optimum

    def __call__(self, step: Step) -> Tensor:
        tau, counted = self.temperature, counted_rows(step)
        rows = PairedRows(step.logits, teacher_target(step), None, temperature=tau, row_weight=counted)
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
    """Make a function that weighs each row's classes by ``V softmax(z_t / temperature)`` of the teacher's logits::

        ClassAttention(class_attention())

    V is the number of classes. Those that the teacher takes into account weigh most; a row's weights have the mean 1.

    Raises:
        ValueError: the temperature is not positive.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}")

    def weights(step: Step) -> Tensor:
        teacher = widened(teacher_logits(step))
        return (teacher / temperature).softmax(-1) * teacher.shape[-1]

    return weights


# ---- rows by their own losses ---------------------------------------------------------------------------------------


def hardest(
    share: float, *, by: str = "ce", temperature: float = 1.0, shift: bool = False, ignore_index: int = IGNORE
) -> Callable[[Step], Tensor]:
    """Make a function that masks all rows of a batch but the share with the largest loss::

        KD(row_weight=hardest(0.5))

    Online hard-example mining (OHEM, Shrivastava et al. 2016): masked rows leave the denominator, so the loss is the
    mean over the hard rows. Their number is rounded up; between equal losses the earlier row is taken.

    Args:
        share: of the rows that count, in (0, 1].
        by, temperature, shift, ignore_index: which loss is meant, as ``row_losses`` takes them. With ``shift`` the mask
            leaves out the last position, as ``kd_loss`` takes a mask of positions.

    Raises:
        ValueError: ``share`` is not in (0, 1], or ``by`` is unknown.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be in (0, 1], got {share}")
    _check(by)

    def weights(step: Step) -> Tensor:
        counted = counted_rows(step, shift=shift, ignore_index=ignore_index).flatten()
        losses = row_losses(step, by=by, temperature=temperature, shift=shift, ignore_index=ignore_index).flatten()
        rank = losses.masked_fill(~counted, -torch.inf).argsort(descending=True, stable=True).argsort()
        # A share such as .3 of 10 rows is 3.0000000000000004 in floating point.
        hard = (counted & (rank < (counted.sum() * share - 1e-6).ceil())).view(step.logits.shape[:-1])
        return hard[..., :-1] if shift else hard  # of positions: a mask as long as the labels is theirs

    return weights


def focal(
    gamma: float, *, by: str = "ce", temperature: float = 1.0, shift: bool = False, ignore_index: int = IGNORE
) -> Callable[[Step], Tensor]:
    """Make a function that weighs each row by ``(1 - exp(-loss))^gamma``: ``KD(row_weight=focal(2.0))``.

    With cross-entropy for the loss this is ``(1 - q_y)^gamma``, as in the focal loss (Lin et al. 2017), except that the
    weight is a constant and has no gradient. The denominator of the mean stays the number of rows.

    Args:
        gamma: 0 or more; 0 weighs all rows alike.
        by, temperature, shift, ignore_index: which loss is meant, as ``row_losses`` takes them.

    Raises:
        ValueError: ``gamma`` is negative, or ``by`` is unknown.
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
    """(...) losses of a step's rows, in nats, without gradients; 0 for a row that does not count.

    Args:
        step: the outputs of student and teacher for a batch.
        by: "ce", cross-entropy on the labels, or "kd", KL(teacher || student).
        temperature: of "kd"; the divergence is not scaled by its square.
        shift: position i is judged by label i + 1, as with ``KD(shift=True)``.
        ignore_index: the label of rows that do not count, the same as the objective's.

    Raises:
        ValueError: ``by`` is unknown, or the step lacks the labels or the teacher that it needs.
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
    rows = F.cross_entropy(widened(step.logits.flatten(0, -2)), labels, ignore_index=ignore_index, reduction="none")
    return torch.where(counted, rows.view(counted.shape), 0.0)


def _check(by: str) -> None:
    if by not in ("ce", "kd"):
        raise ValueError(f'by must be "ce" or "kd", got {by!r}')
