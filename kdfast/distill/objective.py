"""``KD``, the loss of an ordinary distillation, and checks for mistakes that train silently: of the first batch, and of
labels that a student has come as near to as they are to the teacher.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from kdfast._names import no_option
from kdfast.cache import PackedLabels
from kdfast.distill.counting import Counting, without_padding
from kdfast.distill.fields import split, tensors
from kdfast.distill.step import Step
from kdfast.divergences import Divergence
from kdfast.labels import SoftLabels
from kdfast.loss.checks import check_vocabularies
from kdfast.loss.kd_loss import LossParts, kd_loss
from kdfast.loss.label_values import check_distributions
from kdfast.loss.option_names import OPTION_TERMS
from kdfast.models import (
    check_classes_last,
    check_no_sigmoid,
    check_several_classes,
    logits_of,
    look_like_probabilities,
)

__all__ = ["KD", "FloorWatch", "check_first", "teacher_of"]

NEAR = 2.0  # times the floor: a label's error is then about as much of the gradient as what it teaches
_OURS = {"reduction", "num_items", "return_parts"}


class KD:
    """The objective of an ordinary distillation: ``kd_loss`` of a step, averaged over the rows that count::

        objective = KD(temperature=4.0, kd_weight=0.9, ce_weight=0.1)
        loss = objective(step)

    Padding never counts, whatever ``row_weight`` is: where the ``Distiller``'s ``mask`` is 0, or without one the
    ``attention_mask`` of a batch that is a mapping. An option may be a function of the step, such as
    ``temperature=lambda step: 4 - 3 * step.progress``. Without a teacher the loss is cross-entropy on the labels alone,
    with weight 1 whatever ``ce_weight`` is.

    Args:
        temperature, kd_weight, ce_weight: as ``kd_loss`` takes them, with defaults of their own.
        options: other options of ``kd_loss``, such as ``divergence``, ``shift`` and ``label_smoothing``.

    Raises:
        TypeError: an option that ``kd_loss`` lacks, or that the trainer sets (``reduction``, ``num_items``).
    """

    def __init__(self, *, temperature: Any = 2.0, kd_weight: Any = 0.5, ce_weight: Any = 0.5, **options: Any) -> None:
        known = set(kd_loss.__kwdefaults__ or ()) - _OURS
        if not known.issuperset(options):
            raise no_option("KD", set(options) - known, known, OPTION_TERMS)
        self.options = {"temperature": temperature, "kd_weight": kd_weight, "ce_weight": ce_weight, **options}

    def __call__(self, step: Step) -> Tensor:
        """The loss of a step, a scalar.

        Raises:
            ValueError: the step has several teachers.
            TypeError, ValueError: whatever ``kd_loss`` refuses, such as a teacher of another number of classes.
        """
        options = self._options(step)
        if step.teacher is None:
            options |= {"kd_weight": 0.0, "ce_weight": 1.0}
            return kd_loss(step.logits, step.logits.detach(), step.labels, **options)  # type: ignore[no-any-return]
        if callable(self.options["ce_weight"]) and not isinstance(options["ce_weight"], Tensor):
            # Where a schedule has brought ce_weight to 0 there is nothing to smooth.
            options["label_smoothing"] = options.get("label_smoothing", 0.0) if options["ce_weight"] else 0.0
        teacher = teacher_of(step, options.get("vocab", "same"))
        _check_temperature(teacher, options)
        return kd_loss(step.logits, teacher, step.labels, **options)  # type: ignore[no-any-return]

    def parts(self, step: Step) -> LossParts | None:
        """The parts of a step's loss, without its gradient.

        None where they have no forward KL to compare with the floor of the teacher's labels, or an option is a function
        of the step, which may count its calls.
        """
        floor = step.teacher.floor if isinstance(step.teacher, (SoftLabels, PackedLabels)) else None
        if floor is None or not math.isfinite(floor.kl) or any(map(callable, self.options.values())):
            return None
        options = self._options(step)
        weight, tau = options["kd_weight"], options.get("teacher_temperature")
        tau = options["temperature"] if tau is None else tau
        if isinstance(weight, Tensor) or not weight or isinstance(tau, Tensor) or tau != floor.temperature:
            return None
        if Divergence.of(options.get("divergence", "forward_kl")).name != "forward_kl":
            return None
        teacher = teacher_of(step, options.get("vocab", "same"))
        with torch.no_grad():
            parts: LossParts = kd_loss(step.logits, teacher, step.labels, **options, return_parts=True)[1]
        return parts

    def _options(self, step: Step) -> dict[str, Any]:
        options = {name: value(step) if callable(value) else value for name, value in self.options.items()}
        return without_padding(step, options)

    def described(self) -> dict[str, Any]:
        """All options by name, defaults included: what a checkpoint compares."""
        defaults = {name: value for name, value in (kd_loss.__kwdefaults__ or {}).items() if name not in _OURS}
        options = {**defaults, **self.options}
        return {**options, "divergence": Divergence.of(options["divergence"])}

    def __repr__(self) -> str:
        return f"KD({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"


class FloorWatch:
    """Says once in a run when the student has come about as near to its labels as these are to the teacher.

    From there on it learns what the labels lack, and a student that began nearer is pulled away from its teacher. It
    looks at a step of a run now and then, ``due``, at the cost of one more forward pass of the loss, and fetches a
    number right after that step's loss was: the host waits no longer for it.
    """

    def __init__(self, due: bool = False) -> None:
        self.due = due
        self._parts: LossParts | None = None
        self._told = False

    def see(self, objective: Any, step: Step) -> None:
        """Note the parts of a step's loss, if one is due and there is a floor that it may come near."""
        if self.due and not self._told and self._parts is None and isinstance(objective, KD):
            self._parts = objective.parts(step)

    def look(self) -> None:
        """Warn if the parts that were noted are near the floor; called when the step's loss has been fetched."""
        parts, self._parts, self.due = self._parts, None, False
        if parts is None or parts.floor is None or not (kl := float(parts.kd)) < NEAR * parts.floor:
            return
        self._told = True
        warnings.warn(
            f"the student is {kl:.2g} nats from its labels, and these lie {parts.floor:.2g} nats from the teacher's "
            "rows, which is their floor: they hold a student back that is so near, or pull it away from its teacher. "
            'Capture labels without a floor: codec="sample" (unbiased draws, for divergence="soft_ce"), "topk" with '
            'its exact tail, "dense" or "hidden". `kdfast cache info` prints the floor',
            stacklevel=2,
        )


def _check_temperature(teacher: Any, options: dict[str, Any]) -> None:
    """Raise ``ValueError``, with both ways out, if a cache's labels are of another temperature than the objective's."""
    wanted = options.get("teacher_temperature")
    wanted = options["temperature"] if wanted is None else wanted
    if not isinstance(teacher, SoftLabels) or teacher.support.any_temperature or isinstance(wanted, Tensor):
        return
    if teacher.find_temperature(wanted) is None:
        held = teacher.temperatures
        raise ValueError(
            f"the cache's {teacher.kind} soft labels hold teacher_temperature {held}, got {wanted}: give the objective "
            f"temperature={held[0] if held else 1.0}, or capture the teacher with temperatures=({wanted},)"
        )


def teacher_of(step: Step, vocab: str = "same") -> Tensor | SoftLabels | PackedLabels:
    """The logits or soft labels of a step's only teacher.

    Raises:
        ValueError: there are several teachers, or the teacher's number of classes differs from the student's by more
            than ``vocab`` allows, which is ``kd_loss``'s.
        TypeError: the teacher's output has no logits.
    """
    teacher = step.teacher
    if isinstance(teacher, tuple) and not hasattr(teacher, "logits"):
        raise ValueError(
            f"there are {len(teacher)} teachers, or one that returns a tuple of {len(teacher)}: kd_loss takes one. "
            "Give an objective that says how teachers are combined, or say by outputs=(lambda output, batch: ...) "
            "where a model's logits are"
        )
    teacher = teacher if isinstance(teacher, (SoftLabels, PackedLabels)) else logits_of(teacher)
    teacher = teacher.unpack() if isinstance(teacher, PackedLabels) else teacher
    theirs = teacher.vocab_size if isinstance(teacher, SoftLabels) else teacher.shape[-1]
    check_vocabularies(step.logits.shape[-1], theirs, vocab)
    return teacher


def check_first(step: Step, objective: Any, models: Sequence[Any] = ()) -> None:
    """Check the values of a run's first step for mistakes that would train silently. This waits for the device.

    Args:
        step: the step.
        objective: what it is for.
        models: the student and the teachers, where their outputs are in the step as they are.

    Raises:
        ValueError: probabilities instead of logits, one logit, classes that are not the last dimension, labels out of
            range, labels of several classes at once, or labels shifted twice or not at all.
    """
    logits, labels = _logits(step.student), step.labels
    several = isinstance(step.teacher, tuple) and not hasattr(step.teacher, "logits")
    outputs = step.teacher if several else (step.teacher,)
    ours = isinstance(getattr(objective, "options", None), Mapping)  # kd_loss of these logits and labels
    sure = labels is not None or any(isinstance(output, (SoftLabels, PackedLabels)) for output in outputs)
    named = zip_longest((logits, *map(_logits, outputs)), models)
    for number, (x, model) in enumerate(named):
        if x is None:
            continue
        name = "teacher" if number else "student"
        if look_like_probabilities(x.detach()):
            raise ValueError(f"the {name} gives probabilities (rows in [0, 1] that sum to 1): leave its softmax out")
        if ours:
            check_several_classes(name, x, _is_batch_of(len(x) if x.dim() else 0, step))
            if model is not None:
                check_classes_last(name, model, x, sure)
                check_no_sigmoid(name, model, x)
    if logits is None or labels is None:
        return
    if ours and labels.is_floating_point() and labels.shape == logits.shape and _uses_labels(step, objective):
        check_distributions(labels.flatten(0, -2))
    if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        return
    counting = Counting.of(objective)
    ignored = counting.ignore_index
    used = labels[labels != ignored]
    # The labels of the user's own objective need not be classes of these logits.
    if (
        hasattr(objective, "options")
        and used.numel()
        and not 0 <= int(used.min()) <= int(used.max()) < logits.shape[-1]
    ):
        raise ValueError(
            f"labels must be in [0, {logits.shape[-1]}) or {ignored}, got {int(used.min())} to {int(used.max())}"
        )
    if isinstance(objective, KD):
        _check_shift(split(step.batch)[0], labels, ignored, counting.shift)


def _is_batch_of(samples: int, step: Step) -> bool:
    """Whether a step's labels, or without any its first input, are those of so many samples."""
    if step.labels is not None:
        return step.labels.dim() > 0 and len(step.labels) == samples
    first = next(iter(tensors(split(step.batch)[0])), None)
    return first is not None and first.dim() > 1 and len(first) == samples


def _uses_labels(step: Step, objective: Any) -> bool:
    """Whether labels are more than a mark of the rows that count: without a teacher they are all there is."""
    weight = objective.options.get("ce_weight")
    return step.teacher is None or not isinstance(weight, (int, float)) or weight != 0.0


def _check_shift(batch: Any, labels: Tensor, ignored: int, shift: bool) -> None:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if ids is None or ids.shape != labels.shape or ids.shape[-1] < 2:
        return
    if not shift and _same(ids, labels, labels != ignored):
        raise ValueError("the labels are input_ids themselves, position by position: a causal model needs shift=True")
    if shift and _same(ids[..., 1:], labels[..., :-1], labels[..., :-1] != ignored):
        raise ValueError("shift=True, but the labels are already the next tokens: give input_ids as they are")


def _same(ids: Tensor, labels: Tensor, counted: Tensor) -> bool:
    return bool(counted.any()) and torch.equal(ids[counted], labels[counted])


def _logits(output: Any) -> Tensor | None:
    if output is None or isinstance(output, (SoftLabels, PackedLabels)):
        return None
    try:
        logits = logits_of(output)
    except TypeError:  # the user's own objective knows what it is
        return None
    return logits if isinstance(logits, Tensor) and logits.dim() else None
