"""A loss that looks like distillation and is not."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

__all__ = ["inner_product_loss"]


def inner_product_loss(student: Tensor, teacher: Tensor) -> NoReturn:
    """-log <p, q> = -log sum_c p_c q_c, which an article calls both its entropy and its temperature loss. Refused.

    It is linear in q before the logarithm, so its least value is at the one-hot of the teacher's likeliest class, and
    not at q = p: for p = (.4, .3, .3) it is 1.0788 at q = p, and .9163 at q = (1, 0, 0). A student that minimises it
    forgets everything in the soft labels but their argmax.

    Raises:
        ValueError: always, with what to take instead.
    """
    raise ValueError(
        "-log <p, q> is refused: its optimum is the one-hot of the teacher's likeliest class, not the teacher's "
        "distribution. For that distribution take kd_loss(student, teacher, temperature=...); for hard labels "
        "kdfast.objectives.teacher_argmax_ce; for how sure the teacher is kdfast.objectives.entropy_matching"
    )
