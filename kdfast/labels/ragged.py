"""Soft labels that name a few classes of each row: top-k entries, a sampler's weights, and entries with a prototype."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kdfast.divergences import DIVERGENCES
from kdfast.labels.entries import Entries, offsets_of, rows_of_entries
from kdfast.labels.soft_labels import SoftLabels, Support

if TYPE_CHECKING:
    from typing_extensions import Self

TINY = torch.finfo(torch.float32).tiny

__all__ = ["Prototype", "Ragged", "Tailed", "TopK", "Weights", "same_table", "table_on"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Ragged(SoftLabels):
    """Labels of a few entries a row: row i owns entries ``offsets[i]:offsets[i + 1]`` of ``ids`` and ``values``."""

    ids: Tensor  # (nnz,) int32, unique within a row
    offsets: Tensor  # (rows + 1,) int64
    width: int | None = None  # entries per row where every row has as many, and that is known

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    @property
    def counts(self) -> Tensor:
        """(rows,) int64: the entries of each row."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def entry_rows(self) -> Tensor:
        """(nnz,) int64: the row that each entry belongs to."""
        return rows_of_entries(self.offsets, self.values.numel())

    @property
    def padding(self) -> Tensor:
        """(nnz,) bool: entries that are as if they were not there, whatever their ids."""
        return self.values == 0.0

    def at(self, temperature: float | Tensor) -> tuple[Tensor, Tensor | None]:
        """(nnz,) weights and, for top-k and prototypes, (rows,) log tail mass at one of the labels' temperatures.

        The entries of such a row are normalised to what the tail leaves (top-k: after tempering), so that entries and
        tail are a distribution whatever the precision they were stored in.

        Raises:
            ValueError: a temperature that the labels do not carry, or a tensor of temperatures.
        """
        known = self.find_temperature(temperature)
        if known is None or isinstance(temperature, Tensor):
            got = "a tensor" if isinstance(temperature, Tensor) else temperature
            raise ValueError(f"{self.kind} soft labels hold teacher_temperature {self.temperatures}, got {got}")
        return self._at(temperature, known)

    @abstractmethod
    def _at(self, temperature: float, known: int) -> tuple[Tensor, Tensor | None]:
        """``at`` a temperature that is number ``known`` of the labels'."""

    def argmax(self) -> Tensor:
        entries = Entries.of(self.ids, self.values, self.offsets)
        return entries.where(~self.padding).best(len(self))

    def without_padding(self) -> Self:
        kept = ~self.padding
        if bool(kept.all()):
            return self
        counts = torch.bincount(self.entry_rows[kept], minlength=len(self))
        return replace(self, ids=self.ids[kept], values=self.values[kept], offsets=offsets_of(counts), width=None)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        moved = super().to(device, non_blocking=non_blocking)
        tables = {name: getattr(self, name) for name in self.shared}
        tables = {name: table_on(table, moved.device) for name, table in tables.items() if table is not None}
        return replace(moved, **tables) if tables else moved

    def to_dense(self) -> SoftLabels:
        raise ValueError(f"{self.kind} soft labels do not hold the logits of whole rows; dense and hidden ones do")

    def _entries_of(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The offsets of rows ``index``, and the numbers of their entries."""
        offsets = offsets_of(self.counts[index])
        # Entry e of the result sits `e - offsets[row]` past its row's old start.
        row = rows_of_entries(offsets, int(offsets[-1]))
        return offsets, (self.offsets[:-1][index] - offsets[:-1])[row] + torch.arange(len(row), device=self.device)

    def _taken(self, index: Tensor) -> dict[str, Any]:
        offsets, entries = self._entries_of(index)
        present = None if self.present is None else self.present[index]
        return {"values": self.values[entries], "ids": self.ids[entries], "offsets": offsets, "present": present}

    def _joined(self, parts: Sequence[Any]) -> dict[str, Any]:
        return {
            **super()._joined(parts),
            "ids": torch.cat([part.ids for part in parts]),
            "offsets": offsets_of(torch.cat([part.counts for part in parts])),
            "width": self.width if all(part.width == self.width for part in parts) else None,
        }

    def _about(self) -> list[str]:
        return [f"entries={self.values.numel()}"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Weights(Ragged):
    """Unnormalised (id, weight) entries, as an unbiased sampler gives them. ``SoftLabels.weights`` makes them."""

    kind: ClassVar[str] = "weights"
    support: ClassVar[Support] = Support({"soft_ce": "unbiased"}, entropy=False)
    shared: ClassVar[tuple[str, ...]] = ("prototypes",)

    prototype_ids: Tensor | None = None  # (rows,) int64, each row's row of `prototypes`, where it is known
    prototypes: Tensor | None = None  # (S, vocab) bfloat16 or float32
    log_probs: Tensor | None = None  # (nnz,) float32 natural logs of the teacher's probabilities, where they are known

    def without_padding(self) -> Self:
        if self.log_probs is None:
            return super().without_padding()
        return replace(super().without_padding(), log_probs=self.log_probs[~self.padding])

    def shrunk(self, share: float) -> SoftLabels:
        """Move each row a part of the way to its prototype: ``(1 - share) * weights + share * prototype``.

        Draws are right on average and noisy, prototypes have no noise and are a fixed distance away from the teacher.
        For a student further from its teacher than the prototypes are, a mixture trains better than the draws; for one
        nearer it does not. A share of m / (N + m) counts the prototype as m draws beside N.

        Returns:
            Prototype labels of whole distributions, which any divergence takes; the labels themselves for a share of 0.

        Raises:
            ValueError: a share outside [0, 1], or labels without prototypes: ``sample`` caches captured with a table
                (``prototypes=``) have them.
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share must lie in [0, 1], got {share}")
        if share == 0.0:
            return self
        if self.prototype_ids is None or self.prototypes is None:
            raise ValueError(
                'labels without prototypes cannot be shrunk towards them: capture with codec="sample", '
                "prototypes=kdfast.cache.learn_prototypes(...)"
            )
        row = self.entry_rows
        typical = self.prototypes[self.prototype_ids[row], self.ids.long()].float()
        held = torch.zeros(len(self), device=self.device).index_add(0, row, typical)
        return Prototype(
            vocab_size=self.vocab_size,
            values=(1.0 - share) * self.values + share * typical,
            temperatures=self.temperatures,
            present=self.present,
            ids=self.ids,
            offsets=self.offsets,
            width=self.width,
            tails=torch.log(share * (1.0 - held).clamp(min=0.0))[None],
            prototype_ids=self.prototype_ids,
            prototypes=self.prototypes,
        )

    def _taken(self, index: Tensor) -> dict[str, Any]:
        prototype_ids = None if self.prototype_ids is None else self.prototype_ids[index]
        log_probs = None if self.log_probs is None else self.log_probs[self._entries_of(index)[1]]
        return {**super()._taken(index), "prototype_ids": prototype_ids, "log_probs": log_probs}

    def _joined(self, parts: Sequence[Any]) -> dict[str, Any]:
        known = all(part.log_probs is not None for part in parts)
        log_probs = torch.cat([part.log_probs for part in parts]) if known else None
        joined = {**super()._joined(parts), "log_probs": log_probs}
        same = self.prototypes is not None and all(
            part.prototypes is not None and same_table(part.prototypes, self.prototypes) for part in parts
        )
        if not same:  # they are weights still
            return {**joined, "prototype_ids": None, "prototypes": None}
        return {**joined, "prototype_ids": torch.cat([part.prototype_ids for part in parts])}

    def _at(self, temperature: float, known: int) -> tuple[Tensor, Tensor | None]:
        return self.values, None

    def argmax(self) -> Tensor:
        raise ValueError(
            "weights soft labels hold a sampler's draws, the likeliest of which need not be the teacher's likeliest "
            "class; topk, prototype, dense and hidden labels have it"
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Tailed(Ragged):
    """Labels of a few entries a row that know how much probability each row has outside of them."""

    tails: Tensor  # (len(temperatures), rows) log-mass outside the entries

    def _tail(self, known: int) -> tuple[Tensor, Tensor]:
        """(rows,) log-mass outside the entries, and the mass that it leaves to them."""
        tail = self.tails[known]
        # A tail that rounding took above all of the mass leaves nothing to the entries.
        return tail, -torch.expm1(tail.clamp(max=0.0))

    def _weights(self, weights: Tensor) -> Tensor:
        """``weights`` of entries: however small, they stay entries, which a weight of 0 is not."""
        return torch.where(self.padding, weights, weights.clamp(min=TINY))

    def _taken(self, index: Tensor) -> dict[str, Any]:
        return {**super()._taken(index), "tails": self.tails[:, index]}

    def _joined(self, parts: Sequence[Any]) -> dict[str, Any]:
        return {**super()._joined(parts), "tails": torch.cat([part.tails for part in parts], dim=1)}


@dataclass(frozen=True, kw_only=True, repr=False)
class TopK(Tailed):
    """The likeliest classes' log-probabilities at T = 1, and exact tails. ``SoftLabels.topk`` makes them."""

    kind: ClassVar[str] = "topk"
    support: ClassVar[Support] = Support({"forward_kl": "lower bound", "soft_ce": "lower bound"})

    @property
    def padding(self) -> Tensor:
        return self.values == -torch.inf

    def _at(self, temperature: float, known: int) -> tuple[Tensor, Tensor | None]:
        tail, mass = self._tail(known)
        head, tempered = torch.log(mass), self.values / temperature
        if self.width is not None:
            tempered = tempered.view(len(self), self.width)
            log_probs = tempered + (head - _finite(torch.logsumexp(tempered, 1)))[:, None]
            return self._weights(log_probs.exp().view(-1)), tail
        row = self.entry_rows
        top = _finite(head.new_full((len(self),), -torch.inf).scatter_reduce(0, row, tempered, "amax"))
        total = torch.zeros_like(head).index_add(0, row, (tempered - top[row]).exp())
        return self._weights((tempered - top[row] + (head - _finite(total.log()))[row]).exp()), tail


@dataclass(frozen=True, kw_only=True, repr=False)
class Prototype(Tailed):
    """Entries' probabilities, and tails like one of a table's prototypes. ``SoftLabels.prototype`` makes them."""

    kind: ClassVar[str] = "prototype"
    support: ClassVar[Support] = Support({name: "approximate" for name in DIVERGENCES if name != "logit_mse"})
    shared: ClassVar[tuple[str, ...]] = ("prototypes",)

    prototype_ids: Tensor  # (rows,) int64, each row's row of `prototypes`
    prototypes: Tensor  # (S, vocab) bfloat16 or float32

    def _at(self, temperature: float, known: int) -> tuple[Tensor, Tensor | None]:
        tail, mass = self._tail(known)
        row = self.entry_rows
        total = torch.zeros_like(mass).index_add(0, row, self.values)
        return self._weights(self.values * torch.where(total == 0.0, 0.0, mass / total)[row]), tail

    def argmax(self) -> Tensor:
        best = super().argmax()
        return torch.where(best < 0, self.prototypes.argmax(-1)[self.prototype_ids], best)

    def _taken(self, index: Tensor) -> dict[str, Any]:
        return {**super()._taken(index), "prototype_ids": self.prototype_ids[index]}

    def _joined(self, parts: Sequence[Any]) -> dict[str, Any]:
        for part in parts:
            if not same_table(part.prototypes, self.prototypes):
                raise ValueError(f"cannot concatenate {self!r} with {part!r}: their tables of prototypes differ")
        return {**super()._joined(parts), "prototype_ids": torch.cat([part.prototype_ids for part in parts])}

    def _about(self) -> list[str]:
        return [*super()._about(), f"prototypes={len(self.prototypes)}"]


def _finite(x: Tensor) -> Tensor:
    """0 in place of -inf: rows whose entries are all impossible, or that have none."""
    return x.masked_fill(x == -torch.inf, 0.0)


def same_table(a: Tensor, b: Tensor) -> bool:
    """Whether two tables of prototypes are one, or hold the same bits."""
    return a is b or (a.dtype == b.dtype and torch.equal(a, b))


# A table's copies on other devices, by device and version: batch after batch refers to one table.
_COPIES: MutableMapping[Tensor, dict[tuple[torch.device, int], Tensor]] = WeakTensorKeyDictionary()


def table_on(table: Tensor, device: torch.device) -> Tensor:
    """``table`` on another device; asked again, the same copy while ``table`` lives and nobody writes to it."""
    if table.device == device:
        return table
    key = (device, 0 if table.is_inference() else table._version)
    if key not in _COPIES.get(table, {}):
        _COPIES[table] = {key: table.to(device)}
    return _COPIES[table][key]
