"""Soft labels that a loss unpacks before it looks at them."""

from __future__ import annotations

from typing import Protocol, overload, runtime_checkable

from torch import Tensor

from kdfast.labels.head import Head
from kdfast.labels.soft_labels import SoftLabels

__all__ = ["Packed", "unpacked"]


@runtime_checkable
class Packed(Protocol):
    """Soft labels in a form of their own, as ``kdfast.cache.PackedLabels`` has compressed bytes."""

    def unpack(self) -> SoftLabels:
        """Decode the rows, on the device where the packed labels are."""


@overload
def unpacked(teacher: Tensor | SoftLabels | Packed) -> Tensor | SoftLabels: ...
@overload
def unpacked(teacher: Tensor | Head | SoftLabels | Packed) -> Tensor | Head | SoftLabels: ...
def unpacked(teacher: Tensor | Head | SoftLabels | Packed) -> Tensor | Head | SoftLabels:
    """A teacher with packed labels unpacked. Any other teacher is returned as it is."""
    if isinstance(teacher, (Tensor, Head, SoftLabels)):  # a Protocol's isinstance takes microseconds
        return teacher
    return teacher.unpack() if isinstance(teacher, Packed) else teacher
