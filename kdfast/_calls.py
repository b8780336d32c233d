"""What the row ops take after the student, by name, in the order of their schemas (csrc/registration.cpp)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["DenseCall", "SparseCall"]


class DenseCall(NamedTuple):
    """``dense_rows``' arguments."""

    teacher: Tensor
    coef: Tensor
    label: Tensor | None
    label_probs: Tensor | None
    smoothing: float
    kind: int
    a: float
    b: float
    scale: float
    standardize: bool
    want_parts: bool


class SparseCall(NamedTuple):
    """``sparse_rows``' arguments."""

    ids: Tensor
    weights: Tensor
    offsets: Tensor
    tail: Tensor | None
    vocab: int
    prototype_ids: Tensor | None
    prototypes: Tensor | None
    kind: int
    a: float
    b: float
    scale: float
    coef: Tensor
    label: Tensor | None
    label_probs: Tensor | None
    smoothing: float
    want_parts: bool
