"""What the first batch shows of mistakes that would train silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdfast.cache import PackedLabels
from kdfast.distill.counting import Counting
from kdfast.distill.fields import split
from kdfast.distill.objective import KD
from kdfast.distill.step import Step
from kdfast.labels import SoftLabels
from kdfast.loss.checks import look_like_probabilities
from kdfast.models import logits_of

__all__ = ["check_first"]


def check_first(step: Step, objective: Any) -> None:
    """Look at the values of a step, once: it waits for the device.

    Raises:
        ValueError: probabilities where logits belong, labels that are no classes, or labels shifted one time too few or
            too many.
    """
    logits = _logits(step.student)
    said = step.teacher if isinstance(step.teacher, tuple) else (step.teacher,)
    for name, x in (("student", logits), *(("teacher", _logits(each)) for each in said)):
        if x is not None and look_like_probabilities(x.detach()):
            raise ValueError(f"the {name} gives probabilities (rows in [0, 1] that sum to 1): leave its softmax out")
    labels = step.labels
    if logits is None or labels is None or labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        return
    counting = Counting.of(objective)
    ignored = counting.ignore_index
    used = labels[labels != ignored]
    # What an objective of one's own takes for labels need not be classes of these logits.
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
    except TypeError:  # an objective of one's own knows what it is
        return None
    return logits if isinstance(logits, Tensor) and logits.dim() else None
