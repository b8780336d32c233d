"""``KD``: the loss of an ordinary distillation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdfast.cache import PackedLabels
from kdfast.distill.counting import without_padding
from kdfast.distill.step import Step
from kdfast.labels import SoftLabels
from kdfast.loss.kd_loss import kd_loss
from kdfast.models import logits_of

__all__ = ["KD", "MANY_CLASSES"]

# Vocabularies are padded to multiples, differently by teacher and student; few classes that differ are another task's.
MANY_CLASSES = 1000
_OURS = {"reduction", "num_items", "return_parts"}


class KD:
    """``kd_loss`` of a step's logits, teacher and labels, averaged over the rows that count::

        objective = KD(temperature=4.0, kd_weight=0.9, ce_weight=0.1)
        loss = objective(step)

    Where a batch's mapping has an ``attention_mask`` of the rows' shape, padding does not count, whatever
    ``row_weight`` says. An option may be a function of the step, such as
    ``temperature=lambda step: 4 - 3 * step.progress``. Without a teacher the loss is the labels' cross-entropy alone,
    with weight 1 whatever ``ce_weight`` says.

    Args:
        temperature, kd_weight, ce_weight: as ``kd_loss`` takes them; these three have other defaults.
        options: ``kd_loss``'s others, such as ``divergence``, ``shift`` and ``label_smoothing``.

    Raises:
        TypeError: an option that ``kd_loss`` lacks, or that a trainer decides (``reduction``, ``num_items``).
    """

    def __init__(self, *, temperature: Any = 2.0, kd_weight: Any = 0.5, ce_weight: Any = 0.5, **options: Any) -> None:
        unknown = set(options) - (set(kd_loss.__kwdefaults__ or ()) - _OURS)
        if unknown:
            raise TypeError(f"KD has no option {', '.join(sorted(unknown))}")
        self.options = {"temperature": temperature, "kd_weight": kd_weight, "ce_weight": ce_weight, **options}

    def __call__(self, step: Step) -> Tensor:
        """The loss.

        Raises:
            ValueError: several teachers, or classes that are few and differ in number.
            TypeError, ValueError: as ``kd_loss``.
        """
        options = {name: value(step) if callable(value) else value for name, value in self.options.items()}
        options = without_padding(step, options)
        if step.teacher is None:
            options |= {"kd_weight": 0.0, "ce_weight": 1.0}
            return kd_loss(step.logits, step.logits.detach(), step.labels, **options)  # type: ignore[no-any-return]
        return kd_loss(step.logits, teacher_of(step), step.labels, **options)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"KD({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"


def teacher_of(step: Step) -> Tensor | SoftLabels | PackedLabels:
    """The only teacher's logits or labels. Raises ``ValueError`` for several, or where classes do not fit."""
    teacher = step.teacher
    if isinstance(teacher, tuple):
        raise ValueError(
            f"there are {len(teacher)} teachers: kd_loss takes one. Give an objective that says how they are combined"
        )
    teacher = teacher if isinstance(teacher, (SoftLabels, PackedLabels)) else logits_of(teacher)
    teacher = teacher.unpack() if isinstance(teacher, PackedLabels) else teacher
    ours, theirs = step.logits.shape[-1], teacher.vocab_size if isinstance(teacher, SoftLabels) else teacher.shape[-1]
    if ours != theirs and max(ours, theirs) < MANY_CLASSES:
        raise ValueError(
            f"the student has {ours} classes, the teacher {theirs}. Vocabularies may differ from {MANY_CLASSES} on; "
            "for fewer, call kd_loss yourself on the columns that they share"
        )
    return teacher
