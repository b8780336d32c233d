"""The plain recipe: a student learns a teacher's distribution, or its likeliest class."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdfast.distill.counting import without_padding
from kdfast.distill.objective import KD, teacher_of
from kdfast.distill.step import Step
from kdfast.objectives.teacher_argmax import teacher_argmax_ce
from kdfast.recipes._rows import answers_of

__all__ = ["HardTargets", "soft_targets"]


def soft_targets(*, temperature: float = 4.0, **options: Any) -> KD:
    """``KD`` without labels: ``T^2 KL(softmax(z_t / T) || softmax(z_s / T))`` (Hinton et al. 2015).

    One article has the sign of KL turned round, so that training drives the student away; another divides it by the
    number of classes; none has the T^2, without which the gradient shrinks as 1 / T^2. ``options`` are ``KD``'s.
    """
    return KD(**{"temperature": temperature, "kd_weight": 1.0, "ce_weight": 0.0, **options})


class HardTargets:
    """``-log q_c`` at the teacher's likeliest class c: pseudo-labels, for data that have no others.

    The articles have ``-sum t log max(q)`` and ``-sum max(q) log p`` here: the first rewards any sure student, the
    second has student and teacher swapped.

    Args:
        options: ``kd_loss``'s, such as ``row_weight`` and ``ignore_index``, or functions of the step. Padding does not
            count, as in ``KD``.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def __call__(self, step: Step) -> Tensor:
        answers_of(step)
        options = {name: option(step) if callable(option) else option for name, option in self.options.items()}
        options = without_padding(step, options)
        return teacher_argmax_ce(step.logits, teacher_of(step), step.labels, **options)  # type: ignore[no-any-return]
