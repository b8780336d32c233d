"""Which rows of a batch count. Their number is the denominator of its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdfast.cache import PackedLabels
from kdfast.distill.fields import Fields, samples, split, tensors
from kdfast.distill.step import Step
from kdfast.labels import SoftLabels
from kdfast.masks import check_zeros_and_ones, is_mask
from kdfast.models import given_mask, row_mask

__all__ = ["Counting", "counted_rows", "rows_shape", "without_padding"]


@dataclass(frozen=True)
class Counting:
    """``kd_loss``'s rule of which rows count in the mean.

    A row counts unless its label is ``ignore_index``, it is padding, or, with ``shift``, it is the last of its sequence
    and so has no next label.
    """

    ignore_index: int = -100
    shift: bool = False

    @classmethod
    def of(cls, objective: Any) -> Counting:
        """The rule of an objective, from ``ignore_index`` and ``shift`` in its dict ``options``, if it has one."""
        options = getattr(objective, "options", {})
        return cls(options.get("ignore_index", -100), bool(options.get("shift", False)))

    def rows(self, batch: Any, fields: Fields, per_token: bool) -> Tensor:
        """Mark the rows of a batch that count: a bool per row of the student's logits, before the student has run.

        Args:
            batch: the loader's batch.
            fields: finds its parts.
            per_token: whether the student's rows are tokens. If not, and without labels, there is a row per sample.
        """
        inner, cached = split(batch)
        labels = fields.labels_of(inner)
        named = None if fields.mask is None else given_mask(inner, fields.mask)
        if labels is None:
            every = _every(fields.arguments(inner), per_token)
            counted = every if named is None else torch.ones(named.shape, dtype=torch.bool)
            if cached is not None and len(cached) != counted.numel():
                counted = _present(cached)
        elif labels.is_floating_point():
            counted = torch.ones(labels.shape[:-1], dtype=torch.bool, device=labels.device)
        else:
            counted = self.labels(labels) != self.ignore_index
        if self.shift and counted.dim() > 1:
            counted[..., -1] = False
        real = self.real(inner, counted.shape, fields.mask) if fields.mask is None or named is not None else None
        for mask in (real, None if cached is None else _present(cached)):
            if mask is not None and mask.numel() == counted.numel():
                counted = counted & mask.to(counted.device).view_as(counted)
        return counted

    def of_step(self, step: Step) -> Tensor:
        """Mark the student's rows that count, (...) bool, whether or not the teacher has labels for them."""
        counted = torch.ones(step.logits.shape[:-1], dtype=torch.bool, device=step.logits.device)
        if self.shift:
            counted[..., -1] = False
        if step.labels is not None and not step.labels.is_floating_point():
            counted = counted & (self.labels(step.labels) != self.ignore_index)
        real = self.real(split(step.batch)[0], counted.shape, step.mask)
        return counted if real is None else counted & real.to(counted.device)

    def real(self, batch: Any, rows: torch.Size, mask: str | Callable[[Any], Any] | None = None) -> Tensor | None:
        """Mark the rows that are not padding and, with ``shift``, do not predict padding: bool, of the shape ``rows``.

        None if the batch has no mask. The mask is ``row_mask``'s, and so are the errors.
        """
        real = row_mask(batch, rows, mask)
        if real is None or not self.shift:
            return real
        following = real.roll(-1, -1)
        following[..., -1] = False
        return real & following

    def labels(self, labels: Tensor) -> Tensor:
        """The class indices that the logits' positions predict: with ``shift``, those of the next position."""
        labels = labels.long()  # the ignore_index is no uint8
        if not self.shift:
            return labels
        labels = labels.roll(-1, -1)
        labels[..., -1] = self.ignore_index
        return labels


def counted_rows(step: Step, *, shift: bool = False, ignore_index: int = -100) -> Tensor:
    """Mark the rows of a step that count by ``kd_loss``'s rule: (...) bool.

    A row counts if its label is not ``ignore_index``, the teacher's soft labels are present, and it is not padding.
    With ``shift`` a row's label is that of the next position.
    """
    counted = Counting(ignore_index, shift).of_step(step)
    for output in step.teacher if isinstance(step.teacher, tuple) else (step.teacher,):
        if isinstance(output, (SoftLabels, PackedLabels)) and output.present is not None:
            counted = counted & output.present.to(counted.device).view(counted.shape)
    return counted


def without_padding(step: Step, options: dict[str, Any]) -> dict[str, Any]:
    """Options of ``kd_loss`` whose ``row_weight`` also excludes padding; ``options`` themselves without padding.

    Rows that a mask as ``row_weight`` excludes leave the denominator. Numbers do not change the denominator, so with
    these the number of rows that count is passed as ``num_items``.
    """
    rule = {"shift": bool(options.get("shift", False)), "ignore_index": options.get("ignore_index", -100)}
    real = Counting(**rule).real(split(step.batch)[0], step.logits.shape[:-1], step.mask)
    weight = options.get("row_weight")
    if real is not None and rule["shift"]:
        real = real[..., :-1]  # of positions, as kd_loss takes a mask that is shifted already
    if weight is None:
        return {**options, "row_weight": real}
    if real is None or not isinstance(weight, Tensor):
        return options
    if rule["shift"] and weight.dim() and weight.shape == step.logits.shape[:-1]:
        # A mask is of the labels and numbers are of the logits, as kd_loss has it.
        weight = weight[..., 1:] if is_mask(weight) else weight[..., :-1]
    if weight.dim() and weight.shape != real.shape:
        return options  # kd_loss says what is wrong with it
    real = real.to(weight.device)
    if is_mask(weight):
        check_zeros_and_ones("row_weight", weight, "weights are floating-point numbers: row_weight.float()")
        return {**options, "row_weight": (weight != 0) & real}
    options = {**options, "row_weight": torch.where(real, weight, 0.0)}
    if options.get("reduction", "mean") == "mean":
        options.setdefault("num_items", counted_rows(step, **rule).sum().clamp(min=1))
    return options


def rows_shape(step: Step) -> torch.Size:
    """The shape of the student's rows: its logits' without the classes; (-1,) if its output has no logits."""
    try:
        return step.logits.shape[:-1]
    except TypeError:  # the user's own objective knows what it is
        return torch.Size([-1])


def _present(labels: Any) -> Tensor:
    return torch.ones(len(labels), dtype=torch.bool) if labels.present is None else labels.present


def _every(arguments: Any, per_token: bool) -> Tensor:
    ids = _token_ids(arguments) if per_token else None
    return torch.ones(samples(arguments) if ids is None else ids.shape, dtype=torch.bool)


def _token_ids(arguments: Any) -> Tensor | None:
    """A mapping's ids, its decoder's if it has one, or the first tensor if it holds integers (samples, length)."""
    if isinstance(arguments, Mapping):
        return arguments.get("decoder_input_ids", arguments.get("input_ids"))
    first = next(tensors(arguments), None)
    return first if first is not None and first.dim() == 2 and not first.is_floating_point() else None
