"""A student's leading dimensions as rows: which of them count, and what the row ops take for each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdfast._checks import can_look
from kdfast.labels import Head, SoftLabels
from kdfast.masks import is_mask

__all__ = ["Number", "RowLayout"]

Number = float | Tensor


class RowLayout:
    """The leading dimensions of a student's logits laid out as rows: which count, with what weights and coefficients.

    Args:
        student: (..., V) logits, or a head that makes them.
        shift: position i of (..., length, V) logits goes with label i + 1, and the last one does not count.

    Raises:
        ValueError: ``shift`` of logits without a length.
    """

    def __init__(self, student: Tensor | Head, shift: bool) -> None:
        if shift and len(student.shape) < 2:
            raise ValueError(f"shift needs (..., length, vocabulary) logits, got {tuple(student.shape)}")
        self.shift = shift
        self.shape = student.shape[:-1]
        self.count = self.shape.numel()
        self.dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        self.device = student.device

    @staticmethod
    def lay_out(x: Tensor) -> Tensor:
        """(..., V) as (outer, inner, V) with unit stride along V; a view wherever the strides allow one."""
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            x = x.contiguous()
        while x.dim() < 3:
            x = x.unsqueeze(0)
        return x.flatten(0, -3) if x.dim() > 3 else x

    def number(self, name: str, value: Number) -> Number:
        """A float, or a tensor of one number per row, of a number or a tensor as ``per_row`` takes it."""
        return self.per_row(name, value) if isinstance(value, Tensor) else float(value)

    def per_row(self, name: str, value: Tensor) -> Tensor:
        """(rows,) of a tensor of one number, of one per row, or of one where the rows' shape has several.

        Raises:
            ValueError: a tensor of another shape, under ``name``.
        """
        value = value.to(device=self.device, dtype=self.dtype)
        if value.dim() == 0:
            return value.expand(self.count)
        if value.shape != self.shape:
            value = self._expanded(name, value)
        return value.reshape(-1)

    def _expanded(self, name: str, value: Tensor) -> Tensor:
        given, dims = tuple(value.shape), len(self.shape)
        if value.dim() == dims + 1 and value.shape[-1] == 1:
            value = value.squeeze(-1)  # the vocabulary's dimension, kept
        if value.dim() == dims and self.shift and value.shape[-1] == self.shape[-1] - 1:
            value = nn.functional.pad(value, (0, 1))
        if value.dim() == dims and all(n in (1, m) for n, m in zip(value.shape, self.shape, strict=True)):
            return value.expand(self.shape)
        if value.numel() == 1:
            return value.reshape(()).expand(self.shape)
        shape = f"{tuple(self.shape)}{f' or {(*self.shape[:-1], self.shape[-1] - 1)}' if self.shift else ''}"
        per_sample = f"; one per sample is {(-1, *(1,) * (dims - 1))}" if value.dim() < dims else ""
        raise ValueError(f"{name} must be a number or a tensor of {shape}, got {given}{per_sample}")

    def marks(self, mask: Tensor) -> Tensor:
        """(rows,) numbers of a mask given as ``row_weight``: with ``shift`` that of the label a position goes with."""
        if self.shift and self._has_length(mask):
            mask = mask.roll(-1, len(self.shape) - 1)
        return self.per_row("row_weight", mask)

    def _has_length(self, x: Tensor) -> bool:
        """Whether it has a value for each position of a sequence, the last one included."""
        dims = len(self.shape)
        return x.dim() in (dims, dims + 1) and x.shape[dims - 1] == self.shape[-1] != 1

    def coefficients(
        self,
        weight: Tensor,
        scale_by_t2: bool,
        temperature: Number,
        teacher_temperature: Number,
        kd_weight: Number,
        ce_weight: Number,
        z_weight: Number,
    ) -> Tensor:
        """The ops' (5, rows) ``coef``: two temperatures as they are, three weights times the rows' ``weight``.

        A row that does not count has weight 0, and its products are exact zeros: they take its terms out.
        """
        tau, kd = self.number("temperature", temperature), self.number("kd_weight", kd_weight)
        values = [
            tau,
            self.number("teacher_temperature", teacher_temperature),
            kd * _squared(tau) if scale_by_t2 else kd,
            self.number("ce_weight", ce_weight),
            self.number("z_weight", z_weight),
        ]
        if any(isinstance(value, Tensor) for value in values):
            ones = torch.ones((2, self.count), dtype=self.dtype, device=self.device)
            rows = torch.cat([ones, weight.expand(3, -1)])
            full = [v if isinstance(v, Tensor) else torch.full_like(weight, v) for v in values]
            # Selected, not multiplied: a weight that is NaN in a row that does not count must not count either.
            return torch.where(rows == 0.0, 0.0, rows * torch.stack(full))
        table = torch.tensor(values, dtype=self.dtype, device=self.device).unsqueeze(1)
        coef = table * weight
        coef[:2] = table[:2]
        return coef

    def labels(self, labels: Tensor) -> Tensor:
        """(rows,) int64 class indices, shifted."""
        return (labels.roll(-1, -1) if self.shift else labels).reshape(-1).long().contiguous()

    def probabilities(self, labels: Tensor) -> Tensor:
        """(outer, inner, V) class probabilities, shifted."""
        return self.lay_out(labels.roll(-1, -2) if self.shift else labels)

    def counted(
        self, index: Tensor | None, ignore_index: int, row_weight: Tensor | None, teacher: Tensor | Head | SoftLabels
    ) -> Tensor:
        """(rows,) bool: labels that are not ignored, a mask as ``row_weight``, rows that are present, and ``shift``."""
        if index is None:
            counted = torch.ones(self.count, dtype=torch.bool, device=self.device)
        else:
            counted = index != ignore_index
        if self.shift:
            last = torch.arange(self.shape[-1], device=self.device) == self.shape[-1] - 1
            counted = counted & ~last.expand(self.shape).reshape(-1)
        if row_weight is not None and is_mask(row_weight):
            counted = counted & (self.marks(row_weight) != 0.0)
        if isinstance(teacher, SoftLabels) and teacher.present is not None:
            counted = counted & teacher.present
        return counted

    def weights(self, counted: Tensor, row_weight: Tensor | None, reduction: str, num_items: Number | None) -> Tensor:
        """(rows,) weights over the denominator, 0 in rows that do not count."""
        weight = ones = counted.to(self.dtype)
        if row_weight is not None and not is_mask(row_weight):
            weight = torch.where(counted, self.per_row("row_weight", row_weight), 0.0)
        elif row_weight is not None and row_weight.dtype != torch.bool and not can_look(row_weight):
            # Nobody has seen that these are 0 and 1: others would be weights, and must not pass for a mask.
            weight = torch.where(counted & (self.marks(row_weight) != 1.0), torch.nan, weight)
        if reduction != "mean":
            return weight
        if num_items is None:
            return weight / ones.sum().clamp(min=1)
        items = num_items.to(self.device, self.dtype).reshape(()) if isinstance(num_items, Tensor) else float(num_items)
        return torch.where(counted, weight / items, 0.0)

    def unflatten(self, x: Tensor) -> Tensor:
        """(rows,) in the shape of the student's leading dimensions, without the positions that ``shift`` leaves out."""
        x = x.reshape(self.shape)
        return x[..., :-1] if self.shift else x


def _squared(tau: Number) -> Number:
    # The square of a temperature of 0 must not pass for a row that does not count.
    return torch.where(tau > 0.0, tau**2, torch.nan) if isinstance(tau, Tensor) else tau**2
