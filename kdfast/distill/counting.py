"""Which rows of a batch count: the denominator of its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdfast.distill.fields import Fields, samples, split
from kdfast.distill.step import Step

__all__ = ["Counting", "leading"]


@dataclass(frozen=True)
class Counting:
    """``kd_loss``'s rule: rows whose label is not ignored, of a shifted sequence not the last, and padding never."""

    ignore_index: int = -100
    shift: bool = False

    @classmethod
    def of(cls, objective: Any) -> Counting:
        """The rule of an objective with ``options``, as ``KD`` has them."""
        options = getattr(objective, "options", {})
        return cls(options.get("ignore_index", -100), bool(options.get("shift", False)))

    def rows(self, batch: Any, fields: Fields, per_token: bool) -> Tensor:
        """A bool per row of what the student says of a batch.

        Args:
            batch: as the loader gave it.
            fields: where its parts are.
            per_token: whether the student's rows are tokens. Else, without labels, they are as many as samples.
        """
        inner, cached = split(batch)
        labels = fields.labels_of(inner)
        if labels is None:
            counted = _every(fields.arguments(inner), per_token) if cached is None else _present(cached)
        elif labels.is_floating_point():
            counted = torch.ones(labels.shape[:-1], dtype=torch.bool, device=labels.device)
        else:
            counted = self.labels(labels) != self.ignore_index
        for mask in (self.real(inner, counted.shape), None if cached is None else _present(cached)):
            if mask is not None and mask.numel() == counted.numel():
                counted = counted & mask.to(counted.device).view_as(counted)
        return counted

    def real(self, batch: Any, rows: torch.Size) -> Tensor | None:
        """Which rows are not padding, and predict none: by the batch's ``attention_mask``, if it is one of the rows."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is None or mask.shape != rows:
            return None
        mask = mask.bool()
        if not self.shift:
            return mask
        following = mask.roll(-1, -1)
        following[..., -1] = False
        return mask & following

    def labels(self, labels: Tensor) -> Tensor:
        """Class indices as the logits' positions predict them."""
        if not self.shift:
            return labels
        labels = labels.roll(-1, -1)
        labels[..., -1] = self.ignore_index
        return labels


def leading(step: Step) -> torch.Size:
    """The shape of the rows; of one dimension where the student's output has no logits."""
    try:
        return step.logits.shape[:-1]
    except TypeError:  # what an objective of one's own makes of it is its own affair
        return torch.Size([-1])


def _present(labels: Any) -> Tensor:
    return torch.ones(len(labels), dtype=torch.bool) if labels.present is None else labels.present


def _every(arguments: Any, per_token: bool) -> Tensor:
    if per_token and isinstance(arguments, Mapping) and "input_ids" in arguments:
        return torch.ones_like(arguments["input_ids"], dtype=torch.bool)
    return torch.ones(samples(arguments), dtype=torch.bool)
