"""What the row ops take after the student, by name, in the order of their schemas."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

import kdfast._C as _C
from kdfast.divergences import Divergence

__all__ = ["KINDS", "DenseCall", "DivergenceNumbers", "SparseCall"]

KINDS: tuple[str, ...] = _C.divergences()  # a divergence's place here is its number


class DivergenceNumbers(NamedTuple):
    """A divergence as an op takes it: its place in the native list of kinds, two parameters, and a factor."""

    kind: int
    a: float
    b: float
    scale: float

    @classmethod
    def of(cls, divergence: Divergence) -> DivergenceNumbers:
        div = divergence.canonical()
        return cls(KINDS.index(div.name), div.a, div.b, 1.0 / (div.a * (1.0 - div.a)) if div.normalize else 1.0)

    def divergence(self, standardize: bool = False) -> Divergence:
        """The divergence that these are the numbers of."""
        return Divergence(KINDS[self.kind], a=self.a, b=self.b, normalize=self.scale != 1.0, standardize=standardize)


class DenseCall(NamedTuple):
    """The arguments of ``dense_rows``, ``dense_rows_grad`` and ``dense_rows_inplace`` after the student."""

    teacher: Tensor  # (outer, inner, V_t) logits
    coef: Tensor  # (5, rows)
    label: Tensor | None  # (rows,) int64
    label_probs: Tensor | None  # (outer, inner, V_s)
    smoothing: float
    kind: int
    a: float
    b: float
    scale: float
    standardize: bool
    want_parts: bool

    @property
    def divergence(self) -> Divergence:
        return DivergenceNumbers(self.kind, self.a, self.b, self.scale).divergence(self.standardize)


class SparseCall(NamedTuple):
    """The arguments of ``sparse_rows``, ``sparse_rows_grad`` and ``sparse_rows_inplace`` after the student."""

    ids: Tensor  # (nnz,) int32
    weights: Tensor  # (nnz,) float32
    offsets: Tensor  # (rows + 1,) int64
    tail: Tensor | None  # (rows,) log-mass
    vocab: int
    prototype_ids: Tensor | None  # (rows,) int64
    prototypes: Tensor | None  # (S, vocab)
    kind: int
    a: float
    b: float
    scale: float
    coef: Tensor  # (5, rows)
    label: Tensor | None  # (rows,) int64
    label_probs: Tensor | None  # (outer, inner, V_s)
    smoothing: float
    want_parts: bool

    @property
    def divergence(self) -> Divergence:
        return DivergenceNumbers(self.kind, self.a, self.b, self.scale).divergence()
