"""Soft labels that hold the whole rows of a teacher: its logits, or the hidden states that they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from kdfast.divergences import DIVERGENCES
from kdfast.labels.head import OutputLayer
from kdfast.labels.soft_labels import SoftLabels, Support

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Dense", "Hidden", "Whole"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Whole(SoftLabels):
    """Labels that know every column of their rows: they serve every divergence at every temperature."""

    support: ClassVar[Support] = Support(dict.fromkeys(DIVERGENCES, "exact"), any_temperature=True, standardize=True)

    def __len__(self) -> int:
        return self.values.shape[0]

    def argmax(self) -> Tensor:
        return self.to_dense().values.argmax(-1)


@dataclass(frozen=True, kw_only=True, repr=False)
class Dense(Whole):
    """Labels whose ``values`` are (rows, vocab) logits. ``SoftLabels.dense`` makes them."""

    kind: ClassVar[str] = "dense"

    def to_dense(self) -> Dense:
        return self

    def shard(self, columns: slice) -> Self:
        values = self.values[:, columns]
        return replace(self, values=values, vocab_size=values.shape[1])


@dataclass(frozen=True, kw_only=True, repr=False)
class Hidden(Whole):
    """Labels whose ``values`` are (rows, d) hidden states, with one output layer. ``SoftLabels.hidden`` makes them."""

    kind: ClassVar[str] = "hidden"

    head: OutputLayer | None = None  # what makes logits of the values; it stays on its device

    def require_head(self) -> OutputLayer:
        """The output layer. Raises ``ValueError`` if the labels have not been given it."""
        if self.head is None:
            raise ValueError(
                "hidden soft labels need the teacher's output layer: kdfast.cache.open(path, head=...) gives it to them"
            )
        return self.head

    def to_dense(self) -> Dense:
        logits = self.require_head().logits(self.values)
        return Dense(vocab_size=logits.shape[1], values=logits, present=self.present, floor=self.floor)

    def shard(self, columns: slice) -> Self:
        head = self.require_head().shard(columns)
        return replace(self, head=head, vocab_size=head.vocab_size)

    def _joined(self, parts: Sequence[Any]) -> dict[str, Any]:
        for part in parts:
            if part.head is not self.head:
                raise ValueError(f"cannot concatenate {self!r} with {part!r}: their heads are not the same object")
        return super()._joined(parts)
